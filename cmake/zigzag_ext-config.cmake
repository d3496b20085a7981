# find_package(zigzag_ext): the target zigzag::core.
include(CMakeFindDependencyMacro)
find_dependency(Threads)
include(${CMAKE_CURRENT_LIST_DIR}/zigzag_ext-targets.cmake)
