# SPDX-License-Identifier: Apache-2.0
# The GPU kernels on the emulator: libpalmette_emulated.so, and libpalmette_emulated_check.so, whose kernels are looked at
# access by access. The .cu files are ordinary C++ here (csrc/gpu/gpu.cuh).
set(PALMETTE_EMULATOR_FLAGS -O2 -fno-strict-aliasing -ffp-contract=off -ftrivial-auto-var-init=pattern)
# Only calls before accesses are taken from the sanitizers; csrc/gpu/emulator/hooks.cpp answers them.
set(PALMETTE_EMULATOR_CHECK_FLAGS -g1 -fsanitize=thread,alignment,bounds,shift -Wno-tsan -DPALMETTE_EMULATOR_CHECK=1)

file(GLOB emulator_engine_sources CONFIGURE_DEPENDS csrc/gpu/emulator/*.cpp)
file(GLOB gpu_kernel_sources CONFIGURE_DEPENDS csrc/*/kernel_gpu.cu csrc/*/kernel_*_gpu.cu)

# palmette_emulator_engine(<target> <check>): the engine as objects, not looked at itself.
function(palmette_emulator_engine target check)
  add_library(${target} OBJECT ${emulator_engine_sources})
  target_include_directories(${target} PRIVATE "${PROJECT_SOURCE_DIR}/csrc")
  target_compile_options(${target} PRIVATE ${PALMETTE_WARNINGS} ${PALMETTE_HOST_FLAGS} -O2)
  target_compile_definitions(${target} PRIVATE PALMETTE_EMULATOR_CHECK=${check})
endfunction()
palmette_emulator_engine(emulator_engine 0)
palmette_emulator_engine(emulator_engine_check 1)

foreach(build IN ITEMS "" _check)
  set(target palmette_emulated${build})
  add_library(${target} SHARED ${gpu_kernel_sources} csrc/gpu/library.cpp)
  set_source_files_properties(${gpu_kernel_sources} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++")
  target_include_directories(${target} PRIVATE csrc)
  target_compile_options(${target} PRIVATE ${PALMETTE_WARNINGS} -Wno-unknown-pragmas ${PALMETTE_HOST_FLAGS}
                                           ${PALMETTE_EMULATOR_FLAGS})
  target_compile_definitions(${target} PRIVATE PALMETTE_GPU_BACKEND="emulated${build}")
  target_link_libraries(${target} PRIVATE emulator_engine${build})
  set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${PALMETTE_LIBRARY_DIR}")
endforeach()
target_compile_options(palmette_emulated_check PRIVATE ${PALMETTE_EMULATOR_CHECK_FLAGS})
