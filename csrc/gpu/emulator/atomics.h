// SPDX-License-Identifier: Apache-2.0
// Atomics, relaxed as CUDA's. Blocks on other OS threads may be at the same address.
#pragma once

namespace palmette::emulator {

template <class T, class Change>
T exchange_by(T* address, Change change) {
  T old, wanted;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    wanted = change(old);
  } while (!__atomic_compare_exchange(address, &old, &wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace palmette::emulator

template <class T>
inline T atomicAdd(T* address, T value) {
  return palmette::emulator::exchange_by(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
inline T atomicMax(T* address, T value) {
  return palmette::emulator::exchange_by(address, [=](T old) { return old > value ? old : value; });
}
template <class T>
inline T atomicMin(T* address, T value) {
  return palmette::emulator::exchange_by(address, [=](T old) { return old < value ? old : value; });
}
template <class T>
inline T atomicOr(T* address, T value) {
  return palmette::emulator::exchange_by(address, [=](T old) { return static_cast<T>(old | value); });
}
template <class T>
inline T atomicXor(T* address, T value) {
  return palmette::emulator::exchange_by(address, [=](T old) { return static_cast<T>(old ^ value); });
}
template <class T>
inline T atomicExch(T* address, T value) {
  return palmette::emulator::exchange_by(address, [=](T) { return value; });
}
template <class T>
inline T atomicCAS(T* address, T compare, T value) {
  return palmette::emulator::exchange_by(address, [=](T old) { return old == compare ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return palmette::emulator::exchange_by(address, [=](unsigned old) { return old >= limit ? 0U : old + 1; });
}
