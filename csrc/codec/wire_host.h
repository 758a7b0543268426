// SPDX-License-Identifier: Apache-2.0
// Wires on the host: headers, checksums, and what is wrong with one.
#pragma once

#include <cstdint>
#include <string>

#include "codec/wire.h"
#include "core/checks.h"

namespace palmette {

// CRC-32C of everything that the header says it is of.
uint32_t wire_checksum(const uint8_t* wire, int64_t bytes);

// Fills in the header's size and checksum and writes it; zeros where sections are padded are there already.
void finish_wire(uint8_t* wire, WireHeader header, int64_t bytes);

// The header of a wire of this kind on the CPU, once its size, version and checksum are right. Throws
// otherwise, before anything is written.
WireHeader check_wire(const Tensor& wire, WireKind kind, const char* producer);

// Of a header whose checksum is right, or is left to a GPU: throws when its sizes are not those of the
// result.
void check_sizes(const WireHeader& header, const Tensor& result, const char* name);

// Where `what` was found wrong, "x must be finite, got nan at [0, 3, 17]" and the like.
[[noreturn]] void throw_not_finite(const Tensor& x, int64_t begin, int64_t count, int64_t stride,
                                   const Tensor* m);

// Zeros from `begin` to `end`.
void clear(uint8_t* wire, int64_t begin, int64_t end);

}  // namespace palmette
