// SPDX-License-Identifier: Apache-2.0
// How a wire begins and ends on a GPU, and whether it may be decoded.
//
//     wire_begin     the header, zeros where sections are padded, zeros where kernels will count
//     wire_finish    the checksum; a fault goes from the header's `position` to `status` and `position`, and
//                    takes the magic number with it: nobody shall take that for a wire
//     wire_check     the checksum again, in parts
//     wire_verdict   what the header says; leaves a WireStatus in it
//
// The checksum is linear. With x^n the polynomial of n bits, modulo Castagnoli's, it is the exclusive or
//
//     c = sum_i word_i x^(32 (n - i))
//
// of all n words, the first with its bits inverted. A group of 32 lanes has rows of 512 bytes, 16 per lane; a
// lane adds up its four columns of words by s = s x^4096 + word, for which it looks up eight times four bits.
// Each bank has a copy of the tables, so lanes never meet. Then columns, lanes and groups are added, each
// times the power of x that its place asks for. Zeros before a message change nothing, so the first row is a
// whole one.
#include <algorithm>

#include "codec/wire_gpu.cuh"

namespace palmette::gpu {

namespace {

constexpr int kThreads = static_cast<int>(kWireGroups) * kLanes;
constexpr int kUnit = 16;  // bytes of a lane
constexpr int kTables = 8, kEntries = 16;
constexpr uint32_t kOne = 0x80000000u;  // x^0
constexpr uint32_t kRow = crc_power(kWireRow);
constexpr int64_t kSkipped = kHeaderBytes - kChecksummedHeaderBytes;  // checksum, status, position

struct SumShared {
  uint32_t table[kTables * kEntries * kLanes];  // by entry, then bank
  uint32_t entry[kTables * kEntries];
  uint32_t sum[kWireGroups];
};

__device__ __forceinline__ uint32_t times_row(uint32_t s, const uint32_t* bank) {
  uint32_t product = 0;
#pragma unroll
  for (int k = 0; k < kTables; ++k)
    product ^= bank[k * kEntries * kLanes + (s >> (4 * k) & (kEntries - 1)) * kLanes];
  return product;
}

// x^(8 bytes), by the lanes of a group: each has a bit of `bytes`.
__device__ __forceinline__ uint32_t power_of_group(int64_t bytes, const uint32_t (&powers)[40]) {
  const int k = lane();
  uint32_t product = (bytes >> k & 1) != 0 ? powers[k] : kOne;
  if (k < 8 && (bytes >> (k + 32) & 1) != 0) product = crc_multiply(product, powers[k + 32]);
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) product = crc_multiply(product, shuffle_xor(product, d));
  return product;
}

// What this group's rows add to the checksum; row 0 begins before the message.
__device__ __forceinline__ uint32_t sum_of_group(const WireParams& p, const uint32_t* bank) {
  const int64_t message = p.bytes / kUnit * kUnit - kSkipped, rows = (message + kWireRow - 1) / kWireRow;
  const int64_t begin = min((int64_t{blockIdx.x} * kWireGroups + warp()) * p.rows_per_group, rows);
  const int64_t end = min(begin + p.rows_per_group, rows);
  uint32_t s[4] = {0, 0, 0, 0};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = message - (rows - row) * kWireRow + lane() * kUnit;
    Pack<uint32_t, 4> words{};
    if (at >= 0)
      words = load(reinterpret_cast<const Pack<uint32_t, 4>*>(
          p.wire + at + (at >= kChecksummedHeaderBytes ? kSkipped : 0)));
    if (at == 0) words.value[0] = ~words.value[0];
#pragma unroll
    for (int i = 0; i < 4; ++i) s[i] = times_row(s[i], bank) ^ words.value[i];
  }
  constexpr uint32_t kColumns[4] = {crc_power(16), crc_power(12), crc_power(8), crc_power(4)};
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum ^= crc_multiply(s[i], kColumns[i]);
  constexpr uint32_t kUnits[5] = {crc_power(kUnit), crc_power(2 * kUnit), crc_power(4 * kUnit),
                                  crc_power(8 * kUnit), crc_power(16 * kUnit)};
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    const uint32_t other = shuffle_xor(sum, 1 << k);
    const bool first = (lane() >> k & 1) == 0;
    sum = crc_multiply(first ? sum : other, kUnits[k]) ^ (first ? other : sum);
  }
  return crc_multiply(sum, power_of_group((rows - end) * kWireRow, p.powers));
}

