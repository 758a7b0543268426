// SPDX-License-Identifier: Apache-2.0
// Scratch memory of the calling thread, kept between calls: fresh pages would cost more than many a kernel.
#pragma once

#include <cstdint>

namespace palmette {

// At least `bytes` bytes, aligned to 64; valid until this thread asks again. Contents are unspecified.
void* thread_workspace(int64_t bytes);

}  // namespace palmette
