// SPDX-License-Identifier: Apache-2.0
#include "gpu/emulator/checker.h"

#include "gpu/emulator/requests.h"

#if PALMETTE_EMULATOR_CHECK

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <set>
#include <string>

namespace palmette::emulator {

namespace {

// What is known of a byte, or of a word. Readers of two warps are kept, by warp and lane.
struct Cell {
  uint32_t write_epoch = 0, write_clock = 0, write_block = 0;
  uint16_t writer = 0;
  bool written = false, in_flight = false, by_atomic = false;
  uint32_t read_epoch[2] = {}, read_clock[2] = {};
  uint16_t read_warp[2] = {};
  LaneMask readers[2] = {};
  const void *write_address = nullptr, *read_address[2] = {};
};

// The cells of some memory. A word of 4 bytes that was only ever accessed as a whole has one, its first.
class Shadow {
 public:
  void reset(size_t bytes) {
    cells_.assign((bytes + 3) / 4 * 4, Cell{});
    is_split_.assign(cells_.size() / 4, 0);
  }
  // f(cell, offset) for the cells of [offset, offset + bytes).
  template <class F>
  void visit(size_t offset, size_t bytes, F f) {
    for (const size_t end = offset + bytes; offset < end;) {
      const size_t word = offset / 4;
      const bool whole = offset % 4 == 0 && end - offset >= 4 && is_split_[word] == 0;
      if (!whole && is_split_[word] == 0) {
        is_split_[word] = 1;
        for (size_t i = 1; i < 4; ++i) cells_[4 * word + i] = cells_[4 * word];
      }
      f(cells_[offset], offset);
      offset += whole ? 4 : 1;
    }
  }

 private:
  std::vector<Cell> cells_;
  std::vector<char> is_split_;  // by word
};

struct Buffer {
  std::string name;
  const char* data;
  size_t bytes;
  bool writable;
  Shadow shadow;  // of writable buffers
  BufferTraffic traffic{};
};

struct {
  std::vector<Buffer> buffers;  // may overlap: views of one storage
  Shadow shared;
  std::vector<uint32_t> clocks;                   // [threads][threads]: what each knows of each
  std::vector<uint32_t> snapshots[kMaxBarriers];  // joined clocks of those who only arrived
  size_t threads = 0;
  uint32_t epoch = 0, block = 0, first_block = 0;
  bool acquired = false;  // the block has done an atomic on global memory
  const char* context = nullptr;
  size_t context_bytes = 0;
} state;

const std::string kSharedName = "shared memory";

std::set<std::pair<const char*, int>> sites;  // sites in place of code addresses

uint32_t* clocks_of(unsigned thread) { return state.clocks.data() + thread * state.threads; }
uint32_t& own_clock(const RunningThread& thread) { return clocks_of(thread.number)[thread.number]; }

}  // namespace

// ---- reports

std::string checker::place(const void* address) {
  if (address == nullptr) return "an instruction";
  for (const auto& site : sites) {
    if (&site == address) return text_of({site.first, site.second});
  }
  Dl_info info{};
  if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) return "?";
  char command[1024];
  const auto offset =
      static_cast<size_t>(static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase)) - 1;
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  std::string found;
  if (FILE* output = popen(command, "r")) {  // NOLINT(bugprone-command-processor): a tool of the compiler's
    char line[1024];
    while (found.empty() && std::fgets(line, sizeof line, output) != nullptr) {
      std::string text(line);
      text.erase(text.find_last_not_of('\n') + 1);
      text.erase(0, text.rfind('/') + 1);
      text.erase(std::min(text.find(" ("), text.size()));
      // the innermost line that is no helper of ours
      const bool helper = text.starts_with("language.h") || text.starts_with("atomics.h") ||
                          text.starts_with("warp.h") || text.starts_with("emulated.h") ||
                          text.starts_with("gpu.cuh") || text.starts_with('?');
      if (!helper) found = text;
    }
    pclose(output);
  }
  if (!found.empty()) return found;
  std::snprintf(command, sizeof command, "code+0x%zx", offset);
  return command;
}

const void* checker::address_of(Site site) { return &*sites.emplace(site.file, site.line).first; }

