// SPDX-License-Identifier: Apache-2.0
// palmette_emulator: small GPU kernels, correct ones and defective ones, and the emulator that must tell them
// apart. run(kernel, n, grid, block, output) launches kernel(int* output, int n).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "gpu/emulator/checker.h"
#include "gpu/emulator/options.h"
#include "gpu/emulator/requests.h"
#include "gpu/ptx.cuh"

namespace py = pybind11;
using namespace palmette;
using gpu::bf16;

namespace {

constexpr uint64_t kAll = ~uint64_t{0};
constexpr unsigned kWarp = 0xFFFFFFFFu;

struct Numbers {
  int x[256];
  int count;
};

__device__ int thread() { return static_cast<int>(threadIdx.x); }

#define KERNEL(name) __global__ void name([[maybe_unused]] int* out, [[maybe_unused]] int n)

// ---- correct, if unusual

KERNEL(indices) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned inner = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned at = block * blockDim.x * blockDim.y * blockDim.z + inner;
  out[at] = static_cast<int>(at);
}
KERNEL(some_return_early) {  // who has returned is not waited for
  if (thread() >= n) return;
  __syncthreads();
  out[thread()] = __syncthreads_count(1);
}
KERNEL(votes) {
  out[3 * thread()] = __syncthreads_or(thread() == 5);
  out[3 * thread() + 1] = __syncthreads_and(thread() < n);
  out[3 * thread() + 2] = __syncthreads_count(thread() % 3 == 0);
}
KERNEL(trips_differ_by_warp) {
  int value = thread();
  for (int i = 0; i <= thread() / 32; ++i) value += __shfl_xor_sync(kAll, value, 1);
  out[thread()] = value;
}
KERNEL(shuffles) {
  int* row = out + 4 * thread();
  row[0] = __shfl_sync(kAll, thread(), 3, 8);
  row[1] = __shfl_up_sync(kAll, thread(), 2, 8);
  row[2] = __shfl_down_sync(kAll, thread(), 2, 8);
  row[3] = static_cast<int>(__shfl_xor_sync(kAll, static_cast<double>(thread()), 5));
}
KERNEL(half_warps_apart) {  // two instructions at once, each with its own lanes
  if (thread() % 32 < 16) {
    out[thread()] = __shfl_xor_sync(0xFFFFu, thread(), 8);
  } else {
    out[thread()] = __shfl_xor_sync(0xFFFF0000u, thread(), 4);
  }
}
KERNEL(warp_votes) {
  int* row = out + 5 * thread();
  row[0] = __reduce_add_sync(kAll, thread());
  row[1] = __reduce_max_sync(kAll, -thread());
  row[2] = __popcll(__ballot_sync(kAll, thread() % 2));
  row[3] = __any_sync(kAll, thread() == 40);
  row[4] = __all_sync(kAll, thread() < n);
}
KERNEL(whole_warp) {  // as many lanes as a warp has
  int value = thread();
  for (int step = warpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  out[thread()] = value;
}
KERNEL(tree_sum) {
  auto& s = gpu::shared<Numbers>();
  if (thread() < 256) s.x[thread()] = 1;
  for (int half = 128; half > 0; half /= 2) {
    __syncthreads();
    if (thread() < half) s.x[thread()] += s.x[thread() + half];
  }
  __syncthreads();
  out[thread()] = s.x[0];
}
KERNEL(atomics) {
  atomicAdd(&out[0], thread());
  atomicMax(&out[1], thread());
  atomicOr(&out[2], 1 << thread() % 31);
  auto& s = gpu::shared<Numbers>();
  if (thread() == 0) s.count = 0;
  __syncthreads();
  atomicAdd(&s.count, 1);
  __syncthreads();
  if (thread() == 0) atomicAdd(&out[3], s.count);
}
KERNEL(last_block_sums) {  // each block publishes, the last one to come reads
  auto& s = gpu::shared<Numbers>();
  out[2 + blockIdx.x * blockDim.x + threadIdx.x] = thread() + 1;
  __threadfence();
  __syncthreads();
  if (thread() == 0) s.count = static_cast<int>(atomicInc(reinterpret_cast<unsigned*>(out), gridDim.x - 1));
  __syncthreads();
  if (s.count != static_cast<int>(gridDim.x) - 1 || thread() != 0) return;
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) sum += out[2 + i];
  out[1] = sum;
}
KERNEL(producers_and_consumers) {  // warp 0 fills, the other warps read; two named barriers
  auto& s = gpu::shared<Numbers>();
  const int all = static_cast<int>(blockDim.x);
  int sum = 0;
  for (int round = 0; round < n; ++round) {
    if (thread() < 32) {
      s.x[thread()] = round * 100 + thread();
      ptx::barrier_arrive(1, all);
      ptx::barrier_sync(2, all);
    } else {
      ptx::barrier_sync(1, all);
      sum += s.x[thread() % 32];
      ptx::barrier_arrive(2, all);
    }
  }
  out[thread()] = sum;
}
KERNEL(copies_in_two_stages) {
  auto& s = gpu::shared<Numbers>();
  auto ask = [&](int stage) {
    if (stage < n) ptx::copy_async_16(&s.x[stage % 2 * 128 + 4 * thread()], out + 128 * stage + 4 * thread());
    ptx::commit_copies();
  };
  ask(0);
  int sum = 0;
  for (int stage = 0; stage < n; ++stage) {
    ask(stage + 1);
    ptx::wait_for_copies<1>();
    __syncthreads();
    sum += s.x[stage % 2 * 128 + (4 * thread() + 64) % 128];
    __syncthreads();
  }
  ptx::wait_for_copies<0>();
  out[128 * n + thread()] = sum;
}
KERNEL(copy_of_a_part) {
  auto& s = gpu::shared<Numbers>();
  ptx::copy_async_16(&s.x[4 * thread()], out + 4 * thread(), static_cast<uint32_t>(n));
  ptx::commit_copies();
  ptx::wait_for_copies<0>();
  for (int i = 0; i < 4; ++i) out[4 * thread() + i] = s.x[4 * thread() + i];
}

