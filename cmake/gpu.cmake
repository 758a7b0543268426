# SPDX-License-Identifier: Apache-2.0
# GPU kernels: every csrc/*/kernel*_gpu.cu is written once and becomes a library of its own per backend, which libpalmette.so
# opens at run time (csrc/core/gpu.h): CUDA's in csrc/gpu/, the emulator's in csrc/gpu/emulator/. Directories of their own,
# because to one of them the same files are CUDA and to the other C++.
#
# PALMETTE_CUDA: auto (where nvcc is found), 1 or 0. The environment variable of the same name is its default; without it 0, as
# long as the CUDA library is not part of every test run.
set(default_cuda 0)
if(DEFINED ENV{PALMETTE_CUDA} AND NOT "$ENV{PALMETTE_CUDA}" STREQUAL "")
  set(default_cuda "$ENV{PALMETTE_CUDA}")
endif()
set(PALMETTE_CUDA "${default_cuda}" CACHE STRING "Build the CUDA kernels: auto (where nvcc is found), 1 or 0")
set(PALMETTE_CUDA_ARCHITECTURES "80-real;90-real;90-virtual" CACHE STRING "What they are compiled for; PTX for later GPUs")

file(GLOB PALMETTE_GPU_SOURCES CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/*/kernel_gpu.cu"
                                                 "${PROJECT_SOURCE_DIR}/csrc/*/kernel_*_gpu.cu")
list(APPEND PALMETTE_GPU_SOURCES "${PROJECT_SOURCE_DIR}/csrc/gpu/library.cu")

# Only calls before accesses are taken from the sanitizers; csrc/gpu/emulator/hooks.cpp answers them.
set(PALMETTE_EMULATOR_CHECK_FLAGS -g1 -fsanitize=thread,alignment,bounds,shift -Wno-tsan -DPALMETTE_EMULATOR_CHECK=1)

if(PALMETTE_EMULATOR)
  add_subdirectory(csrc/gpu/emulator)
endif()

if(NOT PALMETTE_CUDA MATCHES "^(auto|0|1|ON|OFF)$")
  message(FATAL_ERROR "PALMETTE_CUDA must be auto, 0 or 1, got ${PALMETTE_CUDA}")
endif()
find_program(PALMETTE_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin)
if(PALMETTE_CUDA MATCHES "^(1|ON)$" AND NOT PALMETTE_NVCC)
  message(FATAL_ERROR "PALMETTE_CUDA is 1, but there is no nvcc on the PATH, in CUDA_HOME or in CUDA_PATH.")
endif()
if(PALMETTE_NVCC AND NOT PALMETTE_CUDA MATCHES "^(0|OFF)$")
  set(CMAKE_CUDA_COMPILER "${PALMETTE_NVCC}")
  add_subdirectory(csrc/gpu)
else()
  message(STATUS "CUDA kernels: not built")
endif()
