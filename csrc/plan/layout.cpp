// SPDX-License-Identifier: Apache-2.0
#include "plan/layout.h"

#include <algorithm>

namespace palmette {

void lay_out(const TreeState& t, TreeLayout& out) {
  const size_t n = static_cast<size_t>(t.num_live());
  for (auto* field : {&out.id, &out.parent, &out.start, &out.length, &out.end, &out.next, &out.depth,
                      &out.begin, &out.last}) {
    field->resize(n);
  }
  int32_t rank = 0, up = -1, token = 0, max_slot = -1;  // up: rank of the parent of the node at hand
  for (int32_t node = t.first_root(); node >= 0; ++rank) {
    const int32_t length = t.length[node];
    out.id[rank] = node;
    out.parent[rank] = up;
    out.start[rank] = token;
    out.length[rank] = length;
    out.depth[rank] = up < 0 ? 0 : out.depth[up] + out.length[up];
    out.begin[rank] = t.identity() ? token : t.begin[node];
    out.last[rank] = length > 0 ? rank : up < 0 ? -1 : out.last[up];
    max_slot = std::max(max_slot, t.max_slot[node]);
    token += length;
    if (t.first_child[node] >= 0) {
      up = rank;
      node = t.first_child[node];
      continue;
    }
    out.end[rank] = token;
    out.next[rank] = rank + 1;
    while (t.next_sibling[node] < 0) {  // this subtree ends, and with it those of which it is the last child
      node = t.parent[node];
      if (node < 0) break;
      out.end[up] = token;
      out.next[up] = rank + 1;
      up = out.parent[up];
    }
    if (node >= 0) node = t.next_sibling[node];
  }
  out.num_tokens = token;
  out.max_slot = t.identity() ? token - 1 : max_slot;
}

}  // namespace palmette