// ---- defective

KERNEL(lanes_part_in_a_shuffle) {
  if (thread() % 2 == 0) {
    out[thread()] = __shfl_xor_sync(kAll, thread(), 2);
  } else {
    out[thread()] = __shfl_xor_sync(kAll, thread(), 4);
  }
}
KERNEL(a_lane_is_missing) {
  if (thread() != 5) {
    out[thread()] = __shfl_xor_sync(kAll, thread(), 2);
  } else {
    __syncthreads();
  }
}
KERNEL(reads_an_absent_lane) {
  if (thread() < 16) out[thread()] = __shfl_xor_sync(0xFFFFu, thread(), 16);
}
KERNEL(mask_without_the_caller) { out[thread()] = __shfl_xor_sync(0xFFFFu, thread(), 1); }
KERNEL(barrier_in_two_branches) {
  if (thread() < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[thread()] = 0;
}
KERNEL(barrier_of_a_few) {
  if (thread() < 32) ptx::barrier_sync(1, 64);
  __syncthreads();
}
KERNEL(barrier_counts_differ) { ptx::barrier_sync(1, thread() < 32 ? 64 : 96); }
KERNEL(barrier_of_half_a_warp) { ptx::barrier_sync(1, 48); }
KERNEL(barrier_beyond_15) { ptx::barrier_sync(16, 64); }
KERNEL(more_shared_memory_than_launched) { gpu::shared<int[100000]>()[thread()] = 0; }
KERNEL(copy_never_waited_for) {
  ptx::copy_async_16(&gpu::shared<Numbers>().x[4 * (thread() % 64)], out);
  ptx::commit_copies();
}
KERNEL(copy_outside_shared) {
  alignas(16) int local[4];
  ptx::copy_async_16(local, out);
}
KERNEL(copy_misaligned) { ptx::copy_async_16(&gpu::shared<Numbers>().x[1], out); }
KERNEL(copy_read_too_early) {  // wrong numbers, as on a device at times: NaN and -1 here, always
  auto& s = gpu::shared<Numbers>();
  ptx::copy_async_16(&s.x[4 * thread()], out + 4 * thread());
  ptx::commit_copies();
  ptx::wait_for_copies<1>();
  const int early = s.x[4 * thread()];
  ptx::wait_for_copies<0>();
  out[4 * thread()] = early;
}
KERNEL(matrix_of_a_part_of_a_warp) {
  auto& s = gpu::shared<Numbers>();
  uint32_t r[4];
  if (thread() % 32 >= 8) return;
  __syncwarp(0xFF);
  ptx::load_matrix_x4<false>(r, &s.x[0]);
  out[thread()] = static_cast<int>(r[0]);
}
KERNEL(matrix_row_misaligned) {
  uint32_t r[4];
  ptx::load_matrix_x4<false>(r, &gpu::shared<Numbers>().x[1]);
}
KERNEL(matrix_row_not_shared) {
  uint32_t r[4];
  ptx::load_matrix_x4<false>(
      r, reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(out) & ~uintptr_t{15}));
}