namespace {

using checker::place;

const char* word(Access kind) {
  return kind == Access::read ? "read" : kind == Access::write ? "write" : "atomic";
}

[[noreturn]] void report(const char* what, Access kind, const std::string& object, size_t offset,
                         const void* address) {
  fail("%s: %s of %s+%zu at %s", what, word(kind), object.c_str(), offset, place(address).c_str());
}

[[noreturn]] void report_race(const char* what, Access kind, const std::string& object, size_t offset,
                              const void* address, unsigned other, const void* other_address) {
  fail("%s: %s of %s+%zu at %s, thread %u at %s", what, word(kind), object.c_str(), offset,
       place(address).c_str(), other, place(other_address).c_str());
}

// ---- one cell

bool ordered(const RunningThread& thread, unsigned other, uint32_t clock) {
  return other == thread.number || clocks_of(thread.number)[other] >= clock;
}

void check_cell(RunningThread& thread, Cell& cell, Access kind, const void* address,
                const std::string& object, size_t offset, bool is_global) {
  if (cell.in_flight) report("a cp.async is in flight", kind, object, offset, address);
  if (!is_global && kind != Access::write && !cell.written)
    report("uninitialised memory", kind, object, offset, address);
  const bool both_atomic = kind == Access::atomic && cell.by_atomic;
  if (cell.write_epoch == state.epoch && !both_atomic && !ordered(thread, cell.writer, cell.write_clock))
    report_race("data race", kind, object, offset, address, cell.writer, cell.write_address);
  if (is_global && cell.write_block > state.first_block && cell.write_block != state.block && !both_atomic &&
      !(kind == Access::read && state.acquired))
    report_race("race between blocks", kind, object, offset, address, cell.writer, cell.write_address);
  const auto warp = static_cast<uint16_t>(thread.warp->number);
  if (kind == Access::read) {
    const bool known = cell.read_epoch[0] == state.epoch && cell.read_warp[0] == warp &&
                       cell.read_clock[0] >= own_clock(thread) && (cell.readers[0] >> thread.lane & 1) != 0;
    if (known) return;
    const bool second = cell.read_epoch[0] == state.epoch && cell.read_warp[0] != warp;
    const int k = second ? 1 : 0;
    const uint32_t clock = own_clock(thread);
    if (cell.read_epoch[k] != state.epoch || cell.read_warp[k] != warp || cell.read_clock[k] < clock) {
      cell.read_epoch[k] = state.epoch, cell.read_warp[k] = warp;
      cell.read_clock[k] = clock, cell.readers[k] = 0;
    }
    cell.readers[k] |= LaneMask{1} << thread.lane;
    cell.read_address[k] = address;
    return;
  }
  for (int k = 0; k < 2; ++k) {
    if (cell.read_epoch[k] != state.epoch) continue;
    for (LaneMask left = cell.readers[k]; left != 0; left &= left - 1) {
      const unsigned reader = cell.read_warp[k] * static_cast<unsigned>(warp_size()) +
                              static_cast<unsigned>(std::countr_zero(left));
      if (!ordered(thread, reader, cell.read_clock[k]))
        report_race("data race", kind, object, offset, address, reader, cell.read_address[k]);
    }
  }
  cell.write_epoch = state.epoch, cell.write_clock = own_clock(thread), cell.write_block = state.block;
  cell.writer = static_cast<uint16_t>(thread.number);
  cell.written = true, cell.by_atomic = kind == Access::atomic;
  cell.write_address = address;
}

// The first buffer that holds all of it; consecutive accesses are mostly to the same one.
Buffer* find_buffer(const char* data, size_t bytes) {
  static Buffer* last = nullptr;
  const auto holds = [&](const Buffer& b) { return data >= b.data && data + bytes <= b.data + b.bytes; };
  const auto begin = state.buffers.data(), end = begin + state.buffers.size();
  if (last >= begin && last < end && holds(*last)) return last;
  last = std::find_if(begin, end, holds);
  return last == end ? nullptr : last;
}

// Read-only segments of loaded modules: constant tables. The one found last is mostly the next one too.
bool is_constant(const char* data) {
  struct Search {
    const char* data;
    const char *begin, *end;
  };
  static Search last{nullptr, nullptr, nullptr};
  if (data >= last.begin && data < last.end) return true;
  Search search{data, nullptr, nullptr};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* context) {
        auto& s = *static_cast<Search*>(context);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          const auto* begin = reinterpret_cast<const char*>(
              info->dlpi_addr + segment.p_vaddr);  // NOLINT(performance-no-int-to-ptr)
          if (segment.p_type == PT_LOAD && (segment.p_flags & PF_W) == 0 && s.data >= begin &&
              s.data < begin + segment.p_memsz)
            s.begin = begin, s.end = begin + segment.p_memsz;
        }
        return 0;
      },
      &search);
  if (search.begin != nullptr) last = search;
  return search.begin != nullptr;
}

void check_alignment(const void* data, size_t bytes, Access kind, const std::string& object, size_t offset,
                     const void* address) {
  if (bytes <= 16 && std::has_single_bit(bytes) && reinterpret_cast<uintptr_t>(data) % bytes != 0)
    report("misaligned", kind, object, offset, address);
}

}  // namespace

void register_buffer(const void* data, size_t bytes, const char* name, bool writable) {
  Buffer buffer{name, static_cast<const char*>(data), bytes, writable, {}, {}};
  if (writable) buffer.shadow.reset(bytes);
  state.buffers.push_back(std::move(buffer));
}
void forget_buffers() {
  state.buffers.clear();
  requests::shared() = {};
}
const BufferTraffic* traffic_of(const char* name) {
  for (const Buffer& buffer : state.buffers) {
    if (buffer.name == name) return &buffer.traffic;
  }
  return nullptr;
}

