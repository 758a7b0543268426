// SPDX-License-Identifier: Apache-2.0
// Every operator's signature. Implementations are registered beside their checks, in csrc/<mechanism>/op.cpp
// and csrc/plan/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(palmette, m) {
  // merge: states of the same query, combined by log-sum-exp
  m.def("merge_states(Tensor outs, Tensor lses, Tensor? indptr, bool base2) -> (Tensor out, Tensor lse)");
  m.def(
      "merge_states_backward(Tensor dout, Tensor dlse, Tensor outs, Tensor lses, Tensor? indptr, Tensor out, "
      "Tensor lse, bool base2) -> (Tensor douts, Tensor dlses)");
  m.def(
      "merge_state(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, bool base2) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "merge_state_backward(Tensor dout, Tensor dlse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, "
      "Tensor out, Tensor lse, bool base2) -> (Tensor dout_a, Tensor dlse_a, Tensor dout_b, Tensor dlse_b)");

  // attend: queries meet tiles of keys under a plan
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor slots, Tensor query, Tensor segment, Tensor item, "
      "Tensor task, Tensor merge_ptr, Tensor merge_row, Tensor counts, Tensor? sinks, float scale, "
      "float softcap, int window, Tensor? item_query=None) -> (Tensor out, Tensor lse)");
  m.def(
      "attend_out(Tensor q, Tensor k, Tensor v, Tensor slots, Tensor query, Tensor segment, Tensor item, "
      "Tensor task, Tensor merge_ptr, Tensor merge_row, Tensor counts, Tensor? sinks, float scale, "
      "float softcap, int window, Tensor(a!) out, Tensor(b!) lse, Tensor? item_query=None) -> ()");
  m.def(
      "attend_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor slots, Tensor query, Tensor segment, Tensor item, Tensor task, Tensor merge_ptr, "
      "Tensor merge_row, Tensor counts, Tensor? sinks, float scale, float softcap, int window, "
      "Tensor? item_query=None) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)");
  m.def(
      "attend_backward_accumulate_(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor slots, Tensor query, Tensor segment, Tensor item, Tensor task, Tensor merge_ptr, "
      "Tensor merge_row, Tensor counts, Tensor? sinks, float scale, float softcap, int window, "
      "Tensor(a!) dk, Tensor(b!) dv, Tensor? item_query=None) -> (Tensor dq, Tensor dsinks)");

  // plan: trees of tokens (int32 tables, laid out in plan/tree.h), and which of their keys meet which queries
  m.def(
      "tree_build(Tensor parent, Tensor num_tokens, Tensor? slots) -> (Tensor nodes, Tensor counts, "
      "Tensor arena)");
  m.def(
      "tree_append(Tensor(a!) nodes, Tensor(b!) counts, Tensor(c!) arena, Tensor node, Tensor count, "
      "Tensor? slots) -> Tensor arena_needed");
  m.def(
      "tree_branch(Tensor(a!) nodes, Tensor(b!) counts, int node, int num_children) -> Tensor nodes_needed");
  m.def("tree_prune(Tensor(a!) nodes, Tensor(b!) counts, Tensor arena, int node) -> Tensor freed");
  m.def(
      "tree_layout(Tensor nodes, Tensor counts) -> (Tensor order, Tensor start, Tensor path_length, "
      "Tensor leaves)");
  m.def("tree_subtree_end(Tensor nodes, Tensor counts) -> Tensor");
  m.def("tree_slots(Tensor nodes, Tensor counts, Tensor arena, int node) -> Tensor");
  m.def(
      "plan_tree(Tensor nodes, Tensor tree_counts, str queries, Tensor? query_node, Tensor? query_offset, "
      "int num_q_heads, int num_kv_heads, int head_dim, str split, int block_len, str target, "
      "Tensor(a!) counts, "
      "Tensor(b!) query, Tensor(c!) segment, Tensor(d!) item, Tensor(e!) task, Tensor(f!) merge_ptr, "
      "Tensor(g!) merge_row, Tensor(h!) io) -> Tensor done");

  m.def(
      "plan_varlen(Tensor q_indptr, Tensor kv_indptr, bool causal, SymInt num_queries, "
      "SymInt num_keys, int num_q_heads, int num_kv_heads, int head_dim, str target, SymInt item_capacity, "
      "SymInt partial_capacity, Tensor? token_indptr=None, int key_size=1, int key_stride=1, "
      "int window=0, Tensor? key_start=None) -> (Tensor slots, Tensor query, Tensor segment, Tensor item, "
      "Tensor task, Tensor merge_ptr, Tensor merge_row, Tensor counts)");
  m.def(
      "plan_selection(Tensor block_index, Tensor q_indptr, Tensor kv_indptr, SymInt num_keys, int block_size, "
      "int min_tile_queries, int max_tile_queries, SymInt segment_capacity, SymInt item_capacity, "
      "SymInt task_capacity, Tensor? key_start=None) -> (Tensor slots, Tensor query, Tensor segment, Tensor item, Tensor task, "
      "Tensor merge_ptr, Tensor merge_row, Tensor counts, Tensor item_query)");

  // sparse: which key blocks a query attends to
  m.def(
      "select_blocks(Tensor q, Tensor k_cmp, Tensor lse, Tensor q_indptr, Tensor cmp_indptr, "
      "Tensor token_indptr, int kernel_size, int kernel_stride, int block_size, int topk, int init_blocks, "
      "int local_blocks, float scale, Tensor? key_start=None) -> Tensor block_index");
  m.def(
      "sparse_branches(Tensor q, Tensor k_cmp, Tensor v_cmp, Tensor k_slc, Tensor v_slc, Tensor k_win, "
      "Tensor v_win, Tensor gates, Tensor q_indptr, Tensor cmp_indptr, Tensor token_indptr, int kernel_size, "
      "int kernel_stride, int block_size, int topk, int init_blocks, int local_blocks, int window, "
      "float? scale, int rows_per_block, int tile_bytes, Tensor? cmp_start=None, "
      "Tensor? slc_start=None, Tensor? win_start=None) -> Tensor out");

  // verify: token trees against the target's logits or probabilities, and what follows in the KV cache
  m.def("verify_extent(Tensor nodes, Tensor tree_counts) -> Tensor");
  m.def(
      "verify_greedy(Tensor nodes, Tensor tree_counts, Tensor draft_tokens, Tensor target_logits, "
      "SymInt num_roots, SymInt max_depth) -> (Tensor accepted, Tensor num_accepted, Tensor bonus)");
  m.def(
      "verify_sample(Tensor nodes, Tensor tree_counts, Tensor draft_tokens, Tensor target_probs, "
      "Tensor uniforms, SymInt num_roots, SymInt max_depth) -> (Tensor accepted, Tensor num_accepted, "
      "Tensor bonus)");
  m.def("compact_kv_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor src_slots, Tensor dst_slots) -> ()");

  // codec: tensors as a few bits per element, for slow networks (docs/wire_format.md)
  m.def("hadamard_transform(Tensor x, float scale, bool transpose) -> Tensor");
  m.def("hadamard_transform_out(Tensor x, float scale, bool transpose, Tensor(a!) out) -> ()");
  m.def(
      "tah_encode(Tensor x, int tile_size, int low_bits, int high_bits, SymInt low_count, float threshold, "
      "int allocation, int gate, int metadata, bool rounded, Tensor(a!) wire) -> ()");
  m.def("tah_decode(Tensor(a!) wire, Tensor(b!) out) -> ()");
  m.def("fixpoint_encode(Tensor x, SymInt[] groups, int bits, int grid, Tensor(a!) wire) -> ()");
  m.def("fixpoint_decode(Tensor(a!) wire, Tensor(b!) out) -> ()");
  m.def("delta_encode_(Tensor x, Tensor(a!) m, SymInt[] groups, int bits, int grid, Tensor(b!) wire) -> ()");
  m.def("delta_decode_(Tensor(a!) wire, Tensor(b!) m) -> ()");

  // loss: what a policy's loss needs of logits
  m.def(
      "gather_logprobs(Tensor logits, Tensor targets, float temperature, bool entropy) "
      "-> (Tensor logprobs, Tensor lse, Tensor entropies)");
  m.def(
      "gather_logprobs_backward_(Tensor? dlogprobs, Tensor? dentropies, Tensor(a!) logits, Tensor targets, "
      "Tensor lse, Tensor? entropies, float temperature) -> ()");

  // core: which body of the kernels runs; palmette.testing and `python -m palmette env` call these
  m.def("_set_backend(str name) -> str");
  m.def("_backends() -> str");
  m.def("_build_info() -> str");
  m.def("_load_gpu_library(str path) -> str");
  m.def("_gpu_kernels(str backend) -> str");
  m.def("_gpu_status(str backend) -> str");
}