// ---- defective, as the check build sees

KERNEL(reads_what_nobody_wrote) {
  auto& s = gpu::shared<Numbers>();
  if (thread() < 63) s.x[thread()] = 1;
  __syncthreads();
  out[thread()] = s.x[thread()];
}
KERNEL(no_barrier) {
  auto& s = gpu::shared<Numbers>();
  s.x[thread()] = 1;
  out[thread()] = s.x[thread() ^ 32];
}
KERNEL(no_sync_in_a_warp) {
  auto& s = gpu::shared<Numbers>();
  s.x[thread()] = 1;
  out[thread()] = s.x[thread() ^ 1];
}
KERNEL(shuffles_order_no_memory) {
  auto& s = gpu::shared<Numbers>();
  s.x[thread()] = 1;
  const int value = __shfl_xor_sync(kAll, thread(), 1);
  out[thread()] = value + s.x[thread() ^ 1];
}
KERNEL(written_while_read) {
  auto& s = gpu::shared<Numbers>();
  s.x[thread()] = 1;
  __syncthreads();
  const int value = s.x[(thread() + 32) % 64];
  s.x[thread()] = 2;
  out[thread()] = value;
}
KERNEL(counted_without_atomics) {
  auto& s = gpu::shared<Numbers>();
  if (thread() == 0) s.count = 0;
  __syncthreads();
  s.count += 1;
  __syncthreads();
  out[thread()] = s.count;
}
KERNEL(sync_of_other_lanes) {  // each half of a warp on its own, and a look into the other half
  auto& s = gpu::shared<Numbers>();
  s.x[thread()] = 1;
  __syncwarp(thread() % 32 < 16 ? 0xFFFFu : 0xFFFF0000u);
  out[thread()] = s.x[thread() ^ 16];
}
KERNEL(copy_seen_by_others_too_early) {  // waited for by the thread that asked, no barrier after
  auto& s = gpu::shared<Numbers>();
  ptx::copy_async_16(&s.x[4 * thread()], out + 4 * thread());
  ptx::commit_copies();
  ptx::wait_for_copies<0>();
  const int value = s.x[4 * (thread() ^ 32)];
  __syncthreads();
  out[thread()] = value;
}
KERNEL(beyond_shared) {
  auto& s = gpu::shared<Numbers>();
  (&s.count)[thread()] = 0;
}
KERNEL(beyond_a_buffer) { out[96 + thread()] = 0; }
KERNEL(misaligned_pair) {
  if (thread() == 0)
    *reinterpret_cast<int2*>(out + 1 - reinterpret_cast<uintptr_t>(out) / 4 % 2) = make_int2(1, 2);
}
KERNEL(local_of_another_thread) {
  auto& s = gpu::shared<int* [64]>();
  int mine[2] = {thread(), n};
  s[thread()] = mine;
  __syncthreads();
  out[thread()] = *static_cast<volatile int*>(s[thread() ^ 1]);
  __syncthreads();
}
KERNEL(blocks_write_the_same) { out[thread()] = static_cast<int>(blockIdx.x); }
KERNEL(last_block_without_atomics) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = thread();
  __syncthreads();
  if (thread() == 0) {
    int sum = 0;
    for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) sum += *static_cast<volatile int*>(out + i);
    out[blockIdx.x * blockDim.x] = sum;
  }
}
KERNEL(index_beyond_an_array) {
  volatile int values[4] = {1, 2, 3, 4};
  out[thread()] = values[thread() & 7];
}
KERNEL(shift_too_far) { out[thread()] = 1 << (n + thread()); }
KERNEL(barrier_without_arrivals) {  // the producer forgets to arrive before it waits
  auto& s = gpu::shared<Numbers>();
  if (thread() < 32) {
    ptx::barrier_arrive(1, 64);
    s.x[thread()] = thread();
  } else {
    ptx::barrier_sync(1, 64);
    out[thread()] = s.x[thread() % 32];
  }
}
KERNEL(sync_in_a_warp) {
  auto& s = gpu::shared<Numbers>();
  int value = 0;
  for (int i = 0; i < n; ++i) {
    s.x[thread()] = i + thread();
    __syncwarp();
    value = s.x[thread() ^ 1];
    __syncwarp();
  }
  out[thread()] = value;
}