template <bool kCheck>
__global__ void __launch_bounds__(kThreads) wire_sum_kernel(const __grid_constant__ WireParams p) {
  SumShared& shared = gpu::shared<SumShared>();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kTables * kEntries)
    shared.entry[thread] =
        crc_multiply(static_cast<uint32_t>(thread % kEntries) << (thread / kEntries * 4), kRow);
  __syncthreads();
  for (int i = thread; i < kTables * kEntries * kLanes; i += kThreads)
    shared.table[i] = shared.entry[i / kLanes];
  __syncthreads();
  const uint32_t sum = sum_of_group(p, shared.table + lane());
  if (lane() == 0) shared.sum[warp()] = sum;
  __syncthreads();  // the header has been read, if this block does
  if (thread != 0) return;
  uint32_t total = 0;
#pragma unroll
  for (int i = 0; i < kWireGroups; ++i) total ^= shared.sum[i];
  if constexpr (kCheck) {
    p.sums[blockIdx.x] = total;
  } else {
    auto* header = reinterpret_cast<WireHeader*>(p.wire);
    atomicXor(&header->checksum, total);  // wire_begin has left all ones: the last inversion
    if (blockIdx.x != 0) return;
    const uint64_t fault = header->position;
    header->position = fault == ~uint64_t{0} ? 0 : fault / 16;
    if (fault == ~uint64_t{0}) return;
    header->magic = 0;
    header->status = static_cast<uint32_t>(fault % 16);
  }
}

__global__ void __launch_bounds__(kThreads) wire_begin_kernel(const __grid_constant__ WireParams p) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = index; i < p.num_cleared; i += int64_t{gridDim.x} * kThreads) p.cleared[i] = 0;
  if (index < static_cast<int64_t>(sizeof(WireHeader) / 4))
    reinterpret_cast<uint32_t*>(p.wire)[index] = reinterpret_cast<const uint32_t*>(&p.header)[index];
  // a section's last 16 bytes; what it does not fill stays 0
  constexpr int kWordsOfEnd = kSectionAlignment / 4;
  const int64_t section = index / kWordsOfEnd - 16, word = index % kWordsOfEnd;
  if (section < 0 || section >= 6) return;
  const int64_t end = p.section_ends[section],
                begin = section == 0 ? kHeaderBytes : p.section_ends[section - 1];
  const auto* cleared = reinterpret_cast<const uint8_t*>(p.cleared);
  if (end > begin && cleared != p.wire + begin)
    reinterpret_cast<uint32_t*>(p.wire + end - kSectionAlignment)[word] = 0;
}

// ---- the check

struct VerdictShared {
  CountShared count;
  WireStatus status;
};

