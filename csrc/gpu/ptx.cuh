// SPDX-License-Identifier: Apache-2.0
// Every PTX instruction that kernels use: as inline PTX under nvcc (PALMETTE_PTX), as its definition in the
// PTX ISA manual on the emulator (PALMETTE_EMULATED), and as what comes closest under hipcc (PALMETTE_HIP).
// Where there are two bodies, the second is for all but nvcc.
#pragma once

#include "gpu/gpu.cuh"

namespace palmette::ptx {

// ---- numbers

// 2^x; ex2.approx.ftz.f32 is off by about 2 ulp and flushes denormal results.
__device__ __forceinline__ float ex2(float x) {
#if defined(PALMETTE_PTX)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return fabsf(y) < 1.17549435e-38f ? 0.0f : y;
#endif
}

#if !defined(PALMETTE_PTX)
namespace definition {

// Rounding to nearest even, overflow to inf, denormal results kept.
__device__ __forceinline__ uint32_t narrow_bf16(float value) {
  const uint32_t u = __float_as_uint(value);
  return value != value ? 0x7FFFu : (u + 0x7FFFu + (u >> 16 & 1u)) >> 16;
}
#if defined(PALMETTE_HIP)
__device__ __forceinline__ uint32_t narrow_fp16(float value) {
  return __builtin_bit_cast(uint16_t, static_cast<_Float16>(value));
}
__device__ __forceinline__ float widen_fp16(uint16_t bits) { return __builtin_bit_cast(_Float16, bits); }
#else
inline uint32_t narrow_fp16(float value) {
  const uint32_t sign = __float_as_uint(value) >> 16 & 0x8000u;
  const float size = std::fabs(value);
  if (value != value) return 0x7FFFu;
  if (size >= 65520.0f) return sign | 0x7C00u;
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  // 1024 steps are the implicit bit, and 2048 carry into the exponent by themselves
  return sign | ((static_cast<uint32_t>(exponent + 14) << 10) + steps);
}
inline float widen_fp16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  if (exponent == 0) return std::copysign(static_cast<float>(fraction) * 0x1p-24f, __uint_as_float(sign));
  const uint32_t wide = exponent == 31 ? 255u << 23 : static_cast<uint32_t>(exponent + 112) << 23;
  return __uint_as_float(sign | wide | static_cast<uint32_t>(fraction) << 13);
}
#endif

}  // namespace definition
#endif

// Two floats rounded to nearest even; `low` lies in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#if defined(PALMETTE_PTX)
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return definition::narrow_bf16(low) | definition::narrow_bf16(high) << 16;
#endif
}

__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
#if defined(PALMETTE_PTX)
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return definition::narrow_fp16(low) | definition::narrow_fp16(high) << 16;
#endif
}

__device__ __forceinline__ float widen_fp16(uint16_t bits) {
#if defined(PALMETTE_PTX)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  return definition::widen_fp16(bits);
#endif
}

// ---- asynchronous copies into shared memory

// 16 bytes past L1; of the source, `source_bytes` are read and the rest is zeros.
__device__ __forceinline__ void copy_async_16(void* to, const void* from,
                                              uint32_t source_bytes = 16 PALMETTE_COMMA_SITE) {
#if defined(PALMETTE_PTX)
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(source_bytes)
               : "memory");
#elif defined(PALMETTE_EMULATED)
  emulator::copy_async(to, from, 16, source_bytes, site);
#else  // has happened when it returns
  *static_cast<uint4*>(to) = source_bytes == 16 ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
  for (uint32_t i = 0; i < source_bytes % 16; ++i)
    static_cast<unsigned char*>(to)[i] = static_cast<const unsigned char*>(from)[i];
#endif
}

__device__ __forceinline__ void commit_copies() {
#if defined(PALMETTE_PTX)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(PALMETTE_EMULATED)
  emulator::commit_copies();
#endif
}

// Until at most `kInFlight` of this thread's groups are on their way. Other threads' copies need a barrier
// too.
template <int kInFlight>
__device__ __forceinline__ void wait_for_copies() {
#if defined(PALMETTE_PTX)
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
#elif defined(PALMETTE_EMULATED)
  emulator::wait_for_copies(kInFlight);
#endif
}

#if defined(PALMETTE_PTX) || defined(PALMETTE_EMULATED)  // the rest has no counterpart under hipcc

// An address in shared memory, to compute with.
#if defined(PALMETTE_PTX)
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#else
using SharedAddress = uintptr_t;
inline SharedAddress shared_address(const void* p) { return reinterpret_cast<uintptr_t>(p); }
#endif

// ---- named barriers

__device__ __forceinline__ void barrier_sync(int id, int threads PALMETTE_COMMA_SITE) {
#if defined(PALMETTE_PTX)
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#elif defined(PALMETTE_EMULATED)
  emulator::wait_at_barrier(id, static_cast<unsigned>(threads), 0, site);
#endif
}

__device__ __forceinline__ void barrier_arrive(int id, int threads PALMETTE_COMMA_SITE) {
#if defined(PALMETTE_PTX)
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#elif defined(PALMETTE_EMULATED)
  emulator::arrive_at_barrier(id, static_cast<unsigned>(threads), site);
#endif
}

// ---- matrices

