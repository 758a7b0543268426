// SPDX-License-Identifier: Apache-2.0
// The contract between the attend operators and their kernels: plain pointers, every one with its shape.
//
// T is the arithmetic type: float for fp32 / bf16 / fp16 inputs, double for float64 (scalar body only).
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace palmette {

// Rows of a plan's tables (docs/design.md, "A plan").
struct PlanSegment {  // keys slots[begin .. begin + length); key i is seen from lo + i * step <= pos < hi
  int32_t begin, length, lo, step, hi, depth;
};
// The keys of segments [segment_begin, segment_end) meet queries [query_begin, query_end), or, in a plan with
// item_query, queries item_query[query_begin .. query_end), which ascend.
struct PlanItem {
  int32_t segment_begin, segment_end, query_begin, query_end;
};
// In a plan by blocks (PlanView::choices), queries item_query[query_begin .. query_end), one item, partial
// states.
struct PlanTask {  // items [item_begin, item_end) update the states of queries [query_begin, query_end)
  int32_t item_begin, item_end, query_begin, query_end, partial_begin, kv_head;
};

// counts [kPlanCounts]: how much of the tables is in use.
enum PlanCount : int {
  kNumQueries,
  kNumSegments,
  kNumItems,
  kNumTasks,
  kNumPartials,
  kMaxTaskQueries,
  kTreeVersion,  // of the tree when it was planned, wraps
  kMaxItemKeys,
  kNumSlots,  // one past the largest slot that the tree holds: the least that k and v must have
  kNumItemQueries,
  kPlanCounts = 16
};

// num_queries, num_tasks and num_partials: what is in use; for a GPU, which reads `counts` itself, the
// capacity.
struct PlanView {
  const int32_t* counts;       // [kPlanCounts]
  const int32_t* slots;        // [*]
  const int32_t* query_index;  // [num_queries]: row of q, in order of position
  const int32_t* query_pos;    // [num_queries]
  const int32_t* query_depth;  // [num_queries]
  const PlanSegment* segment;  // [num_segments]
  const PlanItem* item;        // [num_items]
  const int32_t* item_query;   // [num_item_queries] or null
  const PlanTask* task;        // [num_tasks]
  const int32_t* merge_ptr;    // [num_queries + 1]
  const int32_t* merge_row;    // [num_partials], or [num_kv_heads, num_queries, choices]
  int32_t num_queries, num_tasks, num_partials, max_task_queries;
  int32_t num_places;  // length of `slots`
  // Above 0: a plan by blocks, of a GPU. A task is a block of keys and queries that chose it; entry i of
  // item_query has a partial state of its KV head's group, and a query at most `choices` of them per KV head:
  // merge_row names their entries, -1 where there is none. Those of KV head h lie in the h-th of num_kv_heads
  // equal parts of item_query.
  int32_t choices;
};

// What one worker takes at a time: some KV heads of one task (forward) or of a run of tasks (backward).
struct AttendUnit {
  int32_t task_begin, task_end, head_begin, head_count, group;  // group: backward, which copy of dk and dv
};

struct Strided {  // [tokens, heads, channels], channels contiguous; strides in elements
  void* data;
  int64_t token, head;
};

struct AttendParams {
  PlanView plan;
  Strided q, k, v;    // [Nq, Hq, D], [slots, Hk, D], [slots, Hk, Dv]
  Strided out;        // [Nq, Hq, Dv]
  void* lse;          // T [Nq, Hq]
  void* partial_out;  // T [num_partials, Hq, Dv]
  void* partial_max;  // T [num_partials, Hq]: running maximum, log2 units
  void* partial_sum;  // T [num_partials, Hq]: sum of 2^(s - max)
  // Of a plan by blocks, partial_out is [entries, group, Dv] in the dtype of q, divided by the sums. There is
  // room for the entries of head_count KV heads, from head_begin on: the launcher lets them take turns.
  int32_t head_begin, head_count;
  const void* sinks;        // T [Hq] or null
  const AttendUnit* units;  // [num_units]
  int32_t num_units;
  DType dtype;
  int32_t num_q_heads, num_kv_heads, head_dim, v_head_dim;
  int32_t num_slots;      // rows of k and v
  double scale, softcap;  // softcap 0: none
  int32_t window;         // 0: none
  int64_t scratch_bytes;  // per worker
};

// Which items hold keys of a tile: lists of the nodes of a binary tree over the tiles (kernel_index_gpu.cu).
struct alignas(16) KeyEntry {                     // read by one instruction
  int32_t item, segment, first_segment, kv_head;  // the item's first segment; its task's KV head, or -1
};
// What a block of attend_dkv does: of the items that hold keys of a tile, each `parts`-th from the `part`-th
// on. Where there are several, its sums go to a slot of their own.
struct alignas(16) KeyPiece {
  int32_t tile, part, parts, slot;  // parts 0: nothing
};
struct KeyIndex {
  KeyEntry* entry;  // [capacity]; null: there is no index
  KeyPiece* piece;  // [tiles + extra]
  // [2 * leaves][chunks]: the entries of a node lie between the last chunk of the node before and its own
  // last chunk.
  int32_t* end;
  int32_t* queries;                               // [2 * leaves]: of a node's entries
  int32_t *sums, *work;                           // [kIndexBlocks], [tiles]: scratch
  int32_t keys, tiles, leaves, chunks, capacity;  // keys: of a tile
  int32_t extra, least;                           // pieces beyond one per tile; queries that a piece is worth
};

// dq is of the arithmetic type T on the CPU, of the dtype of q on a GPU.
struct AttendBackwardParams {
  AttendParams forward;  // inputs, out and lse as the forward pass returned them; units of one KV head each
  Strided dout;          // [Nq, Hq, Dv], dtype of q
  const void* dlse;      // T [Nq, Hq] or null
  void* dq;              // [Nq, Hq, D], zeroed
  // [slots, Hk, D] and [slots, Hk, Dv]. On the CPU T, which group 0 adds to, and for the other groups dk_more
  // and dv_more, T [groups - 1, ..], zeroed. On a GPU zeroed, in the dtype of q, or, where there are dk_sum
  // and dv_sum, these in float, which are added to.
  void *dk, *dv, *dk_more, *dv_more;
  float *dk_sum, *dv_sum;
  void* dsinks;     // T [Nq, Hq] or null: per row
  void* sink_sums;  // T [Hq] or null: their sums; filled on a GPU, by the operator on the CPU
  void* delta;      // T [Nq, Hq]: scratch of a GPU
  float* part_dq;   // [entries, group, D] of a plan by blocks, as partial_out
  // How a GPU finds dk and dv (key_tiles.h).
  KeyIndex index;
  float* part_dk;     // [slots, Hk, keys of a tile, D]
  float* part_dv;     // [slots, Hk, keys of a tile, Dv]
  int32_t* part_met;  // [slots, Hk, keys of a tile]: some query has met this key
};

// Bytes of scratch that one worker needs for a task of `rows` query rows of `heads` KV heads at a time.
template <Isa isa>
int64_t attend_scratch_bytes(const AttendParams& p, int64_t rows, int64_t heads);
template <Isa isa>
int64_t attend_backward_scratch_bytes(const AttendParams& p, int64_t rows);
template <Isa isa>
void attend(const AttendParams& p);
template <Isa isa>
void attend_backward(const AttendBackwardParams& p);

}  // namespace palmette
