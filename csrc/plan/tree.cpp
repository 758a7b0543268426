// SPDX-License-Identifier: Apache-2.0
#include "plan/tree.h"

#include <algorithm>
#include <climits>
#include <numeric>

#include "plan/error.h"

namespace palmette {

namespace {

void link_child(const TreeState& t, int32_t node, int32_t parent) {
  int32_t& first = parent < 0 ? t.first_root() : t.first_child[parent];
  int32_t& last = parent < 0 ? t.last_root() : t.last_child[parent];
  t.parent[node] = parent;
  t.prev_sibling[node] = last;
  t.next_sibling[node] = -1;
  (last < 0 ? first : t.next_sibling[last]) = node;
  last = node;
}

void unlink_child(const TreeState& t, int32_t node) {
  const int32_t parent = t.parent[node], prev = t.prev_sibling[node], next = t.next_sibling[node];
  (prev >= 0 ? t.next_sibling[prev] : parent >= 0 ? t.first_child[parent] : t.first_root()) = next;
  (next >= 0 ? t.prev_sibling[next] : parent >= 0 ? t.last_child[parent] : t.last_root()) = prev;
}

void clear_node(const TreeState& t, int32_t node) {
  t.first_child[node] = t.last_child[node] = -1;
  t.begin[node] = t.length[node] = t.capacity[node] = 0;
  t.alive[node] = 1;
  t.max_slot[node] = -1;
}

// Unsigned, so that a plan of a tree with 2^31 changes behind it is still told apart from the previous one.
void bump_version(const TreeState& t) {
  t.version() = static_cast<int32_t>(static_cast<uint32_t>(t.version()) + 1u);
}

int64_t total_capacity(const TreeState& t) {
  int64_t total = 0;
  for (int32_t n = t.first_root(); n >= 0; n = next_depth_first(t, n, -1)) total += t.capacity[n];
  return total;
}

// Moves all ranges together, in depth-first order. Inner nodes never grow again, so they keep no spare room.
void compact_arena(const TreeState& t) {
  std::vector<int32_t> moved;
  moved.reserve(t.arena_used());
  for (int32_t n = t.first_root(); n >= 0; n = next_depth_first(t, n, -1)) {
    const int32_t begin = static_cast<int32_t>(moved.size());
    moved.insert(moved.end(), t.slots + t.begin[n], t.slots + t.begin[n] + t.length[n]);
    if (t.is_leaf(n)) {
      moved.resize(static_cast<size_t>(begin) + t.capacity[n], 0);
    } else {
      t.capacity[n] = t.length[n];
    }
    t.begin[n] = begin;
  }
  std::copy(moved.begin(), moved.end(), t.slots);
  t.arena_used() = static_cast<int32_t>(moved.size());
}

// Where a leaf that grows to `length` tokens goes. Advances `used`; false: it stays where it is.
struct Placement {
  int64_t begin, capacity;
};
bool place(const TreeState& t, int32_t node, int64_t length, int64_t& used, Placement& out) {
  if (length <= t.capacity[node]) return false;
  const bool at_end = t.begin[node] + int64_t{t.capacity[node]} == used;
  out.capacity = std::max(length, int64_t{t.length[node]} + t.length[node] / 2 + 16);
  out.begin = at_end ? t.begin[node] : used;
  used = out.begin + out.capacity;
  return true;
}

}  // namespace

TreeState tree_state(int32_t* nodes, int64_t node_capacity, int32_t* counts, int32_t* slots,
                     int64_t slot_capacity) {
  TreeState t{};
  int32_t** rows[kNodeRows] = {&t.parent, &t.first_child, &t.last_child, &t.next_sibling, &t.prev_sibling,
                               &t.begin,  &t.length,      &t.capacity,   &t.alive,        &t.max_slot};
  for (int i = 0; i < kNodeRows; ++i) *rows[i] = nodes + i * node_capacity;
  t.node_capacity = node_capacity;
  t.counts = counts;
  t.slots = slots;
  t.slot_capacity = slot_capacity;
  return t;
}

int32_t check_node(const TreeState& t, int64_t node, const char* name) {
  check(node >= 0 && node < t.num_nodes(), name, " must be in [0, ", t.num_nodes(), "), got ", node);
  check(t.alive[node] != 0, name, " must be alive, got ", node, ", which was pruned");
  return static_cast<int32_t>(node);
}

int64_t check_tree(const IntArray& parent, const IntArray& length, const IntArray& slots) {
  const int64_t n = parent.size;
  check(n > 0, "parent must be non-empty, got 0 nodes");
  check(n <= INT_MAX, "parent must be at most ", INT_MAX, " long, got ", n);
  check(length.size == n, "num_tokens must be ", n, " long (one entry per node), got ", length.size);
  int64_t tokens = 0;
  for (int64_t i = 0; i < n; ++i) {
    check(parent[i] >= -1 && parent[i] < n, "parent must be in [-1, ", n, "), got ", parent[i], " for node ",
          i);
    check(length[i] >= 0, "num_tokens must be non-negative, got ", length[i], " for node ", i);
    check(length[i] <= INT_MAX, "num_tokens must be at most ", INT_MAX, ", got ", length[i], " for node ", i);
    tokens += length[i];
    check(tokens <= INT_MAX, "the sum of num_tokens must be at most ", INT_MAX, ", got ", tokens,
          " up to node ", i);
  }
  // Colour every node by the walk up that first met it: a walk that meets its own colour has closed a cycle.
  std::vector<int32_t> colour(n, -1);
  for (int64_t i = 0; i < n; ++i) {
    int64_t up = i;
    while (up >= 0 && colour[up] < 0) {
      colour[up] = static_cast<int32_t>(i);
      up = parent[up];
    }
    check(up < 0 || colour[up] != i, "parent must be free of cycles, got one through node ", up);
  }
  if (slots.given) {
    check(slots.size == tokens, "slots must be ", tokens, " long (one entry per token), got ", slots.size);
    for (int64_t i = 0; i < tokens; ++i) {
      check(slots[i] >= 0 && slots[i] <= INT_MAX, "slots must be in [0, ", INT_MAX, "], got ", slots[i],
            " at entry ", i);
    }
  }
  return tokens;
}

void build_tree(const TreeState& t, const IntArray& parent, const IntArray& length, const IntArray& slots) {
  const int32_t n = static_cast<int32_t>(parent.size);
  std::fill(t.counts, t.counts + kTreeCounts, 0);
  t.num_nodes() = t.num_live() = n;
  t.first_root() = t.last_root() = -1;
  t.identity() = !slots.given;
  for (int32_t i = 0; i < n; ++i) clear_node(t, i);
  for (int32_t i = 0; i < n; ++i) {
    t.length[i] = t.capacity[i] = static_cast<int32_t>(length[i]);
    link_child(t, i, static_cast<int32_t>(parent[i]));
  }
  int32_t used = 0;
  for (int32_t node = t.first_root(); node >= 0; node = next_depth_first(t, node, -1)) {
    t.begin[node] = used;
    for (int32_t i = 0; i < t.length[node]; ++i) {
      const int32_t slot = t.identity() ? used + i : static_cast<int32_t>(slots[used + i]);
      t.slots[used + i] = slot;
      t.max_slot[node] = std::max(t.max_slot[node], slot);
    }
    used += t.length[node];
  }
  t.arena_used() = t.num_tokens() = used;
  // Depth-first numbers of an identity tree go on behind the last token; elsewhere the values are never read.
  std::iota(t.slots + used, t.slots + t.slot_capacity, used);
}

int64_t append_tokens(const TreeState& t, const IntArray& node, const IntArray& count,
                      const IntArray& slots) {
  const int64_t n = node.size;
  check(count.size == n, "counts must be ", n, " long (one entry per node), got ", count.size);
  int64_t added = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t leaf = check_node(t, node[i], "nodes");
    check(t.is_leaf(leaf), "nodes must be leaves, got ", leaf, ", which has children");
    check(count[i] >= 0 && count[i] <= INT_MAX, "counts must be in [0, ", INT_MAX, "], got ", count[i],
          " for node ", leaf);
    added += count[i];
    check(t.num_tokens() + added <= INT_MAX, "the tokens of the tree must be at most ", INT_MAX, ", got ",
          t.num_tokens() + added);
  }
  if (t.identity()) {
    check(!slots.given, "slots must be None for a tree that was built without slots, got ", slots.size,
          " slots");
  } else {
    check(slots.given || added == 0, "slots must be given for a tree that was built with slots, got None");
    check(slots.size == added, "slots must be ", added, " long (one entry per new token), got ", slots.size);
    for (int64_t i = 0; i < added; ++i) {
      check(slots[i] >= 0 && slots[i] <= INT_MAX, "slots must be in [0, ", INT_MAX, "], got ", slots[i],
            " at entry ", i);
    }
  }
  // Marks in the alive row find duplicates without memory of their own; they are gone before anything else
  // happens.
  int64_t duplicate = -1;
  for (int64_t i = 0; i < n; ++i) {
    int32_t& mark = t.alive[node[i]];
    if (mark == 2) duplicate = node[i];
    mark = 2;
  }
  for (int64_t i = 0; i < n; ++i) t.alive[node[i]] = 1;
  check(duplicate < 0, "nodes must be distinct, got ", duplicate, " twice");

