// SPDX-License-Identifier: Apache-2.0
// Compiled once per ISA body, with the flags of the kernels.
#include "primitives.h"

#include <iterator>

#include "cpu/microkernel.h"
#include "cpu/rows.h"
#include "cpu/vec.h"

namespace palmette::PALMETTE_ISA_NS {
namespace {

using F = Simd<float, PALMETTE_LANES>;
using D = Simd<double, 4>;
constexpr int N = F::kLanes;

template <class T>
const T* input(const void* const* in, int i) {
  return static_cast<const T*>(in[i]);
}

// out[i] = op(in[0][i], in[1][i], ...): whole vectors, then one with a tail.
template <class S, int kInputs, class Op>
void map(const void* const* in, void* out, int64_t n, Op op) {
  using T = typename S::Scalar;
  typename S::V x[3];
  int64_t i = 0;
  for (; i + S::kLanes <= n; i += S::kLanes) {
    for (int k = 0; k < kInputs; ++k) x[k] = S::load(input<T>(in, k) + i);
    S::store(static_cast<T*>(out) + i, op(x));
  }
  if (i == n) return;
  const int tail = int(n - i);
  for (int k = 0; k < kInputs; ++k) x[k] = S::load_n(input<T>(in, k) + i, tail);
  S::store_n(static_cast<T*>(out) + i, op(x), tail);
}

template <class E>
void widen(const void* const* in, void* out, int64_t n) {
  int64_t i = 0;
  for (; i + N <= n; i += N) F::store(static_cast<float*>(out) + i, F::load(input<E>(in, 0) + i));
  F::store_n(static_cast<float*>(out) + i, F::load_n(input<E>(in, 0) + i, int(n - i)), int(n - i));
}

template <class E>
void narrow(const void* const* in, void* out, int64_t n) {
  int64_t i = 0;
  for (; i + N <= n; i += N) F::store(static_cast<E*>(out) + i, F::load(input<float>(in, 0) + i));
  F::store_n(static_cast<E*>(out) + i, F::load_n(input<float>(in, 0) + i, int(n - i)), int(n - i));
}

template <class E>
void widen_each(const void* const* in, void* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) static_cast<float*>(out)[i] = F::to_scalar(input<E>(in, 0)[i]);
}

template <class E>
void narrow_each(const void* const* in, void* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) F::from_scalar(static_cast<E*>(out)[i], input<float>(in, 0)[i]);
}

// out[j] = op(vector j)
template <class Op>
void reduce(const void* const* in, void* out, int64_t n, Op op) {
  for (int64_t j = 0; j < n / N; ++j) static_cast<float*>(out)[j] = op(F::load(input<float>(in, 0) + j * N));
}

template <int P>
void splat_granule(const void* const* in, void* out, int64_t n) {
  for (int64_t j = 0; j < n / N; ++j)
    F::store(static_cast<float*>(out) + j * N, F::template splat_granule<P>(input<float>(in, 0) + j * P));
}

template <int P>
void sum_granule(const void* const* in, void* out, int64_t n) {
  for (int64_t j = 0; j < n / N; ++j)
    F::store(static_cast<float*>(out) + j * N,
             F::template sum_granule<P>(F::load(input<float>(in, 0) + j * N)));
}

template <int P>
void transpose(const void* const* in, void* out, int64_t) {
  typename F::V r[N / P];
  for (int i = 0; i < N / P; ++i) r[i] = F::load(input<float>(in, 0) + i * N);
  F::template transpose<P>(r);
  for (int i = 0; i < N / P; ++i) F::store(static_cast<float*>(out) + i * N, r[i]);
}

// C [MR, NU * N] (+)= sum_k A(., k) * B[k]; n is the number of steps. Inputs: A, B, C before, scale.
template <int MR, int NU, int P, bool kAlongRow, Start kStart>
void multiply(const void* const* in, void* out, int64_t n) {
  float* c = static_cast<float*>(out);
  std::memcpy(c, in[2], sizeof(float) * MR * NU * N);
  const int64_t lda = kAlongRow ? n * P : MR * P;
  multiply_block<F, MR, NU, P, kAlongRow, kStart>(input<float>(in, 0), lda, input<float>(in, 1), NU * N, c,
                                                  NU * N, int(n), input<float>(in, 3));
}

constexpr int kHalf = N / 2, kQuarter = N / 4;