namespace checker {

void start_grid(const void* context, size_t context_bytes) {
  state.context = static_cast<const char*>(context);
  state.context_bytes = context_bytes;
  state.first_block = state.block;
}

void start_block(Worker& worker) {
  state.threads = worker.threads.size();
  state.clocks.assign(state.threads * state.threads, 0);
  for (const RunningThread& thread : worker.threads) own_clock(thread) = 1;
  state.shared.reset(worker.shared_bytes);
  for (auto& snapshot : state.snapshots) snapshot.clear();
  ++state.epoch;
  ++state.block;
  state.acquired = false;
}

void access(RunningThread& thread, const void* where, size_t bytes, Access kind, const void* address) {
  const auto* data = static_cast<const char*>(where);
  Worker& worker = worker_of(thread);
  if (worker.stacks.holds(data)) {
    if (worker.stacks.owner(data) == thread.number) return;
    fail("%s of another thread's local memory at %s", word(kind), place(address).c_str());
  }
  const auto* shared = reinterpret_cast<const char*>(worker.shared);
  if (data >= shared && data < shared + worker.shared_bytes) {
    const auto offset = static_cast<size_t>(data - shared);
    if (offset + bytes > worker.shared_bytes) report("out of bounds", kind, "shared memory", offset, address);
    check_alignment(data, bytes, kind, "shared memory", offset, address);
    state.shared.visit(offset, bytes, [&](Cell& cell, size_t at) {
      check_cell(thread, cell, kind, address, kSharedName, at, false);
    });
    if (options().count_requests) requests::note(thread, data, bytes, kind, address, nullptr);
    return;
  }
  const bool in_context = data >= state.context && data + bytes <= state.context + state.context_bytes;
  if (kind == Access::read && in_context) return;
  if (Buffer* buffer = find_buffer(data, bytes)) {
    const auto offset = static_cast<size_t>(data - buffer->data);
    check_alignment(data, bytes, kind, buffer->name, offset, address);
    if (kind != Access::read && !buffer->writable)
      report("read-only buffer", kind, buffer->name, offset, address);
    BufferTraffic& traffic = buffer->traffic;
    (kind == Access::read    ? traffic.bytes_read
     : kind == Access::write ? traffic.bytes_written
                             : traffic.bytes_atomic) += bytes;
    if (options().count_requests) requests::note(thread, data, bytes, kind, address, &traffic);
    if (kind == Access::atomic) state.acquired = true;
    if (buffer->writable) {
      buffer->shadow.visit(offset, bytes, [&](Cell& cell, size_t at) {
        check_cell(thread, cell, kind, address, buffer->name, at, true);
      });
    }
    return;
  }
  if (kind == Access::read && is_constant(data)) return;
  fail("out of bounds: %s of %zu bytes in no buffer at %s", word(kind), bytes, place(address).c_str());
}

void copy_issued(RunningThread& thread, const void* to, const void* from, size_t bytes, size_t source_bytes,
                 Site site) {
  const void* address = address_of(site);
  if (source_bytes > 0) access(thread, from, source_bytes, Access::read, address);
  access(thread, to, bytes, Access::write, address);
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(to) - worker_of(thread).shared);
  state.shared.visit(offset, bytes, [](Cell& cell, size_t) { cell.in_flight = true; });
}

void copy_landed(RunningThread& thread, const void* to, size_t bytes) {
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(to) - worker_of(thread).shared);
  state.shared.visit(offset, bytes, [&](Cell& cell, size_t) {
    cell.in_flight = false;
    cell.write_epoch = state.epoch;
    cell.write_clock = own_clock(thread);
  });
}

void all_met() { ++state.epoch; }

void these_met(RunningThread* const* threads, size_t count) { arrivals_met(-1, threads, count); }

void arrived(RunningThread& thread, int barrier) {
  auto& joined = state.snapshots[barrier];
  joined.resize(state.threads);
  const uint32_t* own = clocks_of(thread.number);
  for (size_t k = 0; k < state.threads; ++k) joined[k] = std::max(joined[k], own[k]);
  ++own_clock(thread);
}

void arrivals_met(int barrier, RunningThread* const* threads, size_t count) {
  std::vector<uint32_t> joined(state.threads);
  if (barrier >= 0 && !state.snapshots[barrier].empty()) joined.swap(state.snapshots[barrier]);
  for (size_t i = 0; i < count; ++i) {
    const uint32_t* own = clocks_of(threads[i]->number);
    for (size_t k = 0; k < state.threads; ++k) joined[k] = std::max(joined[k], own[k]);
  }
  for (size_t i = 0; i < count; ++i) {
    std::copy(joined.begin(), joined.end(), clocks_of(threads[i]->number));
    ++own_clock(*threads[i]);
  }
  if (barrier >= 0) state.snapshots[barrier].clear();
}

}  // namespace checker

}  // namespace palmette::emulator

#endif
