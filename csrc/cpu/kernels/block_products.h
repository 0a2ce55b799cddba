// Products of four rows with four vectors, the inner loops of the singular value decompositions. Rows and vectors are
// stored `padded` with zeros, so that only rows read from a matrix end anywhere.
#pragma once

#include <cstdint>
#include <new>
#include <vector>

#include "common/convert.h"

namespace statsmerge {

constexpr int64_t kBlock = 4;

// To whole vectors, and not to a power of two: rows at such distances would compete for the same lines of the cache.
constexpr int64_t padded(int64_t n) {
  const int64_t length = (n + 15) / 16 * 16;
  return length % 512 == 0 ? length + 16 : length;
}

// An allocator for vectors that start at a cache line.
template <class T>
struct CacheAligned {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  CacheAligned() = default;
  template <class U>
  CacheAligned(const CacheAligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const CacheAligned&) const = default;
};
template <class T>
using AlignedVector = std::vector<T, CacheAligned<T>>;

// Four rows of a matrix in its own element type, or the differences of two matrices' rows. Differences of types up to
// float32 are rounded to float32, as a task vector formed beforehand would be.
struct SourceRows {
  Storage storage, minus_storage;
  const char* rows[kBlock];
  const char* minus[kBlock];  // null where nothing is subtracted
};

// For Real = float, the source must not be float64.
template <class Real>
struct BlockProducts {
  // The source's rows of n elements are widened into `tile`, four rows `stride` apart; y[4 r + c] becomes the product
  // of row r with vector c of v, four vectors `stride` apart.
  static void widened(const SourceRows& source, int64_t n, const Real* v, int64_t stride, Real* tile, Real* y);

  // The same for rows that are Real and of n elements with padding.
  static void products(const Real* rows, const Real* v, int64_t n, int64_t stride, Real* y);

  // w[c] += Σ_r y[4 r + c] rows[r], of n elements with padding. Meanwhile the rows that are read next, if they are
  // given, come into the cache.
  static void combine(const Real* rows, const Real* y, int64_t n, int64_t stride, Real* w,
                      const SourceRows* next = nullptr);

  // Adds the sums of x − origin, (x − origin)² and x² over one row, each value times `scale`.
  static void add_moments(const Real* row, int64_t n, double scale, double origin, double* sums);
};

}  // namespace statsmerge
