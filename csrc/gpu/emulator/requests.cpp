// SPDX-License-Identifier: Apache-2.0
#include "gpu/emulator/requests.h"

#if PALMETTE_EMULATOR_CHECK

#include <algorithm>
#include <array>
#include <tuple>

namespace palmette::emulator::requests {

namespace {

constexpr uintptr_t kBanks = 32, kWord = 4, kSector = 32;
constexpr size_t kWidest = 16;  // bytes that one instruction accesses for a lane

struct Entry {
  const void* code;
  size_t part;  // of an access wider than an instruction's
  size_t turn;  // how often the lane has executed this since it last met the others
  unsigned lane;
  const LaneAccess* access;
};

auto key_of(const Entry& e) { return std::tuple(e.access->buffer, e.code, e.part, e.turn); }

size_t count_distinct(std::vector<uintptr_t>& numbers) {
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  return numbers.size();
}

void count_sectors(const Entry* begin, const Entry* end) {
  std::vector<uintptr_t> sectors;
  for (const Entry* e = begin; e != end; ++e) {
    const auto first = reinterpret_cast<uintptr_t>(e->access->data);
    for (uintptr_t s = first / kSector; s <= (first + e->access->bytes - 1) / kSector; ++s)
      sectors.push_back(s);
  }
  BufferTraffic& traffic = *begin->access->buffer;
  const bool read = begin->access->kind == Access::read;
  (read ? traffic.read_requests : traffic.write_requests) += 1;
  (read ? traffic.read_sectors : traffic.write_sectors) += count_distinct(sectors);
}

void count_wavefronts(const Entry* begin, const Entry* end) {
  const size_t bytes = begin->access->bytes;
  const unsigned together = bytes <= 4 ? 32 : static_cast<unsigned>(128 / bytes);
  uint64_t wavefronts = 0, least = 0;
  while (begin != end) {
    const unsigned group = begin->lane / together;
    std::vector<uintptr_t> words;
    for (; begin != end && begin->lane / together == group; ++begin) {
      const auto first = reinterpret_cast<uintptr_t>(begin->access->data);
      for (uintptr_t w = first / kWord; w <= (first + bytes - 1) / kWord; ++w) words.push_back(w);
    }
    least += (count_distinct(words) + kBanks - 1) / kBanks;
    std::array<uint64_t, kBanks> of_bank{};
    for (const uintptr_t word : words) ++of_bank[word % kBanks];
    wavefronts += *std::max_element(of_bank.begin(), of_bank.end());
  }
  SharedTraffic& s = shared();
  ++s.requests;
  s.wavefronts += wavefronts;
  s.least += least;
  if (wavefronts > least) s.conflicts[(end - 1)->code] += wavefronts - least;
}

void settle_warp(RunningThread* const* begin, RunningThread* const* end) {
  std::vector<Entry> entries;
  for (; begin != end; ++begin) {
    const size_t first = entries.size();
    for (const LaneAccess& a : (*begin)->accesses) entries.push_back({a.code, a.part, 0, (*begin)->lane, &a});
    const auto mine = entries.begin() + static_cast<std::ptrdiff_t>(first);
    std::stable_sort(mine, entries.end(), [](auto& a, auto& b) { return key_of(a) < key_of(b); });
    for (size_t i = first + 1; i < entries.size(); ++i) {
      const Entry& previous = entries[i - 1];
      const bool again = std::tie(previous.access->buffer, previous.code, previous.part) ==
                         std::tie(entries[i].access->buffer, entries[i].code, entries[i].part);
      entries[i].turn = again ? previous.turn + 1 : 0;
    }
  }
  std::sort(entries.begin(), entries.end(),
            [](auto& a, auto& b) { return std::tuple(key_of(a), a.lane) < std::tuple(key_of(b), b.lane); });
  const Entry *at = entries.data(), *last = at + entries.size();
  while (at != last) {
    const Entry* next = std::find_if(at, last, [&](const Entry& e) { return key_of(e) != key_of(*at); });
    at->access->buffer != nullptr ? count_sectors(at, next) : count_wavefronts(at, next);
    at = next;
  }
}

}  // namespace

SharedTraffic& shared() {
  static SharedTraffic instance{};
  return instance;
}

void note(RunningThread& thread, const void* data, size_t bytes, Access kind, const void* code,
          BufferTraffic* buffer) {
  if (kind == Access::atomic) return;
  const auto* at = static_cast<const char*>(data);
  for (size_t part = 0; part < bytes; part += kWidest)
    thread.accesses.push_back({code, part, at + part, std::min(kWidest, bytes - part), kind, buffer});
}

void settle(RunningThread* const* threads, size_t count) {
  std::vector<RunningThread*> sorted(threads, threads + count);
  std::sort(sorted.begin(), sorted.end(), [](auto* a, auto* b) { return a->number < b->number; });
  for (auto begin = sorted.begin(); begin != sorted.end();) {
    const auto end =
        std::find_if(begin, sorted.end(), [&](auto* thread) { return thread->warp != (*begin)->warp; });
    settle_warp(&*begin, &*begin + (end - begin));
    begin = end;
  }
  for (RunningThread* thread : sorted) thread->accesses.clear();
}

}  // namespace palmette::emulator::requests

#endif
