# Wheels of CPU kernels for systems with glibc 2.28 and newer, in the image that Python's packagers build in. Untried.
#   docker build -f release/manylinux.Dockerfile --output dist .
# With CUDA kernels: --build-arg CUDA=13-0, the version of NVIDIA's packages for RHEL 8; takes several times as long.
FROM quay.io/pypa/manylinux_2_28_x86_64 AS build
ARG CUDA=
RUN if [ -n "$CUDA" ]; then \
      dnf config-manager --add-repo https://developer.download.nvidia.com/compute/cuda/repos/rhel8/x86_64/cuda-rhel8.repo && \
      dnf install -y cuda-nvcc-$CUDA cuda-cudart-devel-$CUDA cuda-cccl-$CUDA; \
    fi
ENV PATH=/usr/local/cuda/bin:$PATH PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY . /source
WORKDIR /source
RUN make wheels PYTHON=/opt/python/cp311-cp311/bin/python

FROM scratch
COPY --from=build /source/dist /
