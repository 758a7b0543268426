// SPDX-License-Identifier: Apache-2.0
#include "plan/plan_tree.h"

#include <algorithm>
#include <climits>
#include <numeric>

#include "plan/error.h"

namespace palmette {

void TreePlanner::run(const TreeState& tree, const TreePlanRequest& request) {
  lay_out(tree, layout_);
  draft_.clear();
  place_queries(tree, request);
  count_io();
  const int32_t max_queries = static_cast<int32_t>(max_task_queries(request.target, request.heads));
  const CostModel model(request.target, request.heads.num_q_heads / request.heads.num_kv_heads,
                        request.heads.head_dim, max_queries);
  const int32_t block_len = static_cast<int32_t>(std::min<int64_t>(request.block_len, INT_MAX));
  cut_tiles(max_queries);
  for (size_t t = 0; t + 1 < tile_ptr_.size(); ++t) {
    const int32_t begin = tile_ptr_[t], end = tile_ptr_[t + 1];
    if (request.split == Split::sequence) {
      emit_sequences(begin, end, model);
      continue;
    }
    collect_pieces(begin, end, request.split == Split::automatic ? request.target.key_step : 0);
    if (request.split == Split::node) {
      emit_nodes(model);
    } else if (request.split == Split::node_chunk) {
      emit_chunks(block_len, model);
    } else if (request.split == Split::flatten) {
      emit_flat(block_len, model);
    } else {
      double alone = 0;
      for (int32_t j = begin; j < end; ++j) alone += model.item(1, draft_.depth[j] + 1);
      if (group_pieces(model) <= alone) {
        emit_groups(model);
      } else {
        emit_sequences(begin, end, model);
      }
    }
  }
  partition(draft_, model, request.heads, plan_);
}

// ---- queries

void TreePlanner::add_query(int32_t index, int32_t rank, int32_t offset) {
  draft_.index.push_back(index);
  draft_.pos.push_back(layout_.start[rank] + offset);
  draft_.depth.push_back(layout_.depth[rank] + offset);
  rank_.push_back(rank);
}

void TreePlanner::place_queries(const TreeState& tree, const TreePlanRequest& request) {
  rank_.clear();
  if (request.queries == QueryKind::tokens) {
    for (int32_t r = 0; r < layout_.size(); ++r) {
      for (int32_t i = 0; i < layout_.length[r]; ++i) add_query(layout_.start[r] + i, r, i);
    }
    return;  // sorted as they are
  }
  if (request.queries == QueryKind::leaves) {
    int32_t index = 0;
    for (int32_t r = 0; r < layout_.size(); ++r) {
      if (!layout_.is_leaf(r)) continue;
      const int32_t last = layout_.last[r];  // a leaf without tokens asks from the last token above it
      check(last >= 0, "the path of a leaf must be at least one token long, got 0 for leaf ", layout_.id[r]);
      add_query(index++, last, layout_.length[last] - 1);
    }
  } else {
    const int64_t n = request.node.size;
    check(request.offset.size == n, "queries must be a pair of equally long lists (node, offset), got ", n,
          " nodes and ", request.offset.size, " offsets");
    check(n <= INT_MAX, "queries must be at most ", INT_MAX, " long, got ", n);
    scratch_.resize(tree.num_nodes());  // rank by id; entries of pruned nodes are never read
    for (int32_t r = 0; r < layout_.size(); ++r) scratch_[layout_.id[r]] = r;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t node = check_node(tree, request.node[i], "the nodes of queries");
      const int32_t length = tree.length[node];
      check(request.offset[i] >= 0 && request.offset[i] < length, "the offsets of queries must be in [0, ",
            length, ") for node ", node, ", got ", request.offset[i]);
      add_query(static_cast<int32_t>(i), scratch_[node], static_cast<int32_t>(request.offset[i]));
    }
  }
  if (!std::is_sorted(draft_.pos.begin(), draft_.pos.end())) sort_queries();
}

void TreePlanner::sort_queries() {
  order_.resize(draft_.pos.size());
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(),
                   [&](int32_t a, int32_t b) { return draft_.pos[a] < draft_.pos[b]; });
  for (auto* field : {&draft_.index, &draft_.pos, &draft_.depth, &rank_}) {
    scratch_.assign(field->begin(), field->end());
    for (size_t j = 0; j < order_.size(); ++j) (*field)[j] = scratch_[order_[j]];
  }
}