KERNEL(
    strides) {  // a write and three reads of shared memory: `n` words apart, all of one word, and of 8 lanes
  auto& s = gpu::shared<Numbers>();
  s.x[thread() * n % 256] = thread();
  __syncthreads();
  out[thread() * n % 256] = s.x[thread() * n % 256] + s.x[0];
  if (thread() < 8) out[256 + thread()] = s.x[thread() * n];
}
KERNEL(quads) {  // 16 bytes a lane, `n` words apart
  auto& s = gpu::shared<Numbers>();
  ptx::copy_async_16(&s.x[thread() * n % 256], out + 4 * thread());
  ptx::commit_copies();
  ptx::wait_for_copies<0>();
}

struct Entry {
  const char* name;
  void (*kernel)(int*, int);
};
#define ENTRY(name) {#name, name}
constexpr Entry kKernels[] = {
    ENTRY(indices),
    ENTRY(some_return_early),
    ENTRY(votes),
    ENTRY(trips_differ_by_warp),
    ENTRY(shuffles),
    ENTRY(half_warps_apart),
    ENTRY(warp_votes),
    ENTRY(whole_warp),
    ENTRY(tree_sum),
    ENTRY(atomics),
    ENTRY(last_block_sums),
    ENTRY(producers_and_consumers),
    ENTRY(copies_in_two_stages),
    ENTRY(copy_of_a_part),
    ENTRY(lanes_part_in_a_shuffle),
    ENTRY(a_lane_is_missing),
    ENTRY(reads_an_absent_lane),
    ENTRY(mask_without_the_caller),
    ENTRY(barrier_in_two_branches),
    ENTRY(barrier_of_a_few),
    ENTRY(barrier_counts_differ),
    ENTRY(barrier_of_half_a_warp),
    ENTRY(barrier_beyond_15),
    ENTRY(more_shared_memory_than_launched),
    ENTRY(copy_never_waited_for),
    ENTRY(copy_outside_shared),
    ENTRY(copy_misaligned),
    ENTRY(copy_read_too_early),
    ENTRY(matrix_of_a_part_of_a_warp),
    ENTRY(reads_what_nobody_wrote),
    ENTRY(no_barrier),
    ENTRY(no_sync_in_a_warp),
    ENTRY(shuffles_order_no_memory),
    ENTRY(written_while_read),
    ENTRY(counted_without_atomics),
    ENTRY(sync_of_other_lanes),
    ENTRY(copy_seen_by_others_too_early),
    ENTRY(beyond_shared),
    ENTRY(beyond_a_buffer),
    ENTRY(misaligned_pair),
    ENTRY(local_of_another_thread),
    ENTRY(blocks_write_the_same),
    ENTRY(last_block_without_atomics),
    ENTRY(index_beyond_an_array),
    ENTRY(shift_too_far),
    ENTRY(barrier_without_arrivals),
    ENTRY(sync_in_a_warp),
    ENTRY(strides),
    ENTRY(quads),
    ENTRY(matrix_row_misaligned),
    ENTRY(matrix_row_not_shared),
};

emulator::BufferTraffic last_traffic{};  // of `out`, in the check build

using Size = std::tuple<unsigned, unsigned, unsigned>;
dim3 size_of(const Size& s) { return {std::get<0>(s), std::get<1>(s), std::get<2>(s)}; }

