// SPDX-License-Identifier: Apache-2.0
// Tree attention's planner: which queries meet which runs of keys of a tree (arXiv 2404.00242, "KV-guided
// grouping").
//
// Number the tokens of a forest depth-first; let end[k] be one past the last token of k's subtree. The query
// at token p sees key k exactly when k <= p < end[k]. Queries are sorted by position and cut into tiles; the
// queries of a tile that see a node are neighbours, so each piece of a node meets a sub-range of the tile.
// Splits differ in how pieces are put into items.
#pragma once

#include <cstdint>

#include "plan/layout.h"
#include "plan/partition.h"
#include "plan/tree.h"

namespace palmette {

enum class QueryKind { leaves, tokens, explicit_ };
enum class Split {
  automatic,   // whatever the cost model finds cheapest
  flatten,     // the tile's keys in depth-first order, cut every block_len, across nodes
  node,        // every node is an item
  node_chunk,  // every node, cut every block_len
  sequence     // every query by itself, with its whole path
};

struct TreePlanRequest {
  QueryKind queries;
  IntArray node, offset;  // of explicit queries: a node and a token within it
  Heads heads;
  Split split;
  int64_t block_len;
  const Target& target;
};

struct TreeIo {
  int64_t unique = 0;        // keys that some query sees
  int64_t per_sequence = 0;  // keys summed over queries
};

class TreePlanner {
 public:
  void run(const TreeState& tree, const TreePlanRequest& request);

  const Draft& draft() const { return draft_; }
  const Plan& plan() const { return plan_; }
  const TreeIo& io() const { return io_; }
  const TreeLayout& layout() const { return layout_; }

 private:
  // A run of keys of one node, and the queries of the tile that see its first key (which see more of it than
  // the rest do).
  struct Piece {
    PlanSegment keys;
    int32_t query_begin, query_end;
  };

  void place_queries(const TreeState& tree, const TreePlanRequest& request);
  void add_query(int32_t index, int32_t rank, int32_t offset);
  void sort_queries();
  void count_io();
  void cut_tiles(int32_t max_queries);
  // key_step: cut nodes where queries drop out, at multiples of it; 0: keep them whole
  void collect_pieces(int32_t begin, int32_t end, int32_t key_step);
  void add_node(int32_t rank, int32_t query_begin, int32_t query_end, int32_t key_step);
  void add_piece(int32_t rank, int32_t from, int32_t to, int32_t query_begin, int32_t query_end, bool join);
  int32_t first_query_at(int32_t pos, int32_t begin, int32_t end) const;
  double group_pieces(const CostModel& model);

  void emit_nodes(const CostModel& model);
  void emit_chunks(int32_t block_len, const CostModel& model);
  void emit_flat(int32_t block_len, const CostModel& model);
  void emit_groups(const CostModel& model);
  void emit_sequences(int32_t begin, int32_t end, const CostModel& model);

  TreeLayout layout_;
  Draft draft_;
  Plan plan_;
  TreeIo io_;
  std::vector<int32_t> rank_;      // per query: the node that its token is in
  std::vector<int32_t> tile_ptr_;  // queries of tile t: [tile_ptr_[t], tile_ptr_[t + 1])
  std::vector<Piece> pieces_;
  std::vector<int32_t> path_, order_, scratch_, from_;
  std::vector<double> best_;
};

}  // namespace palmette
