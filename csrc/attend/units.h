// SPDX-License-Identifier: Apache-2.0
// What the workers of the CPU take at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "attend/params.h"

namespace palmette {

// The largest units come first, so that workers finish together.
std::vector<AttendUnit> forward_units(const AttendParams& p);

// Units of the backward pass: each KV head, or each KV head and group of tasks where heads are few. Tasks
// of the same rows stay together, because dQ has one owner. A group costs one copy of dK and dV.
std::vector<AttendUnit> backward_units(const AttendParams& p, int32_t& groups);

}  // namespace palmette