  if (t.identity()) {
    if (t.num_tokens() + added > t.slot_capacity) return t.num_tokens() + added;
    for (int64_t i = 0; i < n; ++i) t.length[node[i]] += static_cast<int32_t>(count[i]);
  } else {
    const auto wanted = [&] {
      int64_t used = t.arena_used();
      Placement p;
      for (int64_t i = 0; i < n; ++i)
        place(t, static_cast<int32_t>(node[i]), t.length[node[i]] + count[i], used, p);
      return used;
    };
    int64_t need = wanted();
    if (need > t.slot_capacity && (t.arena_used() - total_capacity(t)) * 2 > t.arena_used()) {
      compact_arena(t);
      bump_version(t);  // plans point into the arena
      need = wanted();
    }
    check(need <= INT_MAX, "the arena of slots must be at most ", INT_MAX, " long, got ", need);
    if (need > t.slot_capacity) return need;
    int64_t used = t.arena_used(), taken = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t leaf = static_cast<int32_t>(node[i]), length = t.length[leaf];
      Placement p;
      if (place(t, leaf, length + count[i], used, p)) {
        if (p.begin != t.begin[leaf]) std::copy_n(t.slots + t.begin[leaf], length, t.slots + p.begin);
        t.begin[leaf] = static_cast<int32_t>(p.begin);
        t.capacity[leaf] = static_cast<int32_t>(p.capacity);
      }
      for (int64_t k = 0; k < count[i]; ++k) {
        const int32_t slot = static_cast<int32_t>(slots[taken++]);
        t.slots[t.begin[leaf] + length + k] = slot;
        t.max_slot[leaf] = std::max(t.max_slot[leaf], slot);
      }
      t.length[leaf] = length + static_cast<int32_t>(count[i]);
    }
    t.arena_used() = static_cast<int32_t>(used);
  }
  t.num_tokens() += static_cast<int32_t>(added);
  bump_version(t);
  return 0;
}

