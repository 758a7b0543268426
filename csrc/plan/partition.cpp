// SPDX-License-Identifier: Apache-2.0
#include "plan/partition.h"

#include <algorithm>
#include <climits>
#include <cmath>

#include "plan/error.h"

namespace palmette {

namespace {

// Items that no query outside [query_begin, query_end) meets: what can become one task or several without
// anyone else noticing.
struct Block {
  int32_t item_begin, item_end, query_begin, query_end;
  int64_t keys;
  double cost, thin_cost;  // thin: of items with few rows
  int64_t parts = 1;       // tasks to cut it into
};

// A place in the list of items: the first `key` keys of `item` lie before it.
struct Cut {
  int32_t item, key;
};

struct Range {
  int32_t begin, end;
};

class Partitioner {
 public:
  Partitioner(const Draft& draft, const CostModel& model, const Heads& heads, Plan& plan)
      : draft_(draft),
        items_(draft.item),
        model_(model),
        target_(model.target()),
        heads_(heads),
        plan_(plan) {}

  void run() {
    total_cost_ = 0;
    for (const DraftItem& item : items_) total_cost_ += item.cost;
    unit_cost_ = std::max(target_.min_unit_cost, total_cost_ * kv_heads() / target_.units);
    const double num_queries = static_cast<double>(draft_.pos.size());
    const double row_bytes = static_cast<double>(heads_.num_q_heads * (heads_.head_dim + 1) * 4);
    partial_limit_ = 2 * num_queries + std::floor(kFreePartialBytes / row_bytes);
    find_blocks();
    for (const Block& block : blocks_) add_tasks(block);
    list_merges();
  }

 private:
  double kv_heads() const { return static_cast<double>(heads_.num_kv_heads); }
  int64_t rows(int64_t queries) const { return queries * model_.group(); }
  bool is_thin(const DraftItem& item) const {
    return rows(item.query_end - item.query_begin) <= target_.thin_rows;
  }

  // Items sorted by their first query: a block ends where no earlier item reaches the next item's queries.
  // Neighbouring blocks join while they are too small to be worth a task each.
  void find_blocks() {
    blocks_.clear();
    const int64_t limit = max_task_queries(target_, heads_);
    const int32_t count = static_cast<int32_t>(items_.size());
    for (int32_t i = 0; i < count;) {
      Block b{i, i, items_[i].query_begin, items_[i].query_end, 0, 0, 0};
      for (; i < count && (b.item_end == b.item_begin || items_[i].query_begin < b.query_end); ++i) {
        const DraftItem& item = items_[i];
        b.item_end = i + 1;
        b.query_end = std::max(b.query_end, item.query_end);
        b.keys += item.keys;
        b.cost += item.cost;
        if (is_thin(item)) b.thin_cost += item.cost;
      }
      if (!blocks_.empty()) {
        Block& last = blocks_.back();
        const int64_t queries = b.query_end - last.query_begin;
        const double cost = (last.cost + b.cost) * kv_heads();
        if (queries <= limit &&
            (cost <= target_.min_unit_cost || (cost <= unit_cost_ && rows(queries) <= target_.thin_rows))) {
          last.item_end = b.item_end;
          last.query_end = b.query_end;
          last.keys += b.keys;
          last.cost += b.cost;
          last.thin_cost += b.thin_cost;
          continue;
        }
      }
      blocks_.push_back(b);
    }
  }

