// SPDX-License-Identifier: Apache-2.0
// Wires on the host: headers, checksums, and what is wrong with one.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "codec/params.h"
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

// ---- for GPUs

// What can be seen of a wire without looking into it: for a GPU, the rest is its own to check.
void check_wire_tensor(const Tensor& wire);

// t, or where it does not begin at a multiple of 16 bytes a copy that does; and back.
Tensor aligned(const Tensor& t);
void copy_back(Tensor to, const Tensor& used);

// The parts of WireParams that every wire needs.
WireParams wire_params(Tensor& wire);
// Header and sections of a wire to come; the header's kind and options are there.
WireParams wire_to_begin(Tensor& wire, WireHeader header, std::initializer_list<int64_t> section_ends);

// What a GPU has left in the header of a wire that it wrote, as TahParams and FixpointParams have it: ~0 if
// nothing is wrong. Such a header is cleared: nobody shall take it for a wire. The wire is on the CPU.
uint64_t take_fault(Tensor& wire);

// Zeros from `begin` to `end`.
void clear(uint8_t* wire, int64_t begin, int64_t end);

}  // namespace palmette
