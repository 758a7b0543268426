// SPDX-License-Identifier: Apache-2.0
// What kernels and operators share without torch: the names of the bodies and of the element types.
#pragma once

namespace palmette {

// One enumerator per body that cmake/isa.cmake can build; the names are also the kernels' namespaces and
// PALMETTE_ISA's values.
enum class Isa : int { scalar, avx2, avx2x16, avx512 };

// f64 exists on the scalar body only: gradcheck runs through the real code.
enum class DType : int { f32, bf16, f16, f64 };

}  // namespace palmette
