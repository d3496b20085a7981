# _ops: torch custom ops in libtorch's stable ABI with the limited Python API, one binary for torch >= 2.11 and Python >= 3.10.
# _C:   pybind11 classes (Plan, Scheduler, Solver), without torch.
# Both sit beside libzigzag_core.so in the package folder and find it there ($ORIGIN).
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)

function(zigzag_ask_python variable code)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "${code}" OUTPUT_VARIABLE answer OUTPUT_STRIP_TRAILING_WHITESPACE
                  RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${Python_EXECUTABLE} cannot run: ${code}\nInstall the build requirements of pyproject.toml first.")
  endif()
  set(${variable} "${answer}" PARENT_SCOPE)
endfunction()

zigzag_ask_python(torch_dir "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])")
zigzag_ask_python(pybind11_DIR "import pybind11; print(pybind11.get_cmake_dir())")
find_package(pybind11 REQUIRED)

file(GLOB ops_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/bindings/ops/*.cpp)
Python_add_library(_ops MODULE ${ops_sources})
target_include_directories(_ops SYSTEM PRIVATE ${torch_dir}/include)
target_compile_definitions(_ops PRIVATE Py_LIMITED_API=0x030A0000 TORCH_TARGET_VERSION=0x020b000000000000)
target_link_libraries(_ops PRIVATE zigzag_core ${CMAKE_DL_LIBS} ${torch_dir}/lib/libtorch_cpu.so)
set_target_properties(_ops PROPERTIES PREFIX "" SUFFIX ".abi3.so" SKIP_BUILD_RPATH OFF)

file(GLOB c_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/bindings/c/*.cpp)
pybind11_add_module(_C ${c_sources})
target_link_libraries(_C PRIVATE zigzag_core)
if(with_cuda)
  string(REPLACE ";" " " zigzag_archs "${CMAKE_CUDA_ARCHITECTURES}")
endif()
target_compile_definitions(_C PRIVATE ZIGZAG_VERSION="${ZIGZAG_VERSION}" ZIGZAG_CUDA_ARCHS="${zigzag_archs}")

foreach(module _ops _C)
  zigzag_warnings(${module})
endforeach()
# torch's own folder stays out of the run path: torch is imported, and so loaded, before _ops.
set_target_properties(zigzag_core _ops _C PROPERTIES BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN"
                      INSTALL_RPATH_USE_LINK_PATH OFF)
install(TARGETS zigzag_core _ops _C LIBRARY DESTINATION . COMPONENT python)
