// Memory that vectors lie well in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace statsmerge {

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

template <class T>
using AlignedArray = std::unique_ptr<T[], AlignedDelete>;

// Uninitialised numbers, aligned to the widest vector and to a cache line.
template <class T>
AlignedArray<T> aligned_array(int64_t count) {
  return AlignedArray<T>(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64})));
}

}  // namespace statsmerge