int64_t branch_node(const TreeState& t, int64_t node, int64_t num_children) {
  const int32_t parent = node == -1 ? -1 : check_node(t, node, "node");
  check(num_children > 0, "num_children must be at least 1, got ", num_children);
  check(num_children <= INT_MAX - t.num_nodes(), "num_children must be at most ", INT_MAX - t.num_nodes(),
        ", got ", num_children);
  const int64_t need = t.num_nodes() + num_children;
  if (need > t.node_capacity) return need;
  // The node stops growing: give its spare room back if nothing lies behind it. Chains built by branching
  // stay contiguous.
  if (parent >= 0 && !t.identity() && t.begin[parent] + t.capacity[parent] == t.arena_used()) {
    t.capacity[parent] = t.length[parent];
    t.arena_used() = t.begin[parent] + t.capacity[parent];
  }
  for (int64_t i = 0; i < num_children; ++i) {
    const int32_t child = t.num_nodes()++;
    clear_node(t, child);
    t.begin[child] = t.arena_used();
    link_child(t, child, parent);
  }
  t.num_live() += static_cast<int32_t>(num_children);
  bump_version(t);
  return 0;
}

void prune_node(const TreeState& t, int64_t node, std::vector<int32_t>& freed) {
  int32_t top = check_node(t, node, "node");
  while (t.parent[top] >= 0 && t.first_child[t.parent[top]] == t.last_child[t.parent[top]])
    top = t.parent[top];
  int32_t before = 0;  // tokens in front of the subtree, in depth-first order
  if (t.identity()) {
    for (int32_t n = t.first_root(); n != top; n = next_depth_first(t, n, -1)) before += t.length[n];
  }
  const size_t old = freed.size();
  for (int32_t n = top, next; n >= 0; n = next) {
    next = next_depth_first(t, n, top);
    if (t.identity()) {
      for (int32_t i = 0; i < t.length[n]; ++i) freed.push_back(before++);
    } else {
      freed.insert(freed.end(), t.slots + t.begin[n], t.slots + t.begin[n] + t.length[n]);
    }
    t.alive[n] = 0;
    --t.num_live();
  }
  unlink_child(t, top);
  t.num_tokens() -= static_cast<int32_t>(freed.size() - old);
  bump_version(t);
}

}  // namespace palmette
