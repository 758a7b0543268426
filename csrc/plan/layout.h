// SPDX-License-Identifier: Apache-2.0
// The live nodes of a tree in depth-first order, as flat arrays indexed by rank (the position in that order).
#pragma once

#include <cstdint>
#include <vector>

#include "plan/tree.h"

namespace palmette {

struct TreeLayout {
  std::vector<int32_t> id;      // node
  std::vector<int32_t> parent;  // rank of the parent, -1 for roots
  std::vector<int32_t> start;   // depth-first number of the node's first token
  std::vector<int32_t> length;
  std::vector<int32_t> end;    // one past the last token of the subtree: the `hi` of every key of the node
  std::vector<int32_t> next;   // rank of the first node behind the subtree
  std::vector<int32_t> depth;  // tokens on the path above the node
  std::vector<int32_t> begin;  // first entry in the arena of slots
  std::vector<int32_t>
      last;  // rank of the nearest node on the path upwards, itself included, that has tokens; -1: none
  int32_t num_tokens = 0;
  int32_t max_slot = -1;

  int32_t size() const { return static_cast<int32_t>(id.size()); }
  bool is_leaf(int32_t rank) const { return next[rank] == rank + 1; }
  // Token numbers of the last token on the path to a node (last[rank] must not be -1), and the tokens above
  // it.
  int32_t last_token(int32_t rank) const { return start[last[rank]] + length[last[rank]] - 1; }
  int32_t last_depth(int32_t rank) const { return depth[last[rank]] + length[last[rank]] - 1; }
};

// O(live nodes). Reuses the memory of `out`.
void lay_out(const TreeState& tree, TreeLayout& out);

}  // namespace palmette