__device__ __forceinline__ WireStatus verdict(const WireParams& p, const WireHeader& h, uint32_t checksum) {
  if (h.magic != kWireMagic) {
    // an encoder's fault is more telling
    const auto status = static_cast<WireStatus>(h.status);
    const bool fault = status == WireStatus::not_finite || status == WireStatus::out_of_range;
    return h.magic == 0 && fault ? status : WireStatus::magic;
  }
  if (h.version != kWireVersion) return WireStatus::version;
  if (h.wire_bytes != static_cast<uint64_t>(p.bytes)) return WireStatus::size;
  if (h.checksum != checksum) return WireStatus::checksum;
  if (h.kind != static_cast<uint8_t>(p.kind)) return WireStatus::kind;
  const auto bits = [](int b) { return b >= 2 && b <= 8; };
  if (!bits(h.low_bits) || !bits(h.high_bits) || h.low_bits > h.high_bits) return WireStatus::option;
  const bool tah = p.kind == WireKind::tah;
  if (tah) {
    if (h.tile_log2 < 3 || h.tile_log2 > 8 || h.allocation > static_cast<uint8_t>(Allocation::tile) ||
        h.gate > static_cast<uint8_t>(Gate::always) || h.metadata > static_cast<uint8_t>(Metadata::fp32))
      return WireStatus::option;
  } else if (h.allocation > static_cast<uint8_t>(Grid::full_range)) {
    return WireStatus::option;
  }
  uint64_t product = 1;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const uint64_t size = h.sizes[i];
    if (size > uint64_t{1} << 40) return WireStatus::shape;
    if (size != 0 && product > (uint64_t{1} << 60) / size) return WireStatus::shape;
    product *= size;
  }
  if (product != static_cast<uint64_t>(p.elements)) return WireStatus::shape;
  const auto outer = static_cast<int64_t>(h.sizes[0]), middle = static_cast<int64_t>(h.sizes[1]),
             inner = static_cast<int64_t>(h.sizes[2]);
  if (!tah && product > 0) {  // P and P * R end between dimensions
    bool before = false, after = false;
    for (int i = 0; i < 64 && p.cuts[i] != 0; ++i) {
      before |= p.cuts[i] == outer;
      after |= p.cuts[i] == outer * middle;
    }
    if (!before || !after) return WireStatus::shape;
  }
  if (!tah)
    return FixpointLayout::of(h.low_bits, outer, middle, inner).end == p.bytes ? WireStatus::ok
                                                                               : WireStatus::size;
  if (middle != p.length || inner != p.channels || inner % (int64_t{1} << h.tile_log2) != 0)
    return WireStatus::shape;
  const TahOptions options = options_of(h);
  const int64_t rows = options.allocation == Allocation::none    ? 0
                       : options.allocation == Allocation::token ? middle
                                                                 : middle * (inner >> options.tile_log2);
  if (h.low_count > rows) return WireStatus::low_count;
  return TahLayout::of(options, outer, middle, inner, h.low_count).end == p.bytes ? WireStatus::ok
                                                                                  : WireStatus::size;
}

__global__ void __launch_bounds__(kCountThreads, 1)
    wire_verdict_kernel(const __grid_constant__ WireParams p, int num_sums) {
  VerdictShared& shared = gpu::shared<VerdictShared>();
  if (warp() == 0) {
    uint32_t sum = 0;
    for (int i = lane(); i < num_sums; i += kLanes) sum ^= p.sums[i];
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) sum ^= shuffle_xor(sum, d);
    const WireHeader h = load_header(p.wire);
    if (lane() == 0) shared.status = verdict(p, h, ~sum);
  }
  __syncthreads();
  WireStatus status = shared.status;
  const WireHeader h = load_header(p.wire);
  const TahOptions options = options_of(h);
  if (status == WireStatus::ok && p.kind == WireKind::tah && options.allocation != Allocation::none) {
    // codes are found by counting: the counts must be what the sizes were made for
    const auto outer = static_cast<int64_t>(h.sizes[0]), tokens = outer * static_cast<int64_t>(h.sizes[1]);
    const bool by_token = options.allocation == Allocation::token;
    const int64_t rows = by_token ? tokens : tokens * static_cast<int64_t>(h.sizes[2] >> options.tile_log2);
    const int64_t found = count_ones(p.wire + kHeaderBytes, rows, p.ones_before, shared.count);
    if (found != outer * int64_t{h.low_count}) status = WireStatus::low_count;
  }
  __syncthreads();  // all have read the header
  if (threadIdx.x != 0) return;
  auto* header = reinterpret_cast<WireHeader*>(p.wire);
  header->status = static_cast<uint32_t>(status);
  if (status != WireStatus::not_finite && status != WireStatus::out_of_range) header->position = 0;
}

}  // namespace

void begin_wire(const WireParams& p, const LaunchContext& context) {
  const int64_t blocks = (p.num_cleared + kThreads - 1) / kThreads;
  launch("wire_begin", &wire_begin_kernel, dim3(static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, 1024))),
         dim3(kThreads), 0, context, p);
}

void finish_wire(const WireParams& p, const LaunchContext& context) {
  launch("wire_finish", &wire_sum_kernel<false>, dim3(static_cast<unsigned>(wire_blocks(p))), dim3(kThreads),
         sizeof(SumShared), context, p);
}

void check_wire(const WireParams& p, const LaunchContext& context) {
  const auto blocks = static_cast<unsigned>(wire_blocks(p));
  launch("wire_check", &wire_sum_kernel<true>, dim3(blocks), dim3(kThreads), sizeof(SumShared), context, p);
  launch("wire_verdict", &wire_verdict_kernel, dim3(1), dim3(kCountThreads), sizeof(VerdictShared), context,
         p, static_cast<int>(blocks));
}

}  // namespace palmette::gpu
