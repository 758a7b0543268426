# SPDX-License-Identifier: Apache-2.0
# The ISA bodies: the flags and the number of float lanes of each. avx2x16 is the 16-lane body compiled for AVX2, so that it
# runs in tests on machines without AVX-512. Architectures other than x86-64 get the 4-lane baseline (NEON on aarch64).
set(PALMETTE_WARNINGS -Wall -Wextra -Wno-psabi)
# No path of the build machine in messages or debug information.
set(PALMETTE_HOST_FLAGS "-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=")
# Not -ffast-math: kernels rely on inf and NaN. errno and unfused multiply-adds are all we give up.
set(PALMETTE_KERNEL_FLAGS -O3 -fno-math-errno -ffp-contract=fast)

set(PALMETTE_ISAS scalar)
set(PALMETTE_LANES_scalar 4)
set(PALMETTE_FLAGS_scalar "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|amd64|AMD64")
  list(APPEND PALMETTE_ISAS avx2 avx2x16 avx512)
  set(PALMETTE_LANES_avx2 8)
  set(PALMETTE_LANES_avx2x16 16)
  set(PALMETTE_LANES_avx512 16)
  set(PALMETTE_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(PALMETTE_FLAGS_avx2x16 ${PALMETTE_FLAGS_avx2} -O1) # runs in tests only; -O3 takes five times as long to compile
  set(PALMETTE_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # GCC 12 warns about the "undefined" operands in its own intrinsics (its bug 105593).
    list(APPEND PALMETTE_FLAGS_avx512 -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
endif()

# palmette_isa_library(<target> <isa> <sources>...): the sources as objects of one body.
function(palmette_isa_library target isa)
  add_library(${target} OBJECT ${ARGN})
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
  target_compile_definitions(${target} PRIVATE PALMETTE_ISA_NS=${isa} PALMETTE_LANES=${PALMETTE_LANES_${isa}})
  target_compile_options(${target} PRIVATE ${PALMETTE_WARNINGS} ${PALMETTE_HOST_FLAGS} ${PALMETTE_KERNEL_FLAGS}
                                           ${PALMETTE_FLAGS_${isa}})
endfunction()
