// SPDX-License-Identifier: Apache-2.0
// Plans for selected attention: every query of a KV head names the key blocks that its heads read.
//
// FSA (arXiv 2508.18224) turns NSA's loops: key blocks outside, the queries that chose them inside. Here that
// happens within tiles of queries, so that the states of a tile stay in a cache and no partial results are
// stored:
//
//   task   a tile of queries of one sequence and one KV head
//   item   a key block, and the queries of the tile that chose it (item_query), both in ascending order
//
// made by a counting sort: O(selected blocks) time and memory. Key i of a sequence of m keys and n queries
// from row s is seen by the query in row r iff i <= m - n + r - s, as in varlen.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <climits>
#include <numeric>
#include <tuple>
#include <vector>

#include "attend/params.h"
#include "plan/error.h"
#include "plan/ops.h"
#include "plan/tensors.h"

namespace palmette {

namespace {

struct Selection {
  const int32_t* block;  // [heads][queries][slots], -1 where there is none
  int64_t heads, queries, slots, block_size;
};

// One sequence of a packed batch.
struct Sequence {
  int32_t query, num_queries, key, num_keys;

  int32_t num_blocks(int64_t size) const { return static_cast<int32_t>((num_keys + size - 1) / size); }
  int32_t last_key(int32_t row) const { return num_keys - num_queries + row - query; }  // that it sees
};

class SelectionPlanner {
 public:
  std::vector<PlanSegment> segment;
  std::vector<PlanItem> item;
  std::vector<PlanTask> task;
  std::vector<int32_t> item_query;
  int32_t max_task_queries = 0;

  void run(const Selection& s, const IntArray& q_indptr, const IntArray& kv_indptr,
           const KeyStarts& key_start, int32_t min_tile, int32_t max_tile) {
    segment.clear(), item.clear(), task.clear(), item_query.clear();
    max_task_queries = 0;
    for (int64_t b = 0; b + 1 < q_indptr.size; ++b) {
      const Sequence sequence{static_cast<int32_t>(q_indptr[b]),
                              static_cast<int32_t>(q_indptr[b + 1] - q_indptr[b]), key_start(kv_indptr, b),
                              static_cast<int32_t>(kv_indptr[b + 1] - kv_indptr[b])};
      segment_of_.assign(static_cast<size_t>(sequence.num_blocks(s.block_size)), -1);
      // So many queries that a block meets min_tile of them, were choices spread evenly. By sequence: what
      // one is packed with does not change its result.
      const int64_t wanted =
          int64_t{min_tile} * sequence.num_blocks(s.block_size) / std::max<int64_t>(1, s.slots);
      const auto tile = static_cast<int32_t>(std::clamp<int64_t>(wanted, min_tile, max_tile));
      const int32_t tiles = (sequence.num_queries + tile - 1) / tile;
      for (int32_t t = 0; t < tiles; ++t) {
        const auto cut = [&](int32_t i) {
          return sequence.query + static_cast<int32_t>(int64_t{i} * sequence.num_queries / tiles);
        };
        for (int32_t h = 0; h < s.heads; ++h) add_task(s, sequence, cut(t), cut(t + 1), h);
      }
    }
  }

 private:
  // The segment of a block, made when the first task asks: a step of decoding chooses few of many blocks.
  int32_t segment_of(const Sequence& q, int32_t block, int32_t size) {
    int32_t& known = segment_of_[static_cast<size_t>(block)];
    if (known < 0) {
      known = static_cast<int32_t>(segment.size());
      const int32_t key = block * size;
      segment.push_back({q.key + key, std::min(size, q.num_keys - key),
                         q.query + key - (q.num_keys - q.num_queries), 1, q.query + q.num_queries, key});
    }
    return known;
  }

  // f(query, block) for the blocks that queries [begin, end) chose and see something of.
  template <bool kCheck, class F>
  static void for_each_choice(const Selection& s, const Sequence& q, int32_t begin, int32_t end, int32_t head,
                              F f) {
    const int32_t blocks = q.num_blocks(s.block_size);
    for (int32_t j = begin; j < end; ++j) {
      const int32_t* chosen = s.block + (head * s.queries + j) * s.slots;
      const int32_t key = q.last_key(j);
      const int32_t last = key < 0 ? -1 : static_cast<int32_t>(key / s.block_size);  // block that it sees
      int32_t before = -1;
      for (int64_t i = 0; i < s.slots; ++i) {
        const int32_t block = chosen[i];
        if (block == -1) continue;
        if constexpr (kCheck) {
          check(block > before && block < blocks, "block_index must be ascending within [0, ", blocks,
                ") in every row (-1: no block), got ", block, " after ", before, " for query ", j,
                " and KV head ", head);
          before = block;
        }
        if (block <= last) f(j, block);
      }
    }
  }

  void add_task(const Selection& s, const Sequence& q, int32_t begin, int32_t end, int32_t head) {
    const int32_t blocks = q.num_blocks(s.block_size);
    place_.assign(static_cast<size_t>(blocks), 0);
    int32_t* place = place_.data();
    for_each_choice<true>(s, q, begin, end, head, [=](int32_t, int32_t block) { ++place[block]; });
    const auto first_item = static_cast<int32_t>(item.size());
    auto at = static_cast<int32_t>(item_query.size());
    for (int32_t block = 0; block < blocks; ++block) {
      const int32_t count = place[block];
      if (count == 0) continue;
      place[block] = at;
      const int32_t first = segment_of(q, block, static_cast<int32_t>(s.block_size));
      item.push_back({first, first + 1, at, at + count});
      at += count;
    }
    item_query.resize(static_cast<size_t>(at));
    int32_t* listed = item_query.data();
    for_each_choice<false>(s, q, begin, end, head,
                           [=](int32_t j, int32_t block) { listed[place[block]++] = j; });
    task.push_back({first_item, static_cast<int32_t>(item.size()), begin, end, -1, head});
    max_task_queries = std::max(max_task_queries, end - begin);
  }

