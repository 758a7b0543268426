// SPDX-License-Identifier: Apache-2.0
// The primitives of csrc/cpu/ behind one signature, so that Python can call any of them on any body.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace palmette {

// Reads arrays in[0], in[1], ... and writes `out`; n is a number of elements, whose meaning the primitive's
// test knows.
struct Primitive {
  const char* name;
  void (*run)(const void* const* in, void* out, int64_t n);
};

struct PrimitiveList {
  const Primitive* begin;
  const Primitive* end;
  int lanes;
};

template <Isa isa>
PrimitiveList primitives();

}  // namespace palmette
