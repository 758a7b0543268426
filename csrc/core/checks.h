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
#include <tuple>

#include "core/isa.h"

namespace palmette {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// text("at least ", n): its parts side by side, put together only when it is written to a stream. It refers
// to them, so it lives no longer than the call that it is made in.
template <class... Parts>
struct Text {
  std::tuple<const Parts&...> parts;
  friend std::ostream& operator<<(std::ostream& s, const Text& t) {
    std::apply([&](const Parts&... part) { (s << ... << part); }, t.parts);
    return s;
  }
};
template <class... Parts>
Text<Parts...> text(const Parts&... parts) {
  return {{parts...}};
}

// require(ok, "indptr", "non-decreasing", 3, " after ", 5)
template <class Wanted, class... Got>
void require(bool ok, const char* name, const Wanted& wanted, const Got&... got) {
  if (ok) [[likely]]
    return;
  std::ostringstream s;
  s << name << " must be " << wanted << ", got ";
  (s << ... << got);
  throw std::runtime_error(s.str());
}

// The shape of a tensor, likewise: "[2, 3]".
struct ShapeText {
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& s, const ShapeText& t) {
    s << "[";
    for (int64_t i = 0; i < t.tensor.dim(); ++i) s << (i ? ", " : "") << t.tensor.size(i);
    return s << "]";
  }
};
inline ShapeText shape_text(const Tensor& t) { return {t}; }

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
  for (ScalarType type : wanted) {
    if (t.scalar_type() == type) return;
  }
  std::string names;
  for (ScalarType type : wanted) names.append(names.empty() ? "" : " or ").append(dtype_text(type));
  require(false, name, names, dtype_text(t.scalar_type()));
}

inline const char* device_text(const Tensor& t) {
  return t.is_cpu() ? "a CPU tensor" : t.is_cuda() ? "a CUDA tensor" : "a tensor of another device";
}

inline void check_cpu(const Tensor& t, const char* name) {
  require(t.is_cpu(), name, "on the CPU", device_text(t));
}

// What operators that have kernels for both take: the CPU or a GPU, everything on the same one.
inline void check_device(const Tensor& t, const char* name) {
  require(t.is_cpu() || t.is_cuda(), name, "on the CPU or a GPU", device_text(t));
}
inline void check_device(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  const bool same = t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index();
  if (!same) require(false, name, text("on the device of ", like_name), device_text(t));
}

inline void check_contiguous(const Tensor& t, const char* name) {
  if (t.is_contiguous()) return;
  std::ostringstream strides;
  for (int64_t i = 0; i < t.dim(); ++i) strides << (i ? ", " : "") << t.stride(i);
  require(false, name, "contiguous", "strides [", strides.str(), "] of ", shape_text(t));
}

// The kernels' element type of a floating-point tensor; float64 only where the scalar body runs.
inline DType check_element(const Tensor& t, const char* name, bool float64) {
  check_dtype(t, name, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      require(float64 && t.is_cpu(), name,
              "float32, bfloat16 or float16 (float64 runs on the scalar backend only)", "float64");
      return DType::f64;
    default:
      return DType::f32;
  }
}

}  // namespace palmette