  std::vector<int32_t> segment_of_;  // by block of the sequence at work, -1: none yet
  std::vector<int32_t> place_;       // by block: how many queries chose it, then where the next one goes
};

}  // namespace

SelectionTables plan_selection(const Tensor& block_index, const Tensor& q_indptr, const Tensor& kv_indptr,
                               int64_t num_keys, int64_t block_size, int64_t min_tile_queries,
                               int64_t max_tile_queries, int64_t segment_capacity, int64_t item_capacity,
                               int64_t task_capacity, const std::optional<Tensor>& key_start) {
  check_cpu(block_index, "block_index");
  check_dtype(block_index, "block_index", {ScalarType::Int});
  check_dim(block_index, "block_index", "[Hk, Nq, n]", 3);
  check_contiguous(block_index, "block_index");
  check(block_size > 0 && block_size <= INT_MAX, "block_size must be at least 1 and below 2^31, got ",
        block_size);
  check(block_index.size(0) <= INT_MAX, "block_index must have less than 2^31 heads, got ",
        block_index.size(0));
  check(min_tile_queries > 0 && min_tile_queries <= max_tile_queries && max_tile_queries <= INT_MAX,
        "min_tile_queries must be at least 1 and at most max_tile_queries, got ", min_tile_queries, " and ",
        max_tile_queries);
  check(block_index.numel() <= INT_MAX, "block_index must have at most ", INT_MAX, " entries, got ",
        block_index.numel());
  check(num_keys >= 0 && num_keys <= INT_MAX, "k must be of less than 2^31 rows, got ", num_keys);
  const int64_t num_queries = block_index.size(1);
  const IntArray q = check_indptr(q_indptr, "cu_seqlens", num_queries, "rows of q"),
                 kv = check_indptr(kv_indptr, "cu_seqlens_k", key_start.has_value() ? -1 : num_keys,
                                   "rows of k");
  check(q.size == kv.size, "cu_seqlens_k must be [", q.size, "] like cu_seqlens, got [", kv.size, "]");

  thread_local SelectionPlanner planner;
  planner.run({static_cast<const int32_t*>(block_index.data_ptr()), block_index.size(0), num_queries,
               block_index.size(2), block_size},
              q, kv, key_starts(key_start, "k_starts", kv, num_keys), static_cast<int32_t>(min_tile_queries),
              static_cast<int32_t>(max_tile_queries));
  const auto needed = [](int64_t count, int64_t& capacity, const char* name) {
    if (capacity < 0) capacity = count;
    check(count <= capacity, name, " must be at least ", count, ", got ", capacity);
  };
  const auto segments = static_cast<int64_t>(planner.segment.size()),
             items = static_cast<int64_t>(planner.item.size()),
             tasks = static_cast<int64_t>(planner.task.size()),
             listed = static_cast<int64_t>(planner.item_query.size());
  needed(segments, segment_capacity, "segment_capacity");
  needed(items, item_capacity, "item_capacity");
  needed(tasks, task_capacity, "task_capacity");

  Tensor slots = new_int32(q_indptr, {num_keys}), query = new_int32(q_indptr, {4, num_queries});
  Tensor segment = new_int32(q_indptr, {segment_capacity, 6}), item = new_int32(q_indptr, {item_capacity, 4}),
         task = new_int32(q_indptr, {task_capacity, 6}), merge_ptr = new_int32(q_indptr, {num_queries + 1}),
         merge_row = new_int32(q_indptr, {0}), counts = new_int32(q_indptr, {kPlanCounts}),
         item_query = new_int32(q_indptr, {block_index.numel()});
  std::iota(int32_data(slots), int32_data(slots) + num_keys, 0);
  int32_t* rows = int32_data(query);
  std::iota(rows, rows + num_queries, 0);
  std::iota(rows + num_queries, rows + 2 * num_queries, 0);
  for (int64_t b = 0; b + 1 < q.size; ++b) {
    const int64_t offset = (kv[b + 1] - kv[b]) - (q[b + 1] - q[b]) - q[b];
    for (int64_t j = q[b]; j < q[b + 1]; ++j) {
      rows[2 * num_queries + j] = static_cast<int32_t>(std::max<int64_t>(0, offset + j));
    }
  }
  std::fill_n(rows + 3 * num_queries, num_queries, 0);
  fill_table(planner.segment, segment);
  fill_table(planner.item, item);
  fill_table(planner.task, task);
  std::fill_n(int32_data(merge_ptr), num_queries + 1, 0);
  fill_table(planner.item_query.data(), listed, item_query);
  int32_t* count = int32_data(counts);
  std::fill_n(count, kPlanCounts, 0);
  count[kNumQueries] = static_cast<int32_t>(num_queries);
  count[kNumSegments] = static_cast<int32_t>(segments);
  count[kNumItems] = static_cast<int32_t>(items);
  count[kNumTasks] = static_cast<int32_t>(tasks);
  count[kMaxTaskQueries] = planner.max_task_queries;
  count[kMaxItemKeys] = static_cast<int32_t>(block_size);
  count[kNumSlots] = static_cast<int32_t>(num_keys);
  count[kNumItemQueries] = static_cast<int32_t>(listed);
  return {slots, query, segment, item, task, merge_ptr, merge_row, counts, item_query};
}

STABLE_TORCH_LIBRARY_IMPL(palmette, CompositeExplicitAutograd, m) {
  m.impl("plan_selection", TORCH_BOX(&plan_selection));
}

}  // namespace palmette