std::vector<int> run(const std::string& name, int n, const Size& grid, const Size& block,
                     std::vector<int> out) {
  // as torch's memory, at a multiple of 64 bytes
  std::vector<int> storage(out.size() + 16);
  const auto address = reinterpret_cast<uintptr_t>(storage.data());
  int* data = storage.data() + (64 - address % 64) % 64 / sizeof(int);
  std::copy(out.begin(), out.end(), data);
  for (const Entry& entry : kKernels) {
    if (name != entry.name) continue;
    if constexpr (emulator::kChecked) {
      emulator::forget_buffers();
      emulator::register_buffer(data, out.size() * sizeof(int), "out", true);
    }
    gpu::launch(entry.name, entry.kernel, size_of(grid), size_of(block), sizeof(Numbers), {}, data, n);
    if constexpr (emulator::kChecked) last_traffic = *emulator::traffic_of("out");
    std::copy_n(data, out.size(), out.begin());
    return out;
  }
  throw py::key_error("no such kernel: " + name);
}

// ---- matrices: a [16, 16] times b [16, 8], each through ldmatrix and mma

struct Matrices {
  uint16_t a[16][16], b[16][8];
};

template <bool kHalf>
__global__ void product(const uint16_t* a, const uint16_t* b, float* d) {
  auto& s = gpu::shared<Matrices>();
  const int lane = thread();
  for (int i = lane; i < 256; i += 32) s.a[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) s.b[i / 8][i % 8] = b[i];
  __syncwarp();
  uint32_t fa[4], fb[4];
  ptx::load_matrix_x4<false>(fa, &s.a[lane % 16][lane / 16 * 8]);
  ptx::load_matrix_x4<true>(fb, &s.b[lane % 16][0]);
  const int row = lane / 4, column = lane % 4 * 2;
  float sum[4] = {d[row * 8 + column], d[row * 8 + column + 1], d[(row + 8) * 8 + column],
                  d[(row + 8) * 8 + column + 1]};
  if constexpr (kHalf) {
    ptx::multiply_fp16(sum, fa, fb[0], fb[1]);
  } else {
    ptx::multiply_bf16(sum, fa, fb[0], fb[1]);
  }
  d[row * 8 + column] = sum[0], d[row * 8 + column + 1] = sum[1];
  d[(row + 8) * 8 + column] = sum[2], d[(row + 8) * 8 + column + 1] = sum[3];
}

void multiply(bool half, const py::buffer& a, const py::buffer& b, const py::buffer& d) {
  const auto *from_a = static_cast<const uint16_t*>(a.request().ptr),
             *from_b = static_cast<const uint16_t*>(b.request().ptr);
  auto* to = static_cast<float*>(d.request(true).ptr);
  if constexpr (emulator::kChecked) {
    emulator::forget_buffers();
    emulator::register_buffer(from_a, 256 * sizeof(uint16_t), "a", false);
    emulator::register_buffer(from_b, 128 * sizeof(uint16_t), "b", false);
    emulator::register_buffer(to, 128 * sizeof(float), "d", true);
  }
  gpu::launch("product", half ? product<true> : product<false>, dim3(1), dim3(32), sizeof(Matrices), {},
              from_a, from_b, to);
}

void configure(const std::string& order, uint64_t seed, int workers, int warp_size, bool count_requests) {
  using emulator::Order;
  emulator::Options& o = emulator::options();
  o.order = order == "forward" ? Order::forward : order == "reverse" ? Order::reverse : Order::random;
  o.seed = seed;
  o.workers = workers;
  o.warp_size = warp_size;
  o.count_requests = count_requests;
}

}  // namespace

PYBIND11_MODULE(PALMETTE_MODULE, m) {
  m.attr("checked") = emulator::kChecked;
  m.def("configure", &configure, py::arg("order"), py::arg("seed"), py::arg("workers"), py::arg("warp_size"),
        py::arg("count_requests") = false);
  m.def("run", &run, py::call_guard<py::gil_scoped_release>());
  m.def("multiply", &multiply);
  m.def("traffic", [] {
    return py::make_tuple(last_traffic.bytes_read, last_traffic.bytes_written, last_traffic.bytes_atomic);
  });
  if constexpr (emulator::kChecked) {
    m.def("sectors", [] {
      const emulator::BufferTraffic& t = last_traffic;
      return py::make_tuple(t.read_requests, t.read_sectors, t.write_requests, t.write_sectors);
    });
    m.def("wavefronts", [] {
      const auto& shared = emulator::requests::shared();
      return py::make_tuple(shared.requests, shared.wavefronts, shared.least);
    });
  }
}
