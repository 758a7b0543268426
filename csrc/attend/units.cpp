// SPDX-License-Identifier: Apache-2.0
#include "attend/units.h"

#include <algorithm>

#include "core/parallel.h"

namespace palmette {

namespace {

// How many KV heads a worker takes at a time. In a token-major pool ([slots, Hk, D]) the heads of a token are
// neighbours, so a task whose items have few rows reads several heads per tile, while their packed rows fit
// the L2 cache and the states of the whole task (o) stay below half a megabyte; never so many that fewer than
// two units per worker are left to share out. No result depends on it.
int64_t heads_at_a_time(const AttendParams& p, const PlanTask& task) {
  constexpr int64_t kHotBytes = 192 << 10, kStateBytes = 512 << 10;
  const int64_t min_units = 2 * num_workers();
  if (p.k.token <= p.k.head) return 1;
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  int64_t widest = 1;
  for (int32_t i = task.item_begin; i < task.item_end; ++i) {
    widest = std::max<int64_t>(widest, (p.plan.item[i].query_end - p.plan.item[i].query_begin) * group);
  }
  const int64_t rows = std::max<int64_t>(1, (task.query_end - task.query_begin) * group);
  const int64_t heads = std::min({kHotBytes / (widest * (p.head_dim + p.v_head_dim) * 4),
                                  kStateBytes / (rows * p.v_head_dim * 4),
                                  p.num_kv_heads * int64_t{p.plan.num_tasks} / min_units});
  return std::clamp<int64_t>(heads, 1, p.num_kv_heads);
}

// About what a task costs per KV head: row-key pairs, where fetching a key counts as much as 16 rows.
int64_t task_work(const AttendParams& p, const PlanTask& task) {
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  int64_t work = 0;
  for (int32_t i = task.item_begin; i < task.item_end; ++i) {
    const PlanItem& item = p.plan.item[i];
    int64_t keys = 0;
    for (int32_t s = item.segment_begin; s < item.segment_end; ++s) keys += p.plan.segment[s].length;
    work += keys * ((item.query_end - item.query_begin) * group + 16);
  }
  return work;
}

}  // namespace

std::vector<AttendUnit> forward_units(const AttendParams& p) {
  std::vector<AttendUnit> units;
  std::vector<int64_t> work;
  for (int32_t t = 0; t < p.plan.num_tasks; ++t) {
    const PlanTask& task = p.plan.task[t];
    work.push_back(task_work(p, task));
    if (task.kv_head >= 0) {
      units.push_back({t, t + 1, task.kv_head, 1, 0});
      continue;
    }
    const int64_t heads = p.plan.item_query != nullptr ? 1 : heads_at_a_time(p, task);
    const int64_t parts = (p.num_kv_heads + heads - 1) / heads;
    for (int64_t i = 0; i < parts; ++i) {
      const auto begin = static_cast<int32_t>(i * p.num_kv_heads / parts),
                 end = static_cast<int32_t>((i + 1) * p.num_kv_heads / parts);
      units.push_back({t, t + 1, begin, end - begin, 0});
    }
  }
  std::stable_sort(units.begin(), units.end(), [&](const AttendUnit& a, const AttendUnit& b) {
    return work[static_cast<size_t>(a.task_begin)] * a.head_count >
           work[static_cast<size_t>(b.task_begin)] * b.head_count;
  });
  return units;
}

std::vector<AttendUnit> backward_units(const AttendParams& p, int32_t& groups) {
  constexpr int32_t kMinUnits = 8;
  std::vector<int32_t> cuts;  // first tasks whose rows no earlier task touches
  int32_t reached = 0;
  int64_t total = 0;
  std::vector<int64_t> cost(static_cast<size_t>(p.plan.num_tasks));
  for (int32_t t = 0; t < p.plan.num_tasks; ++t) {
    const PlanTask& task = p.plan.task[t];
    if (task.query_begin >= reached) cuts.push_back(t);
    reached = std::max(reached, task.query_end);
    int64_t sum = 1;
    for (int32_t i = task.item_begin; i < task.item_end; ++i) {
      for (int32_t s = p.plan.item[i].segment_begin; s < p.plan.item[i].segment_end; ++s) {
        sum += int64_t{p.plan.segment[s].length} * (p.plan.item[i].query_end - p.plan.item[i].query_begin);
      }
    }
    cost[static_cast<size_t>(t)] = sum;
    total += sum;
  }
  const int32_t wanted = p.num_kv_heads >= kMinUnits ? 1 : 2;
  std::vector<int32_t> first{0};
  int64_t seen = 0;
  for (int32_t t = 0, c = 0; t < p.plan.num_tasks; ++t) {
    while (c < static_cast<int32_t>(cuts.size()) && cuts[static_cast<size_t>(c)] < t) ++c;
    const bool may_cut = c < static_cast<int32_t>(cuts.size()) && cuts[static_cast<size_t>(c)] == t;
    if (may_cut && t > 0 && static_cast<int32_t>(first.size()) < wanted &&
        seen * wanted >= total * static_cast<int64_t>(first.size())) {
      first.push_back(t);
    }
    seen += cost[static_cast<size_t>(t)];
  }
  groups = static_cast<int32_t>(first.size());
  first.push_back(p.plan.num_tasks);
  std::vector<AttendUnit> units;
  for (int32_t g = 0; g < groups; ++g) {
    for (int32_t h = 0; h < p.num_kv_heads; ++h)
      units.push_back({first[static_cast<size_t>(g)], first[static_cast<size_t>(g) + 1], h, 1, g});
  }
  return units;
}

}  // namespace palmette