  // Cuts the block into `parts` of equal cost, behind the cuts made so far. A cut moves to the edge of an
  // item if that is near, because only cuts inside an item cost anything; else it goes between two of the
  // kernel's tiles of keys.
  void cut_equally(const Block& b, int64_t parts) {
    const size_t first = cuts_.size();
    cuts_.push_back(Cut{b.item_begin, 0});
    const double share = b.cost / static_cast<double>(parts);
    double before = 0;
    int64_t k = 1;
    for (int32_t i = b.item_begin; i < b.item_end && k < parts; ++i) {
      const DraftItem& item = items_[i];
      for (; k < parts && static_cast<double>(k) * share < before + item.cost; ++k) {
        const double into = static_cast<double>(k) * share - before, left = item.cost - into;
        Cut cut = into < left ? Cut{i, 0} : Cut{i + 1, 0};
        if (std::min(into, left) > share / 8 && item.keys >= 2 * target_.key_step) {
          const int32_t queries = item.query_end - item.query_begin;
          const double keys = (into - model_.fixed(queries)) / model_.per_key(queries);
          const int32_t last = item.keys / target_.key_step - 1;
          const int32_t step =
              std::clamp(static_cast<int32_t>(std::lround(keys / target_.key_step)), 1, last);
          cut = Cut{i, step * target_.key_step};
        }
        const Cut& previous = cuts_.back();
        if (cut.item > previous.item || (cut.item == previous.item && cut.key > previous.key))
          cuts_.push_back(cut);
      }
      before += item.cost;
    }
    if (cuts_.back().item == b.item_end && cuts_.size() > first + 1) cuts_.pop_back();
    ends_.insert(ends_.end(), cuts_.begin() + static_cast<std::ptrdiff_t>(first) + 1, cuts_.end());
    ends_.push_back(Cut{b.item_end, 0});
  }

  // Queries that the items between two cuts meet.
  Range part_queries(const Cut& from, const Cut& to) const {
    Range r{INT_MAX, 0};
    for (int32_t i = from.item; i < to.item + (to.key > 0); ++i) {
      r.begin = std::min(r.begin, items_[i].query_begin);
      r.end = std::max(r.end, items_[i].query_end);
    }
    return r;
  }

  // Cuts every piece of a block; ranges_ are the queries of the parts, in order.
  void cut_pieces(const std::vector<Block>& pieces) {
    cuts_.clear(), ends_.clear(), ranges_.clear();
    for (const Block& piece : pieces) cut_equally(piece, piece.parts);
    for (size_t i = 0; i < cuts_.size(); ++i) ranges_.push_back(part_queries(cuts_[i], ends_[i]));
  }

  // How many parts meet each query of the block.
  void count_parts(const Block& b) {
    met_.assign(static_cast<size_t>(b.query_end - b.query_begin), 0);
    for (const Range& r : ranges_) {
      for (int32_t j = r.begin; j < r.end; ++j) ++met_[j - b.query_begin];
    }
  }

  bool shares_queries(const Block& b, const Range& r) const {
    for (int32_t j = r.begin; j < r.end; ++j) {
      if (met_[j - b.query_begin] > 1) return true;
    }
    return false;
  }

  int64_t partial_rows(const Block& b) {
    count_parts(b);
    int64_t total = 0;
    for (const Range& r : ranges_) {
      if (shares_queries(b, r)) total += r.end - r.begin;
    }
    return total;
  }

  Block piece(int32_t item_begin, int32_t item_end) const {
    const Range queries = part_queries(Cut{item_begin, 0}, Cut{item_end, 0});
    Block b{item_begin, item_end, queries.begin, queries.end, 0, 0, 0};
    for (int32_t i = item_begin; i < item_end; ++i) {
      b.keys += items_[i].keys;
      b.cost += items_[i].cost;
      if (is_thin(items_[i])) b.thin_cost += items_[i].cost;
    }
    return b;
  }

  int64_t wanted_parts(const Block& b) const {
    const bool thin = 2 * b.thin_cost > b.cost;
    const double units = thin && target_.heads_together ? kv_heads() : 1.0;
    const double parts = std::ceil(b.cost * units / unit_cost_ - 0.05);
    return std::max<int64_t>(1, thin ? std::min(static_cast<int64_t>(parts), b.keys / target_.min_thin_keys)
                                     : static_cast<int64_t>(parts));
  }

