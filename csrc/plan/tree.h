// SPDX-License-Identifier: Apache-2.0
// A forest of token runs that grows at its leaves and loses branches, held in three int32 arrays (tensors in
// Python).
//
// Nodes are linked lists (children in order of ids), so that a branch or a prune touches only what it
// changes, and every walk is a loop: a chain of 100,000 nodes must not overflow the stack. The KV slots of a
// node lie in one range of an arena; a range that is too small moves to the end and grows geometrically,
// which makes an append O(appended tokens).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace palmette {

constexpr int kNodeRows = 10;
constexpr int kTreeCounts = 8;

// A view of the arrays; every row of `nodes` has node_capacity entries, indexed by node id. -1 is "none".
struct TreeState {
  int32_t* parent;
  int32_t* first_child;
  int32_t* last_child;
  int32_t* next_sibling;  // roots are siblings of each other
  int32_t* prev_sibling;
  int32_t* begin;     // first entry in the arena; unused when identity
  int32_t* length;    // tokens
  int32_t* capacity;  // entries reserved in the arena
  int32_t* alive;     // 0 for pruned nodes, whose ids are never used again
  int32_t* max_slot;  // largest slot of the node, -1 when it has none; unused when identity
  int64_t node_capacity;

  int32_t* counts;                                  // [kTreeCounts]
  int32_t& num_nodes() const { return counts[0]; }  // ids given out so far
  int32_t& num_live() const { return counts[1]; }
  int32_t& first_root() const { return counts[2]; }
  int32_t& last_root() const { return counts[3]; }
  int32_t& arena_used() const { return counts[4]; }
  int32_t& num_tokens() const { return counts[5]; }
  int32_t& version() const { return counts[6]; }
  // 1: the tree was built without slots. The slot of a token is its depth-first number, always; the arena
  // holds 0, 1, 2, ... and is indexed by that number.
  int32_t& identity() const { return counts[7]; }

  int32_t* slots;  // the arena [slot_capacity]
  int64_t slot_capacity;

  bool is_leaf(int32_t node) const { return first_child[node] < 0; }
};

// Integers that came from the user, int32 or int64. An optional argument that did not come is empty and not
// `given`.
struct IntArray {
  const void* data;
  int64_t size;
  bool wide;
  bool given = true;
  int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Views the rows of a [kNodeRows, node_capacity] array.
TreeState tree_state(int32_t* nodes, int64_t node_capacity, int32_t* counts, int32_t* slots,
                     int64_t slot_capacity);

// Checks parent, length and slots (not given: identity) before anything is allocated. Returns the number of
// tokens.
int64_t check_tree(const IntArray& parent, const IntArray& length, const IntArray& slots);

// Fills a tree of parent.size nodes. The arrays have room for at least the checked sizes; slots come in
// depth-first order.
void build_tree(const TreeState& tree, const IntArray& parent, const IntArray& length, const IntArray& slots);

// Appends count[i] tokens to leaf node[i]; slots holds theirs one after the other. Returns 0, or the arena
// capacity that is needed; then no token was appended.
int64_t append_tokens(const TreeState& tree, const IntArray& node, const IntArray& count,
                      const IntArray& slots);

// Gives `node` (-1: the forest) new empty children with the ids num_nodes, num_nodes + 1, ... Returns 0, or
// the node capacity that is needed; then nothing was changed.
int64_t branch_node(const TreeState& tree, int64_t node, int64_t num_children);

// Removes the subtree of `node` and every ancestor that is left without leaves. Appends the slots set free,
// in depth-first order, to `freed`.
void prune_node(const TreeState& tree, int64_t node, std::vector<int32_t>& freed);

// The live node `node`, or an error that names the argument.
int32_t check_node(const TreeState& tree, int64_t node, const char* name);

// The node after `node` in depth-first order, `root` being where the walk ends; -1 at the end. root -1 walks
// the forest.
inline int32_t next_depth_first(const TreeState& tree, int32_t node, int32_t root) {
  if (tree.first_child[node] >= 0) return tree.first_child[node];
  while (node >= 0 && node != root) {
    if (tree.next_sibling[node] >= 0) return tree.next_sibling[node];
    node = tree.parent[node];
  }
  return -1;
}

}  // namespace palmette
