# SPDX-License-Identifier: Apache-2.0
# palmette_torch: include directory, two libraries and the stable target. find_package(Torch) would pull in CUDA, MKL and
# protobuf checks for the same three facts, and take seconds at every configure.
find_package(Python REQUIRED COMPONENTS Interpreter)
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
  OUTPUT_VARIABLE torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT torch_dir)
  message(FATAL_ERROR "palmette needs torch >= 2.13 to build, and ${Python_EXECUTABLE} has none.")
endif()

file(STRINGS "${torch_dir}/include/torch/headeronly/version.h" version_lines REGEX "define TORCH_VERSION \\\\|^  \"[0-9.]+\"")
string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" PALMETTE_TORCH_VERSION "${version_lines}")
if(PALMETTE_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "palmette needs torch >= 2.13 to build (2.11 and 2.12 will do for the very same torch), got "
                      "${PALMETTE_TORCH_VERSION} in ${torch_dir}.")
endif()
# The oldest torch whose stable ABI the library may use: it loads in that one and in every later one.
set(target_version 0x020d000000000000)
if(PALMETTE_TORCH_VERSION VERSION_LESS 2.12)
  set(target_version 0x020b000000000000)
elseif(PALMETTE_TORCH_VERSION VERSION_LESS 2.13)
  set(target_version 0x020c000000000000)
endif()

add_library(palmette_torch INTERFACE)
target_include_directories(palmette_torch SYSTEM INTERFACE "${torch_dir}/include")
target_compile_options(palmette_torch INTERFACE "-ffile-prefix-map=${torch_dir}/=") # messages name torch's headers
target_compile_definitions(palmette_torch INTERFACE TORCH_TARGET_VERSION=${target_version})
target_link_libraries(palmette_torch INTERFACE "${torch_dir}/lib/libtorch_cpu.so" "${torch_dir}/lib/libc10.so")
message(STATUS "torch ${PALMETTE_TORCH_VERSION} in ${torch_dir}")
