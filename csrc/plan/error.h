// SPDX-License-Identifier: Apache-2.0
// Errors of the planner, whose core knows nothing of torch: "NAME must be WANTED, got GOT", raised as
// RuntimeError by the operators and turned into ValueError by the Python layer.
#pragma once

#include <sstream>
#include <stdexcept>

namespace palmette {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]] {
    fail(parts...);
  }
}

}  // namespace palmette