#if defined(PALMETTE_EMULATED)
namespace definition {

// ldmatrix .x4: lanes 8 i .. 8 i + 7 name the rows of the i-th 8 x 8 matrix of 16-bit elements. Lane l
// receives elements (l / 4, 2 (l % 4)) and the one right of it; transposed, (2 (l % 4), l / 4) and the one
// below.
struct LoadMatrixArgument {
  const void* row;
  uint32_t result[4];
};
template <bool kTransposed>
struct LoadMatrix {
  void operator()(LoadMatrixArgument** arguments, emulator::Thread** lanes, emulator::LaneMask) const {
    uint16_t element[32][8];
    for (int lane = 0; lane < 32; ++lane) {
      const void* row = arguments[lane]->row;
      if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
        emulator::fail("ldmatrix: the row of lane %d is no multiple of 16 bytes", lane);
      if (!emulator::is_shared(row, 16))
        emulator::fail("ldmatrix: the row of lane %d is not in shared memory", lane);
      emulator::note_read(*lanes[lane], row, 16);
      std::memcpy(element[lane], row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        auto at = [&](int row, int column) { return uint32_t{element[8 * matrix + row][column]}; };
        const int major = lane / 4, minor = lane % 4 * 2;
        arguments[lane]->result[matrix] = kTransposed ? at(minor, major) | at(minor + 1, major) << 16
                                                      : at(major, minor) | at(major, minor + 1) << 16;
      }
    }
  }
};

// mma.m16n8k16: D [16, 8] += A [16, 16] B [16, 8]. Lane l holds, with g = l / 4 and t = 2 (l % 4):
//   a[0] (g, t), a[1] (g + 8, t), a[2] (g, t + 8), a[3] (g + 8, t + 8), each with the element right of it
//   b[0] (t, g), b[1] (t + 8, g), each with the element below it
//   d[0] (g, t), d[1] (g, t + 1), d[2] (g + 8, t), d[3] (g + 8, t + 1)
// Sums are exact here and rounded once; tensor cores round otherwise, so results agree to rounding only.
struct MultiplyArgument {
  const uint32_t *a, *b;
  float* d;
};
template <class Widen>
struct Multiply16x8x16 {
  void operator()(MultiplyArgument** arguments, emulator::Thread**, emulator::LaneMask) const {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const MultiplyArgument& x = *arguments[lane];
      const int g = lane / 4, t = lane % 4 * 2;
      for (int half = 0; half < 2; ++half) {
        auto value = [half](uint32_t pair) {
          return Widen{}(static_cast<uint16_t>(half != 0 ? pair >> 16 : pair));
        };
        a[g][t + half] = value(x.a[0]);
        a[g + 8][t + half] = value(x.a[1]);
        a[g][t + 8 + half] = value(x.a[2]);
        a[g + 8][t + 8 + half] = value(x.a[3]);
        b[t + half][g] = value(x.b[0]);
        b[t + 8 + half][g] = value(x.b[1]);
      }
    }
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        float& d = arguments[row % 8 * 4 + column / 2]->d[row / 8 * 2 + column % 2];
        double sum = d;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        d = static_cast<float>(sum);
      }
    }
  }
};
struct WidenBf16 {
  double operator()(uint16_t bits) const { return __uint_as_float(uint32_t{bits} << 16); }
};
struct WidenFp16 {
  double operator()(uint16_t bits) const { return widen_fp16(bits); }
};

}  // namespace definition
#endif

template <bool kTransposed>
__device__ __forceinline__ void load_matrix_x4(uint32_t (&result)[4],
                                               SharedAddress address PALMETTE_COMMA_SITE) {
#if defined(PALMETTE_PTX)
  if (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
                 : "r"(address)
                 : "memory");
  }
#elif defined(PALMETTE_EMULATED)
  definition::LoadMatrixArgument argument{reinterpret_cast<const void*>(address), {}};
  emulator::join_warp(0xFFFFFFFFu, "ldmatrix", true, argument, definition::LoadMatrix<kTransposed>{}, site);
  for (int i = 0; i < 4; ++i) result[i] = argument.result[i];
#endif
}

template <bool kTransposed>
__device__ __forceinline__ void load_matrix_x4(uint32_t (&result)[4], const void* row PALMETTE_COMMA_SITE) {
  load_matrix_x4<kTransposed>(result, shared_address(row) PALMETTE_COMMA_PASS);
}

__device__ __forceinline__ void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1 PALMETTE_COMMA_SITE) {
#if defined(PALMETTE_PTX)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif defined(PALMETTE_EMULATED)
  const uint32_t b[2] = {b0, b1};
  definition::MultiplyArgument argument{a, b, d};
  emulator::join_warp(0xFFFFFFFFu, "mma.bf16", true, argument,
                      definition::Multiply16x8x16<definition::WidenBf16>{}, site);
#endif
}

__device__ __forceinline__ void multiply_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1 PALMETTE_COMMA_SITE) {
#if defined(PALMETTE_PTX)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#elif defined(PALMETTE_EMULATED)
  const uint32_t b[2] = {b0, b1};
  definition::MultiplyArgument argument{a, b, d};
  emulator::join_warp(0xFFFFFFFFu, "mma.fp16", true, argument,
                      definition::Multiply16x8x16<definition::WidenFp16>{}, site);
#endif
}

#endif

}  // namespace palmette::ptx
