// SPDX-License-Identifier: Apache-2.0
// A grid: its blocks in the order of the schedule, each run by one of the workers.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "gpu/emulator/checker.h"

namespace palmette::emulator {

namespace {

constexpr size_t kSharedAlignment = 1024;  // of swizzled layouts

std::vector<unsigned> order_of_blocks(unsigned count) {
  std::vector<unsigned> blocks(count);
  std::iota(blocks.begin(), blocks.end(), 0U);
  if (options().order == Order::reverse) std::reverse(blocks.begin(), blocks.end());
  if (options().order == Order::random) {
    Worker draw;
    draw.random_state = options().seed * 0x9E3779B97F4A7C15ULL + 1;
    for (unsigned i = count; i > 1; --i) std::swap(blocks[i - 1], blocks[draw.random() % i]);
  }
  return blocks;
}

struct Grid {
  dim3 grid, block;
  size_t shared_bytes;
  void (*body)(void*);
  void* context;
  std::vector<unsigned> blocks;
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::string error;  // of the first block, in the order of the schedule, that failed
  std::atomic<size_t> failed{SIZE_MAX};
};

void run_blocks(Grid& g) {
  static thread_local Worker worker;  // keeps its stacks for the next grid
  worker.size = g.block;
  worker.grid = g.grid;
  worker.body = g.body;
  worker.context = g.context;
  worker.shared_storage.resize(g.shared_bytes + kSharedAlignment);
  const auto address = reinterpret_cast<uintptr_t>(worker.shared_storage.data());
  worker.shared =
      worker.shared_storage.data() + (kSharedAlignment - address % kSharedAlignment) % kSharedAlignment;
  worker.shared_bytes = g.shared_bytes;
  for (;;) {
    const size_t i = g.next.fetch_add(1);
    if (i >= g.blocks.size() || i > g.failed) return;
    const unsigned number = g.blocks[i];
    worker.index = {number % g.grid.x, number / g.grid.x % g.grid.y, number / (g.grid.x * g.grid.y)};
    worker.random_state = (options().seed << 32 | number) * 0x9E3779B97F4A7C15ULL + 1;
    std::memset(worker.shared, 0xFF, worker.shared_bytes);  // NaN: nobody has written it yet
    run_block(worker);
    if (worker.error.empty()) continue;
    const std::lock_guard lock(g.mutex);
    if (i < g.failed) g.failed = i, g.error = worker.error;
  }
}

}  // namespace

Options& options() {
  static Options instance;
  return instance;
}

std::recursive_mutex& mutex() {
  static std::recursive_mutex instance;
  return instance;
}

namespace {
bool launching = false;  // under the mutex
}

LaunchScope::LaunchScope(const gpu::LaunchContext& context) : lock_(mutex()) {
  if (launching) throw std::runtime_error("a recorder of launches cannot run operators on the emulator");
  options().workers = context.workers;
  if constexpr (kChecked) {
    forget_buffers();
    for (size_t i = 0; i < context.num_extents; ++i) {
      const gpu::Extent& e = context.extents[i];
      register_buffer(e.data, e.bytes, e.name, e.writable);
    }
  }
  launching = true;
}

LaunchScope::~LaunchScope() { launching = false; }

bool is_shared(const void* address, size_t bytes) {
  const Block& block = *self().block;
  const auto* p = static_cast<const unsigned char*>(address);
  return p >= block.shared && p + bytes <= block.shared + block.shared_bytes;
}

void* shared_memory(size_t bytes) {
  const Block& block = *self().block;
  if (bytes > block.shared_bytes)
    fail("the kernel uses %zu bytes of shared memory, it was launched with %zu", bytes, block.shared_bytes);
  return block.shared;
}

void note_read([[maybe_unused]] Thread& thread, [[maybe_unused]] const void* data,
               [[maybe_unused]] size_t bytes) {
  if constexpr (kChecked) {
    auto& lane = static_cast<RunningThread&>(thread);
    checker::access(lane, data, bytes, Access::read, checker::address_of(lane.site));
  }
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context,
              [[maybe_unused]] size_t context_bytes, const char* name) {
  auto require = [&](bool ok, const char* what) {
    if (!ok) throw std::runtime_error(std::string(name) + ": " + what);
  };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  require(options().warp_size == 32 || options().warp_size == 64, "warp_size must be 32 or 64");
  require(threads > 0 && threads <= kMaxThreads, "a block must have 1 to 1024 threads");
  require(block.z <= 64, "a block must have at most 64 layers of threads");
  require(grid.y <= 65535 && grid.z <= 65535, "a grid must be at most 65535 blocks in y and z");
  require(shared_bytes <= options().shared_limit, "more shared memory than a block may have");
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  require(grid.x <= INT32_MAX && blocks <= INT32_MAX, "a grid must be at most 2^31 - 1 blocks");
  require(blocks > 0, "a grid must have at least one block");

  Grid g;
  g.grid = grid, g.block = block, g.shared_bytes = shared_bytes;
  g.body = body, g.context = context;
  g.blocks = order_of_blocks(static_cast<unsigned>(blocks));
  if constexpr (kChecked) checker::start_grid(context, context_bytes);
  const auto workers = kChecked ? 1 : static_cast<size_t>(std::max(1, options().workers));
  if (workers == 1 || blocks == 1) {
    run_blocks(g);
  } else {
    std::vector<std::thread> pool;
    pool.reserve(workers);
    for (size_t i = 0; i < std::min<size_t>(workers, blocks); ++i) pool.emplace_back([&g] { run_blocks(g); });
    for (std::thread& thread : pool) thread.join();
  }
  require(g.error.empty(), g.error.c_str());
}

}  // namespace palmette::emulator
