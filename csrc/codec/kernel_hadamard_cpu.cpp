// SPDX-License-Identifier: Apache-2.0
// The Hadamard transform of rows: out = scale * x (H_base (x) H_2^k)^T.
//
// A row is read once and written once; what lies between happens in L1. The first pass takes R neighbouring
// vectors through as many stages as there are elements in them, the passes after it take R vectors that lie
// one such block apart, and so on: log(n) / log(8 or 16) passes instead of log2(n). Last comes the small
// matrix, for sizes that have one, with 2^k in the lanes. Rows of 16-bit elements are transformed in a float
// buffer and rounded once.
#include "codec/fwht_cpu.h"
#include "codec/params.h"
#include "core/workspace.h"
#include "cpu/chunks.h"
#include "cpu/vec.h"

namespace palmette::PALMETTE_ISA_NS {
namespace {

using Work = Chunks<HadamardParams>;

template <class E>
struct Lanes {
  using T = float;
  static constexpr int kCount = PALMETTE_LANES;
};
template <>
struct Lanes<double> {
  using T = double;
  static constexpr int kCount = 4;
};

template <class E>
struct Rows {
  using T = typename Lanes<E>::T;
  static constexpr int L = Lanes<E>::kCount;
  using S = Simd<T, L>;
  using V = typename S::V;
  using B = Butterfly<T, L>;
  static constexpr int kMost = L == 16 ? 16 : 8;  // vectors in registers
  static constexpr int kLaneStages = log2_of(L);

  // Stages 1 .. R L / 2 of `count` elements, a multiple of R L; To is E or T.
  template <int R, class From, class To>
  static void first_pass(const From* x, To* to, int64_t count, V scale) {
    for (int64_t i = 0; i < count; i += R * L) {
      V v[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) v[r] = B::template in_lanes<kLaneStages>(S::load(x + i + r * L));
      B::between(v);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) S::store(to + i + r * L, v[r] * scale);
    }
  }
  // Rows of 2^kStages < L elements, several to a vector.
  template <int kStages>
  static void short_rows(const E* x, E* to, int64_t count, V scale) {
    int64_t i = 0;
    for (; i + L <= count; i += L) S::store(to + i, B::template in_lanes<kStages>(S::load(x + i)) * scale);
    if (i < count) {
      const int left = int(count - i);
      S::store_n(to + i, B::template in_lanes<kStages>(S::load_n(x + i, left)) * scale, left);
    }
  }
  // Stages h .. R h / 2, h a multiple of L.
  template <int R, class To>
  static void pass(const T* x, To* to, int64_t count, int64_t h, V scale) {
    for (int64_t block = 0; block < count; block += R * h) {
      for (int64_t i = block; i < block + h; i += L) {
        V v[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) v[r] = S::load(x + i + r * h);
        B::between(v);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) S::store(to + i + r * h, v[r] * scale);
      }
    }
  }
  template <class F>
  static void with_vectors(int64_t r, F&& f) {
    if (r >= kMost) return f.template operator()<kMost>();
    if (r == 8) return f.template operator()<8>();
    if (r == 4) return f.template operator()<4>();
    if (r == 2) return f.template operator()<2>();
    return f.template operator()<1>();
  }

  // The transform of 2^k = size >= L elements; `buffer` may be x or to, if these are of type T.
  template <class To>
  static void row(const E* x, T* buffer, To* to, int64_t size, V scale) {
    const V one = S::splat(T(1));
    int64_t done = 0;
    with_vectors(size / L, [&]<int R>() {
      done = R * L;
      if (done == size) return first_pass<R>(x, to, size, scale);
      first_pass<R>(x, buffer, size, one);
    });
    while (done < size) {
      with_vectors(size / done, [&]<int R>() {
        if (done * R == size)
          pass<R>(buffer, to, size, done, scale);
        else
          pass<R>(buffer, buffer, size, done, one);
        done *= R;
      });
    }
  }

  // to[a, j] = scale * sum_b sign[a, b] from[b, j], j in [0, width).
  static void small_matrix(const T* from, E* to, int base, int64_t width, const T* sign, V scale) {
    for (int64_t j = 0; j < width; j += L) {
      const int n = int(width - j < L ? width - j : L);
      V in[28];
      for (int b = 0; b < base; ++b)
        in[b] = n == L ? S::load(from + b * width + j) : S::load_n(from + b * width + j, n);
      for (int a = 0; a < base; ++a) {
        V sum = in[0] * sign[a * base];
        for (int b = 1; b < base; ++b) sum = sum + in[b] * sign[a * base + b];
        if (n == L)
          S::store(to + a * width + j, sum * scale);
        else
          S::store_n(to + a * width + j, sum * scale, n);
      }
    }
  }

  static void rows(const HadamardParams& p, int64_t begin, int64_t end, T* buffer) {
    const auto* x = static_cast<const E*>(p.x) + begin * p.size;
    auto* out = static_cast<E*>(p.out) + begin * p.size;
    const V scale = S::splat(T(p.scale));
    const int64_t width = p.size / p.base, count = (end - begin) * p.size;
    T sign[28 * 28];
    for (int a = 0; p.base > 1 && a < p.base; ++a) {
      for (int b = 0; b < p.base; ++b) sign[a * p.base + b] = (p.negative[a] >> b & 1) ? T(-1) : T(1);
    }
    if (p.base == 1 && width < L) {
      switch (width) {
        case 1:
          return short_rows<0>(x, out, count, scale);
        case 2:
          return short_rows<1>(x, out, count, scale);
        case 4:
          return short_rows<2>(x, out, count, scale);
        default:
          return short_rows<3>(x, out, count, scale);
      }
    }
    for (int64_t i = 0; i < count; i += p.size) {
      if (p.base == 1) {
        T* between = buffer;
        if constexpr (sizeof(E) == sizeof(T)) between = out + i;
        row(x + i, between, out + i, width, scale);
        continue;
      }
      for (int b = 0; b < p.base; ++b) {
        const E* from = x + i + b * width;
        T* to = buffer + b * width;
        if (width >= L) {
          row(from, to, to, width, S::splat(T(1)));
          continue;
        }
        for (int64_t j = 0; j < width; ++j) to[j] = S::to_scalar(from[j]);
        for (int64_t h = 1; h < width; h *= 2) {
          for (int64_t j = 0; j < width; ++j) {
            if (j & h) continue;
            const T a = to[j], c = to[j + h];
            to[j] = a + c;
            to[j + h] = a - c;
          }
        }
      }
      small_matrix(buffer, out + i, p.base, width, sign, scale);
    }
  }

  static void worker(void* ctx, int64_t) {
    Work& work = *static_cast<Work*>(ctx);
    const HadamardParams& p = *work.p;
    T* buffer = static_cast<T*>(thread_workspace(p.size * int64_t(sizeof(T))));
    work.each_chunk([&](int64_t begin, int64_t end) { rows(p, begin, end, buffer); });
  }
};

}  // namespace
}  // namespace palmette::PALMETTE_ISA_NS

namespace palmette {

namespace body = PALMETTE_ISA_NS;

template <>
void hadamard_transform<Isa::PALMETTE_ISA_NS>(const HadamardParams& p) {
  const int64_t chunk = 32768 / p.size;
  body::Work work{&p, p.rows, chunk < 1 ? 1 : chunk};
  body::with_any_element(p.dtype, [&]<class E>() { work.run(&body::Rows<E>::worker); });
}

}  // namespace palmette
