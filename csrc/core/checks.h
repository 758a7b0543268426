// SPDX-License-Identifier: Apache-2.0
// Argument checks of the operators, in one message style: "NAME must be WANTED, got GOT". They throw what
// STD_TORCH_CHECK throws (RuntimeError in Python) without its file and line prefix, which helps nobody who
// made the call.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "core/isa.h"

namespace palmette {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream s;
  (s << ... << parts);
  return s.str();
}

// require(ok, "indptr", "non-decreasing", 3, " after ", 5): the message is only built when it is needed.
template <class Wanted, class... Got>
void require(bool ok, const char* name, const Wanted& wanted, const Got&... got) {
  if (!ok) throw std::runtime_error(text(name, " must be ", wanted, ", got ", got...));
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream s;
  s << "[";
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << "]";
  return s.str();
}

inline const char* dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    default:
      return "another dtype";
  }
}

inline void check_dim(const Tensor& t, const char* name, const char* wanted_shape, int64_t dim) {
  if (t.dim() != dim) require(false, name, wanted_shape, shape_text(t));
}

// check_shape(lses, "lses", "[N, S, H]", {n, s, h})
inline void check_shape(const Tensor& t, const char* name, const char* symbols,
                        std::initializer_list<int64_t> sizes) {
  bool ok = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (int64_t size : sizes) ok = ok && t.size(i++) == size;
  if (ok) return;
  std::ostringstream wanted;
  wanted << symbols << " = [";
  i = 0;
  for (int64_t size : sizes) wanted << (i++ ? ", " : "") << size;
  wanted << "]";
  require(false, name, wanted.str(), shape_text(t));
}

inline void check_dtype(const Tensor& t, const char* name, std::initializer_list<ScalarType> wanted) {
  std::string names;
  for (ScalarType type : wanted) {
    if (t.scalar_type() == type) return;
    names += text(names.empty() ? "" : " or ", dtype_text(type));
  }
  require(false, name, names, dtype_text(t.scalar_type()));
}

inline void check_cpu(const Tensor& t, const char* name) {
  if (!t.is_cpu()) require(false, name, "on the CPU", "another device");
}

// The kernels' element type of a floating-point tensor; float64 only where the scalar body runs.
inline DType check_element(const Tensor& t, const char* name, Isa isa) {
  check_dtype(t, name, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      require(isa == Isa::scalar, name,
              "float32, bfloat16 or float16 (float64 runs on the scalar backend only)", "float64");
      return DType::f64;
    default:
      return DType::f32;
  }
}

}  // namespace palmette