void TreePlanner::count_io() {
  io_ = TreeIo{};
  scratch_.assign(layout_.size(), -1);  // per node: the last query that sees it
  for (size_t j = 0; j < rank_.size(); ++j) {
    io_.per_sequence += draft_.depth[j] + 1;
    scratch_[rank_[j]] = draft_.pos[j];
  }
  for (int32_t r = layout_.size() - 1; r >= 0; --r) {
    const int32_t pos = scratch_[r], up = layout_.parent[r];
    if (pos < 0) continue;
    io_.unique += std::min(layout_.length[r], pos - layout_.start[r] + 1);
    if (up >= 0) scratch_[up] = std::max(scratch_[up], pos);
  }
}

// Neighbouring queries share the keys up to where their paths part, and a cut between them reads those keys
// twice. Finds the tiles of at most max_queries with the fewest keys read twice; the small terms prefer few
// tiles, then equal ones.
void TreePlanner::cut_tiles(int32_t max_queries) {
  const int32_t n = static_cast<int32_t>(rank_.size());
  tile_ptr_.assign(1, 0);
  if (n <= max_queries) {
    if (n > 0) tile_ptr_.push_back(n);
    return;
  }
  best_.resize(n + 1);
  from_.resize(n + 1);
  scratch_.resize(n);  // keys shared by queries j - 1 and j
  scratch_[0] = 0;
  for (int32_t j = 1; j < n; ++j) {
    const int32_t before = draft_.pos[j - 1];
    int32_t r = rank_[j];
    while (r >= 0 && (layout_.start[r] > before || layout_.length[r] == 0)) r = layout_.parent[r];
    scratch_[j] = r < 0 ? 0 : layout_.depth[r] + std::min(layout_.length[r], before - layout_.start[r] + 1);
  }
  best_[0] = 0;
  const double tilt = 0.5 / (static_cast<double>(max_queries) * max_queries);
  for (int32_t end = 1; end <= n; ++end) {
    best_[end] = 1e300;
    for (int32_t begin = end - 1; begin >= std::max(0, end - max_queries); --begin) {
      const double size = end - begin;
      const double cost = best_[begin] + scratch_[begin] + 1 + size * size * tilt;
      if (cost < best_[end]) best_[end] = cost, from_[end] = begin;
    }
  }
  for (int32_t end = n; end > 0; end = from_[end]) tile_ptr_.push_back(end);
  std::reverse(tile_ptr_.begin() + 1, tile_ptr_.end());
}

// ---- pieces of a tile

int32_t TreePlanner::first_query_at(int32_t pos, int32_t begin, int32_t end) const {
  return static_cast<int32_t>(std::lower_bound(draft_.pos.begin() + begin, draft_.pos.begin() + end, pos) -
                              draft_.pos.begin());
}

// The nodes that queries [begin, end) see: the path of the first one, then what lies between it and the last
// one in depth-first order, leaving out subtrees without queries.
void TreePlanner::collect_pieces(int32_t begin, int32_t end, int32_t key_step) {
  pieces_.clear();
  path_.clear();
  for (int32_t r = rank_[begin]; r >= 0; r = layout_.parent[r]) path_.push_back(r);
  for (auto r = path_.rbegin(); r != path_.rend(); ++r) {
    // Deep paths are long: look for the last query only below the node that they part at.
    const bool all = draft_.pos[end - 1] < layout_.end[*r];
    add_node(*r, begin, all ? end : first_query_at(layout_.end[*r], begin, end), key_step);
  }
  int32_t j = begin;
  for (int32_t r = rank_[begin] + 1; r <= rank_[end - 1];) {
    j = first_query_at(layout_.start[r], j, end);
    const int32_t last = first_query_at(layout_.end[r], j, end);
    if (j < last) add_node(r, j, last, key_step);
    r = j < last ? r + 1 : layout_.next[r];
  }
}

// Queries inside a node see a part of it only. With key_step the node is cut between tiles of the kernel
// where queries drop out.
void TreePlanner::add_node(int32_t rank, int32_t query_begin, int32_t query_end, int32_t key_step) {
  const int32_t start = layout_.start[rank];
  const int32_t seen = std::min(layout_.length[rank], draft_.pos[query_end - 1] - start + 1);
  int32_t from = 0;
  while (key_step > 0 && from < seen) {
    const int32_t first = draft_.pos[query_begin] - start;  // the last key that all of them see
    const int64_t to = (int64_t{first} / key_step + 1) * key_step;
    if (to >= seen) break;
    add_piece(rank, from, static_cast<int32_t>(to), query_begin, query_end, true);
    from = static_cast<int32_t>(to);
    query_begin = first_query_at(start + from, query_begin, query_end);
  }
  add_piece(rank, from, seen, query_begin, query_end, key_step > 0);
}

