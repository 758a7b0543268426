// SPDX-License-Identifier: Apache-2.0
// Operators of class Tree: tensors in, the views of tree.h out. A tree lives on the CPU whatever device its
// keys are on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "plan/error.h"
#include "plan/layout.h"
#include "plan/tensors.h"
#include "plan/tree.h"

namespace palmette {

namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> tree_build(const Tensor& parent, const Tensor& num_tokens,
                                              const std::optional<Tensor>& slots) {
  const IntArray up = int_array(parent, "parent"), length = int_array(num_tokens, "num_tokens");
  const IntArray slot = int_array(slots, "slots");
  const int64_t tokens = check_tree(up, length, slot);
  // Room to grow: the first steps of a decoder should not change shapes (and recompile what is compiled).
  Tensor nodes = new_int32(parent, {kNodeRows, up.size + up.size / 2 + 16});
  torch::stable::zero_(nodes);
  Tensor counts = new_int32(parent, {kTreeCounts});
  Tensor arena = new_int32(parent, {tokens + tokens / 2 + 64});
  build_tree(tree_state(nodes, counts, arena), up, length, slot);
  return {nodes, counts, arena};
}

Tensor tree_append(const Tensor& nodes, const Tensor& counts, const Tensor& arena, const Tensor& node,
                   const Tensor& count, const std::optional<Tensor>& slots) {
  const TreeState tree = tree_state(nodes, counts, arena);
  const IntArray leaves = int_array(node, "nodes"), added = int_array(count, "counts");
  const int64_t need = append_tokens(tree, leaves, added, int_array(slots, "slots"));
  return int64_scalar(counts, need);
}

Tensor tree_branch(const Tensor& nodes, const Tensor& counts, int64_t node, int64_t num_children) {
  return int64_scalar(counts, branch_node(tree_state(nodes, counts), node, num_children));
}

Tensor tree_prune(const Tensor& nodes, const Tensor& counts, const Tensor& arena, int64_t node) {
  std::vector<int32_t> freed;
  prune_node(tree_state(nodes, counts, arena), node, freed);
  return int32_tensor(counts, freed);
}

// order [live]: ids, depth-first. start [M], path_length [M] (tokens down to the node's last): by id, -1 for
// pruned ids. leaves: ids of the live nodes without children, depth-first.
std::tuple<Tensor, Tensor, Tensor, Tensor> tree_layout(const Tensor& nodes, const Tensor& counts) {
  const TreeState tree = tree_state(nodes, counts);
  thread_local TreeLayout layout;
  lay_out(tree, layout);
  Tensor start = new_int32(counts, {tree.num_nodes()}), path = new_int32(counts, {tree.num_nodes()});
  int32_t *start_of = int32_data(start), *path_of = int32_data(path);
  std::fill_n(start_of, tree.num_nodes(), -1);
  std::fill_n(path_of, tree.num_nodes(), -1);
  std::vector<int32_t> leaves;
  for (int32_t r = 0; r < layout.size(); ++r) {
    start_of[layout.id[r]] = layout.start[r];
    path_of[layout.id[r]] = layout.depth[r] + layout.length[r];
    if (layout.is_leaf(r)) leaves.push_back(layout.id[r]);
  }
  return {int32_tensor(counts, layout.id), start, path, int32_tensor(counts, leaves)};
}

Tensor tree_subtree_end(const Tensor& nodes, const Tensor& counts) {
  thread_local TreeLayout layout;
  lay_out(tree_state(nodes, counts), layout);
  Tensor end = new_int32(counts, {layout.num_tokens});
  int32_t* out = int32_data(end);
  for (int32_t r = 0; r < layout.size(); ++r) {
    // A token's subtree is the rest of its node and all that hangs below it.
    std::fill_n(out + layout.start[r], layout.length[r], layout.end[r]);
  }
  return end;
}

Tensor tree_slots(const Tensor& nodes, const Tensor& counts, const Tensor& arena, int64_t node) {
  const TreeState tree = tree_state(nodes, counts, arena);
  thread_local TreeLayout layout;
  lay_out(tree, layout);
  std::vector<int32_t> slots, path;
  const auto take = [&](int32_t r) {
    slots.insert(slots.end(), tree.slots + layout.begin[r], tree.slots + layout.begin[r] + layout.length[r]);
  };
  if (node == -1) {
    slots.reserve(layout.num_tokens);
    for (int32_t r = 0; r < layout.size(); ++r) take(r);
  } else {
    const auto at = std::find(layout.id.begin(), layout.id.end(), check_node(tree, node, "node"));
    for (int32_t r = static_cast<int32_t>(at - layout.id.begin()); r >= 0; r = layout.parent[r])
      path.push_back(r);
    std::for_each(path.rbegin(), path.rend(), take);
  }
  return int32_tensor(counts, slots);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(palmette, CompositeExplicitAutograd, m) {
  m.impl("tree_build", TORCH_BOX(&tree_build));
  m.impl("tree_append", TORCH_BOX(&tree_append));
  m.impl("tree_branch", TORCH_BOX(&tree_branch));
  m.impl("tree_prune", TORCH_BOX(&tree_prune));
  m.impl("tree_layout", TORCH_BOX(&tree_layout));
  m.impl("tree_subtree_end", TORCH_BOX(&tree_subtree_end));
  m.impl("tree_slots", TORCH_BOX(&tree_slots));
}

}  // namespace palmette
