// SPDX-License-Identifier: Apache-2.0
// Control flow: divergence, loops of different lengths, switches, early returns, calls; and memory.
#include "gpu/gpu.cuh"
#include "gpu/ptx.cuh"

namespace gpu = palmette::gpu;

// Steps of the Collatz sequence; lanes leave the loop at different times and meet again.
extern "C" __global__ void collatz(const int* start, int* steps, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  long long value = start[i];
  int count = 0;
  while (value != 1) {
    if (value % 2 == 0) {
      value /= 2;
    } else {
      value = 3 * value + 1;
    }
    ++count;
  }
  const unsigned together = __ballot_sync(__activemask(), count % 2 == 0);
  steps[i] = count * 2 + (together >> (threadIdx.x % 32) & 1);
}

__device__ __noinline__ int twice_or_square(int x, bool square) { return square ? x * x : 2 * x; }

struct Pair {
  float first;
  double second;
};

__device__ __noinline__ Pair swap(Pair pair, float scale) {
  return {static_cast<float>(pair.second) * scale, static_cast<double>(pair.first) * scale};
}

extern "C" __global__ void calls(const int* x, int* out, double* pairs) {
  const int i = threadIdx.x;
  int result;
  if (i % 3 == 0) {
    result = twice_or_square(x[i], true);
  } else {
    result = twice_or_square(x[i], i % 3 == 1) + 1;
  }
  out[i] = result;
  const Pair swapped = swap({static_cast<float>(i), i * 0.5}, 2.0f);
  pairs[i * 2] = swapped.first;
  pairs[i * 2 + 1] = swapped.second;
}

extern "C" __global__ void cases(const int* x, int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  int r = out[i];
  switch (x[i]) {
    case 0:
      r = r * 3 + 1;
      break;
    case 1:
      r ^= 0x55;
      break;
    case 2:
      r = -r;
      [[fallthrough]];
    case 3:
      r += 100;
      break;
    case 4:
      r <<= 3;
      break;
    case 5:
      r = r / 7;
      break;
    case 6:
      r = r % 11;
      break;
    case 7:
      r = r * r;
      break;
    default:
      r = 12345;
  }
  out[i] = r;
}

struct Settings {
  int length;
  float scale[3];
  const float* data;
  unsigned char flags[5];
  short step;
};

// A struct by value, an index into it that is not constant, an array in local memory.
extern "C" __global__ void by_value(Settings settings, float* out, int rotate) {
  const int i = threadIdx.x;
  float local[16];
  for (int j = 0; j < 16; ++j)
    local[(j * 5 + rotate) % 16] = settings.data[(i + j * settings.step) % settings.length];
  float sum = 0;
  for (int j = 0; j < 16; ++j) sum += local[(j + i) % 16] * (j < 8 ? 1.0f : -1.0f);
  out[i] = sum * settings.scale[i % 3] + settings.flags[i % 5];
}

__constant__ int table[5] = {3, 1, 4, 1, 5};
__device__ unsigned launches = 7;

extern "C" __global__ void variables(int* out) {
  __shared__ int sums[64];
  __shared__ short halves[64];
  const int i = threadIdx.x;
  sums[i] = table[i % 5] * i;
  halves[i] = static_cast<short>(-i);
  __syncthreads();
  out[i] = sums[63 - i] + halves[(i + 1) % 64];
  if (i == 0) launches += 1;
  __syncthreads();
  if (i == 1) out[1] = static_cast<int>(launches);
}

// Accesses of 1 to 16 bytes.
extern "C" __global__ void widths(const unsigned char* from, unsigned char* to) {
  const int i = threadIdx.x;
  to[i] = from[i] + 1;
  reinterpret_cast<signed char*>(to + 64)[i] = reinterpret_cast<const signed char*>(from)[63 - i] >> 1;
  reinterpret_cast<short*>(to + 128)[i] = static_cast<short>(reinterpret_cast<const short*>(from)[i] * 3);
  reinterpret_cast<long long*>(to + 256)[i] = reinterpret_cast<const long long*>(from)[i % 8] - i;
  const int4 quad = gpu::load(reinterpret_cast<const int4*>(from) + i % 4);
  gpu::store(reinterpret_cast<int4*>(to + 768) + i, make_int4(quad.w, quad.z, quad.y, quad.x + i));
}

extern "C" __global__ void misaligned(const unsigned char* from, int* to, int offset) {
  to[threadIdx.x] = *reinterpret_cast<const int*>(from + threadIdx.x * 4 + offset);
}

extern "C" __global__ void copy(const int* from, int* to, int offset) {
  const int i = threadIdx.x;
  to[i] = from[i + offset];
}