void TreePlanner::add_piece(int32_t r, int32_t from, int32_t to, int32_t query_begin, int32_t query_end,
                            bool join) {
  if (from >= to) return;
  const PlanSegment keys{layout_.begin[r] + from, to - from, layout_.start[r] + from, 1, layout_.end[r],
                         layout_.depth[r] + from};
  if (join && !pieces_.empty()) {  // a chain of nodes without branches is like one node
    Piece& last = pieces_.back();
    if (last.query_begin == query_begin && last.query_end == query_end && continues(last.keys, keys)) {
      last.keys.length += keys.length;
      return;
    }
  }
  pieces_.push_back({keys, query_begin, query_end});
}

// ---- items of a tile

void TreePlanner::emit_nodes(const CostModel& model) {
  for (const Piece& p : pieces_) {
    const size_t first = draft_.segment.size();
    draft_.add_keys(first, p.keys);
    draft_.close_item(first, p.query_begin, p.query_end, model);
  }
}

namespace {

PlanSegment sub_run(PlanSegment keys, int32_t from, int32_t length) {
  keys.begin += from, keys.lo += from, keys.depth += from;
  keys.length = length;
  return keys;
}

}  // namespace

void TreePlanner::emit_chunks(int32_t block_len, const CostModel& model) {
  for (const Piece& p : pieces_) {
    for (int32_t from = 0, length; from < p.keys.length; from += length) {
      length = std::min(block_len, p.keys.length - from);
      const size_t first = draft_.segment.size();
      draft_.add_keys(first, sub_run(p.keys, from, length));
      draft_.close_item(first, first_query_at(p.keys.lo + from, p.query_begin, p.query_end), p.query_end,
                        model);
    }
  }
}

void TreePlanner::emit_flat(int32_t block_len, const CostModel& model) {
  size_t first = draft_.segment.size();
  int32_t room = block_len, query_begin = 0, query_end = 0;
  for (const Piece& p : pieces_) {
    for (int32_t from = 0, length; from < p.keys.length; from += length) {
      length = std::min(room, p.keys.length - from);
      if (room == block_len) {
        query_begin = first_query_at(p.keys.lo + from, p.query_begin, p.query_end);
        query_end = p.query_end;
      }
      query_end = std::max(query_end, p.query_end);
      draft_.add_keys(first, sub_run(p.keys, from, length));
      room -= length;
      if (room == 0) {
        draft_.close_item(first, query_begin, query_end, model);
        first = draft_.segment.size();
        room = block_len;
      }
    }
  }
  if (room < block_len) draft_.close_item(first, query_begin, query_end, model);
}

// Dynamic programming over the pieces: best_[i] is the least cost of reading the first i, the last item being
// pieces [from_[i], i). Long pieces stand alone; short ones may share an item, whose queries are then the
// union.
double TreePlanner::group_pieces(const CostModel& model) {
  const int32_t n = static_cast<int32_t>(pieces_.size());
  best_.resize(n + 1);
  from_.resize(n + 1);
  best_[0] = 0;
  for (int32_t i = 0; i < n; ++i) {
    best_[i + 1] = 1e300;
    int64_t keys = 0;
    int32_t query_end = 0;
    for (int32_t j = i; j >= 0 && i - j < kMaxGroupPieces; --j) {
      keys += pieces_[j].keys.length;
      if (j < i && keys > kMaxGroupKeys) break;
      query_end = std::max(query_end, pieces_[j].query_end);
      const double cost = best_[j] + model.item(query_end - pieces_[j].query_begin, keys);
      if (cost < best_[i + 1]) best_[i + 1] = cost, from_[i + 1] = j;
    }
  }
  return best_[n];
}

void TreePlanner::emit_groups(const CostModel& model) {
  path_.clear();  // ends of the items, from the last one
  for (int32_t i = static_cast<int32_t>(pieces_.size()); i > 0; i = from_[i]) path_.push_back(i);
  for (auto end = path_.rbegin(); end != path_.rend(); ++end) {
    const size_t first = draft_.segment.size();
    int32_t query_end = 0;
    for (int32_t i = from_[*end]; i < *end; ++i) {
      draft_.add_keys(first, pieces_[i].keys);
      query_end = std::max(query_end, pieces_[i].query_end);
    }
    draft_.close_item(first, pieces_[from_[*end]].query_begin, query_end, model);
  }
}

void TreePlanner::emit_sequences(int32_t begin, int32_t end, const CostModel& model) {
  for (int32_t j = begin; j < end; ++j) {
    path_.clear();
    for (int32_t r = rank_[j]; r >= 0; r = layout_.parent[r]) path_.push_back(r);
    pieces_.clear();
    for (auto r = path_.rbegin(); r != path_.rend(); ++r) add_node(*r, j, j + 1, 0);
    const size_t first = draft_.segment.size();
    for (const Piece& p : pieces_) draft_.add_keys(first, p.keys);
    draft_.close_item(first, j, j + 1, model);
  }
}

}  // namespace palmette