constexpr Primitive kPrimitives[] = {
    {"copy", [](auto in, auto out, auto n) { map<F, 1>(in, out, n, [](auto* x) { return x[0]; }); }},
    {"copy64", [](auto in, auto out, auto n) { map<D, 1>(in, out, n, [](auto* x) { return x[0]; }); }},
    {"splat",
     [](auto in, auto out, auto n) {
       for (int64_t j = 0; j < n / N; ++j)
         F::store(static_cast<float*>(out) + j * N, F::splat(input<float>(in, 0)[j]));
     }},
    {"load_n_fill",
     [](auto in, auto out, auto n) {
       F::store(static_cast<float*>(out), F::load_n(input<float>(in, 0), int(n), -3.0F));
     }},
    {"fma", [](auto in, auto out,
               auto n) { map<F, 3>(in, out, n, [](auto* x) { return F::fma(x[0], x[1], x[2]); }); }},
    {"fma64", [](auto in, auto out,
                 auto n) { map<D, 3>(in, out, n, [](auto* x) { return D::fma(x[0], x[1], x[2]); }); }},
    {"max",
     [](auto in, auto out, auto n) { map<F, 2>(in, out, n, [](auto* x) { return F::max(x[0], x[1]); }); }},
    {"min",
     [](auto in, auto out, auto n) { map<F, 2>(in, out, n, [](auto* x) { return F::min(x[0], x[1]); }); }},
    {"select",
     [](auto in, auto out, auto n) {
       map<F, 3>(in, out, n, [](auto* x) { return F::select(x[0] < x[1], x[2], F::splat(-1.0F)); });
     }},
    {"any", [](auto in, auto out,
               auto n) { reduce(in, out, n, [](auto v) { return F::any(v > F::zero()) ? 1.0F : 0.0F; }); }},
    {"sum", [](auto in, auto out, auto n) { reduce(in, out, n, [](auto v) { return F::sum(v); }); }},
    {"max_lane",
     [](auto in, auto out, auto n) { reduce(in, out, n, [](auto v) { return F::max_lane(v); }); }},
    {"exp2", [](auto in, auto out, auto n) { map<F, 1>(in, out, n, [](auto* x) { return F::exp2(x[0]); }); }},
    {"exp", [](auto in, auto out, auto n) { map<F, 1>(in, out, n, [](auto* x) { return F::exp(x[0]); }); }},
    {"log", [](auto in, auto out, auto n) { map<F, 1>(in, out, n, [](auto* x) { return F::log(x[0]); }); }},
    {"log2", [](auto in, auto out, auto n) { map<F, 1>(in, out, n, [](auto* x) { return F::log2(x[0]); }); }},
    {"tanh", [](auto in, auto out, auto n) { map<F, 1>(in, out, n, [](auto* x) { return F::tanh(x[0]); }); }},
    {"exp64", [](auto in, auto out, auto n) { map<D, 1>(in, out, n, [](auto* x) { return D::exp(x[0]); }); }},
    {"load_bf16", &widen<bf16>},
    {"load_fp16", &widen<fp16>},
    {"store_bf16", &narrow<bf16>},
    {"store_fp16", &narrow<fp16>},
    {"bf16_to_scalar", &widen_each<bf16>},
    {"fp16_to_scalar", &widen_each<fp16>},
    {"scalar_to_bf16", &narrow_each<bf16>},
    {"scalar_to_fp16", &narrow_each<fp16>},
    {"splat_granule_1", &splat_granule<1>},
    {"splat_granule_2", &splat_granule<2>},
    {"splat_granule_quarter", &splat_granule<kQuarter>},
    {"splat_granule_half", &splat_granule<kHalf>},
    {"splat_granule_all", &splat_granule<N>},
    {"sum_granule_1", &sum_granule<1>},
    {"sum_granule_2", &sum_granule<2>},
    {"sum_granule_quarter", &sum_granule<kQuarter>},
    {"sum_granule_half", &sum_granule<kHalf>},
    {"sum_granule_all", &sum_granule<N>},
    {"transpose_1", &transpose<1>},
    {"transpose_2", &transpose<2>},
    {"transpose_quarter", &transpose<kQuarter>},
    {"transpose_half", &transpose<kHalf>},
    {"transpose_all", &transpose<N>},
    {"multiply_6x2_rows", &multiply<6, 2, 1, true, Start::kZero>},
    {"multiply_6x2_columns", &multiply<6, 2, 1, false, Start::kScale>},
    {"multiply_12x1_rows", &multiply<12, 1, 1, true, Start::kLoad>},
    {"multiply_6x1_granule_2", &multiply<6, 1, 2, true, Start::kZero>},
    {"multiply_4x1_granule_all", &multiply<4, 1, N, true, Start::kLoad>},
    {"multiply_4x1_granule_half_columns", &multiply<4, 1, kHalf, false, Start::kScale>},
};

}  // namespace
}  // namespace palmette::PALMETTE_ISA_NS

namespace palmette {

namespace body = PALMETTE_ISA_NS;

template <>
PrimitiveList primitives<Isa::PALMETTE_ISA_NS>() {
  return {std::begin(body::kPrimitives), std::end(body::kPrimitives), PALMETTE_LANES};
}

}  // namespace palmette