  // Items of many rows and items of few run differently: the kernel takes the latter several KV heads at a
  // time, which reads a token-major pool in order. So where both matter they become tasks of their own, which
  // makes the states of their queries partial.
  bool worth_separating(const Block& b, double allowed) const {
    const double thick_cost = b.cost - b.thin_cost;
    if (std::min(thick_cost, b.thin_cost) * kv_heads() < 2 * target_.min_unit_cost) return false;
    if (b.thin_cost < kWorthSeparating * b.cost) return false;
    return 2.0 * (b.query_end - b.query_begin) <= allowed;
  }

  void add_tasks(const Block& b) {
    // Partial states are a budget that blocks share by their cost; what one leaves, later ones may use.
    partial_earned_ += partial_limit_ * b.cost / total_cost_;
    const double allowed = std::floor(partial_earned_ + 1e-6) - plan_.num_partials;
    std::vector<Block>& pieces = pieces_;
    pieces.assign(1, b);
    if (worth_separating(b, allowed)) {
      const auto first = items_.begin() + b.item_begin, last = items_.begin() + b.item_end;
      const auto middle = std::stable_partition(first, last, [&](const DraftItem& i) { return !is_thin(i); });
      const int32_t at = static_cast<int32_t>(middle - items_.begin());
      pieces = {piece(b.item_begin, at), piece(at, b.item_end)};
    }
    for (Block& p : pieces) p.parts = wanted_parts(p);
    for (;;) {
      cut_pieces(pieces);
      if (static_cast<double>(partial_rows(b)) <= allowed) break;
      Block& most = pieces.front().parts > 1 ? pieces.front() : pieces.back();
      if (most.parts == 1) {  // not even the pieces fit: everything in one task
        pieces.assign(1, b);
        cut_pieces(pieces);
        break;
      }
      --most.parts;
    }

    ranges_.clear();
    const size_t first_task = plan_.task.size();
    for (size_t i = 0; i < cuts_.size(); ++i) add_part(cuts_[i], ends_[i]);
    count_parts(b);
    for (size_t i = 0; i < ranges_.size(); ++i) {
      const int32_t queries = ranges_[i].end - ranges_[i].begin;
      if (shares_queries(b, ranges_[i])) {
        plan_.task[first_task + i].partial_begin = plan_.num_partials;
        plan_.num_partials += queries;
      }
      plan_.max_task_queries = std::max(plan_.max_task_queries, queries);
    }
  }

  // Emits the items between two cuts as a task that writes directly; its queries are those that the items
  // meet.
  void add_part(const Cut& from, const Cut& to) {
    const int32_t item_begin = static_cast<int32_t>(plan_.item.size());
    Range all{INT_MAX, 0};
    for (int32_t i = from.item; i < to.item + (to.key > 0); ++i) {
      const DraftItem& item = items_[i];
      const int32_t key_begin = i == from.item ? from.key : 0, key_end = i == to.item ? to.key : item.keys;
      const Range queries = add_item(item, key_begin, key_end);
      all.begin = std::min(all.begin, queries.begin);
      all.end = std::max(all.end, queries.end);
    }
    plan_.task.push_back({item_begin, static_cast<int32_t>(plan_.item.size()), all.begin, all.end, -1, -1});
    ranges_.push_back(all);
  }

  Range add_item(const DraftItem& item, int32_t key_begin, int32_t key_end) {
    const int32_t segment_begin = static_cast<int32_t>(plan_.segment.size());
    int32_t key = 0, hi = 0;
    for (int32_t s = item.segment_begin; s < item.segment_end && key < key_end; ++s) {
      PlanSegment part = draft_.segment[s];
      const int32_t skip = std::max(key_begin - key, 0), take = std::min(part.length, key_end - key);
      key += part.length;
      if (skip >= take) continue;
      part.begin += skip, part.lo += skip * part.step, part.depth += skip;
      part.length = take - skip;
      hi = std::max(hi, part.hi);
      plan_.segment.push_back(part);
    }
    Range queries{item.query_begin, item.query_end};
    if (key_begin > 0 ||
        key_end < item.keys) {  // the rest of an item may be seen by fewer queries than the whole
      const auto first = draft_.pos.begin() + item.query_begin, last = draft_.pos.begin() + item.query_end;
      const auto seen = std::lower_bound(first, last, plan_.segment[segment_begin].lo);
      queries = {static_cast<int32_t>(seen - draft_.pos.begin()),
                 static_cast<int32_t>(std::lower_bound(seen, last, hi) - draft_.pos.begin())};
    }
    plan_.item.push_back(
        {segment_begin, static_cast<int32_t>(plan_.segment.size()), queries.begin, queries.end});
    plan_.max_item_keys = std::max(plan_.max_item_keys, key_end - key_begin);
    plan_.keys_read += key_end - key_begin;
    return queries;
  }

  void list_merges() {
    plan_.merge_ptr.assign(draft_.pos.size() + 1, 0);
    plan_.merge_row.resize(plan_.num_partials);
    if (plan_.num_partials == 0) return;
    int32_t* count = plan_.merge_ptr.data() + 1;
    for (const PlanTask& t : plan_.task) {
      for (int32_t j = t.query_begin; t.partial_begin >= 0 && j < t.query_end; ++j) ++count[j];
    }
    for (size_t j = 1; j < plan_.merge_ptr.size(); ++j) plan_.merge_ptr[j] += plan_.merge_ptr[j - 1];
    fill_.assign(plan_.merge_ptr.begin(), plan_.merge_ptr.end() - 1);
    for (const PlanTask& t : plan_.task) {
      for (int32_t j = t.query_begin; t.partial_begin >= 0 && j < t.query_end; ++j) {
        plan_.merge_row[fill_[j]++] = t.partial_begin + j - t.query_begin;
      }
    }
  }

  const Draft& draft_;
  std::vector<DraftItem> items_;  // the draft's, in the order of the plan
  const CostModel& model_;
  const Target& target_;
  const Heads& heads_;
  Plan& plan_;
  double total_cost_ = 0, unit_cost_ = 0, partial_limit_ = 0, partial_earned_ = 0;
  std::vector<Block> blocks_, pieces_;
  std::vector<Cut> cuts_, ends_;  // where parts begin and end
  std::vector<Range> ranges_;
  std::vector<int32_t> met_, fill_;
};

}  // namespace

void Draft::clear() {
  index.clear(), pos.clear(), depth.clear();
  segment.clear();
  item.clear();
}

void Draft::add_keys(size_t first, const PlanSegment& keys) {
  if (segment.size() > first && continues(segment.back(), keys)) {
    segment.back().length += keys.length;
  } else if (keys.length > 0) {
    segment.push_back(keys);
  }
}

void Draft::close_item(size_t first, int32_t query_begin, int32_t query_end, const CostModel& model) {
  int64_t keys = 0;
  for (size_t s = first; s < segment.size(); ++s) keys += segment[s].length;
  check(segment.size() <= INT_MAX && keys <= INT_MAX, "the keys of an item must be at most ", INT_MAX,
        ", got ", keys);
  item.push_back({static_cast<int32_t>(first), static_cast<int32_t>(segment.size()), query_begin, query_end,
                  static_cast<int32_t>(keys), model.item(query_end - query_begin, keys)});
}

const Target& target_of(const std::string& name) {
  if (name == kCpuTarget.name) return kCpuTarget;
  check(name == kGpuTarget.name, "target must be cpu or gpu, got ", name);
  return kGpuTarget;
}

int64_t max_task_queries(const Target& target, const Heads& heads) {
  return std::max<int64_t>(1, target.max_task_rows / (heads.num_q_heads / heads.num_kv_heads));
}

void partition(const Draft& draft, const CostModel& model, const Heads& heads, Plan& plan) {
  plan.segment.clear(), plan.item.clear(), plan.task.clear();
  plan.num_partials = plan.max_task_queries = plan.max_item_keys = 0;
  plan.keys_read = 0;
  Partitioner(draft, model, heads, plan).run();
}

}  // namespace palmette
