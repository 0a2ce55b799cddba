// What the kernels of topk_svd know of a matrix, and how the work on many matrices of any shapes is cut into blocks.
// Compiled for the host too.
#pragma once

#include <algorithm>
#include <cstring>

#include "cuda/elements.h"
#include "cuda/svd_block.cuh"

namespace statsmerge::cuda::svd {

constexpr int kGroup = 4;            // vectors that a pass multiplies by at once
constexpr int kTileRows = 8;         // rows of a matrix that a warp holds at once
constexpr int kPassThreads = 128;    // of a block in the passes over the matrices
constexpr int kPassWarps = kPassThreads / kWarp;
constexpr int kProductRows = kTileRows * kPassWarps;  // rows of a block of the product A V
constexpr int kSplitRows = 512;      // rows of a block of the product Aᵀ Y
constexpr int kMaxTriplets = 15;     // more are found by a full decomposition
constexpr int kVerifications = 4;    // how often a result is measured anew before it is taken as it is

// What one call asks of every matrix that is left to Lanczos.
struct Problem {
  int k;           // triplets wanted
  int block;       // vectors in a Lanczos block: a multiple of kGroup above k, so that the gap below the last is known
  int capacity;    // Lanczos vectors between restarts
  int keep;        // of these, Ritz vectors that survive one
  double tol;
  int max_passes;
  bool vectors;
  uint64_t seed;

  STATSMERGE_HD int groups() const { return block / kGroup; }
};

inline Problem make_problem(int64_t wanted, double tol, int64_t max_passes, bool vectors, uint64_t seed) {
  const int k = static_cast<int>(std::min<int64_t>(wanted, kMaxTriplets));
  const int block = (k + kGroup) / kGroup * kGroup;
  const int capacity = block == kGroup ? 48 : 64;
  return {k, block, capacity, std::min(k + 2 * block, capacity / 2), tol,
          static_cast<int>(std::min<int64_t>(max_passes, 1 << 30)), vectors, seed};
}

// How far one matrix has come.
struct Progress {
  double scale;    // power of two that brings the largest element near 1
  double largest;  // longest image so far
  int filled;      // basis vectors whose images are known; the pending block follows them
  int rank;        // of these and the pending block: vectors that are not 0
  int next_check, passes, verifications, draws;
  bool verifying;  // the basis is nothing but Ritz vectors whose images are being measured anew
  bool done, bad;
};

// Running totals of the elements of a part of a matrix.
struct Moments {
  double largest;                            // Inf where any element is not finite
  double deviation, squared_deviation, square;  // deviations from the matrix's first element
};

// One matrix, row-major as its memory is: a column-major tensor is described as its transpose.
struct Matrix {
  const char* data;
  const char* minus;             // or null; of the same storage
  int64_t stride, minus_stride;  // from row to row, in elements
  Storage storage;
  int rows, columns, k;
  bool aligned;                  // rows of both start at multiples of 16 bytes
  bool transposed;
  int64_t index;                 // in the caller's list
  int64_t first_product, first_split;  // this matrix's first block in the grids of the two products

  // Working memory; Acc stands for the type that the products are accumulated in.
  char* basis;        // [capacity][columns] Acc
  char* spare;        // [keep][columns] Acc
  char* image;        // [block][columns] Acc: AᵀA times the pending block
  char* block;        // [groups][padded columns][kGroup] Acc: the pending block as the products read it, times `scale`
  char* y;            // [groups][rows][kGroup] Acc: A times the above, times `scale`
  char* partial;      // [splits][groups][columns][kGroup] Acc: the parts of Aᵀ y
  char* left;         // [k][rows] Acc, if vectors are wanted
  Moments* moments;   // [product blocks]
  double* projected;  // [capacity][capacity]: the matrix AᵀA in the basis
  double* coupling;   // [block][block]: images of the last block along the pending one
  double* s;          // [k]
  double* bound;      // [k]
  Progress* progress;

  // Results, any of which may be null: Acc but for statistics, which are double.
  char* out_s;
  char* out_residual;
  char* out_u;
  char* out_vh;
  int64_t* out_passes;
  double* out_statistics;  // mean, variance, norm, singular values
};

STATSMERGE_HD constexpr int columns_per_lane(Storage storage) { return 16 / static_cast<int>(bytes_of(storage)); }
STATSMERGE_HD constexpr int panel_columns(Storage storage) { return kWarp * columns_per_lane(storage); }
template <class T>
STATSMERGE_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

STATSMERGE_HD int product_blocks(const Matrix& a) { return ceil_div(a.rows, kProductRows); }
STATSMERGE_HD int splits(const Matrix& a) { return ceil_div(a.rows, kSplitRows); }
STATSMERGE_HD int panels(const Matrix& a) { return ceil_div(a.columns, panel_columns(a.storage)); }
STATSMERGE_HD int64_t padded_columns(const Matrix& a) {
  return static_cast<int64_t>(panels(a)) * panel_columns(a.storage);
}

// Where column x stands in the padded columns: the lanes of a warp hold columns_per_lane neighbours each, and what they
// read together is contiguous.
STATSMERGE_HD int64_t padded_position(const Matrix& a, int64_t x) {
  const int per_lane = columns_per_lane(a.storage), panel = panel_columns(a.storage);
  return x / panel * panel + x % per_lane * kWarp + x % panel / per_lane;
}

STATSMERGE_HD int64_t split_blocks(const Matrix& a) { return static_cast<int64_t>(splits(a)) * panels(a); }

// Cuts memory into arrays aligned to 16 bytes; with no memory, only adds up what is needed.
class Arena {
 public:
  STATSMERGE_HD explicit Arena(char* start) : start_(start) {}
  template <class T>
  STATSMERGE_HD T* take(int64_t count) {
    char* at = start_ == nullptr ? nullptr : start_ + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return reinterpret_cast<T*>(at);
  }
  STATSMERGE_HD int64_t used() const { return used_; }

 private:
  char* start_;
  int64_t used_ = 0;
};

// Gives `a` its working memory from `arena`.
template <class Acc>
void take_memory(Matrix& a, const Problem& p, Arena& arena) {
  const auto take = [&](int64_t count) { return reinterpret_cast<char*>(arena.take<Acc>(count)); };
  const int64_t rows = a.rows, columns = a.columns;
  a.basis = take(p.capacity * columns);
  a.spare = take(p.keep * columns);
  a.image = take(p.block * columns);
  a.block = take(p.block * padded_columns(a));
  a.y = take(p.block * rows);
  a.partial = take(splits(a) * p.block * columns);
  a.left = take(p.vectors ? a.k * rows : 0);
  a.moments = arena.take<Moments>(product_blocks(a));
  a.projected = arena.take<double>(p.capacity * p.capacity);
  a.coupling = arena.take<double>(p.block * p.block);
  a.s = arena.take<double>(a.k);
  a.bound = arena.take<double>(a.k);
  a.progress = arena.take<Progress>(1);
}

struct alignas(16) Raw {
  uint32_t words[4];
};

// Reads the elements of `a`, 16 bytes a row at a time. Rows past the last are read as the last, columns as 0.
template <class E, bool kMinus>
struct Reader {
  static constexpr int kColumns = 16 / static_cast<int>(sizeof(E));
  static constexpr int kRows = kTileRows / (kMinus ? 2 : 1) / (sizeof(E) == 4 ? 1 : 2);  // at once, as registers allow
  using Acc = decltype(to_acc(E()));

  STATSMERGE_HD explicit Reader(const Matrix& a)
      : data(reinterpret_cast<const E*>(a.data)), minus(reinterpret_cast<const E*>(a.minus)), stride(a.stride),
        minus_stride(a.minus_stride), rows(a.rows), columns(a.columns), aligned(a.aligned) {}

  // f(r, values) for rows row .. row + kRows − 1 of columns x .. x + kColumns − 1.
  template <class F>
  STATSMERGE_HD void tile(int row, int x, const F& f) const {
    Raw raw[kRows], subtrahend[kMinus ? kRows : 1];
    const bool whole = aligned && x + kColumns <= columns;
    STATSMERGE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = row + r < rows ? row + r : rows - 1;
      raw[r] = load(data + at * stride, x, whole);
      if constexpr (kMinus) subtrahend[r] = load(minus + at * minus_stride, x, whole);
    }
    STATSMERGE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      Acc values[kColumns];
      unpack(raw[r], values);
      if constexpr (kMinus) {
        Acc others[kColumns];
        unpack(subtrahend[r], others);
        STATSMERGE_UNROLL
        for (int c = 0; c < kColumns; ++c) values[c] -= others[c];
      }
      f(r, values);
    }
  }

  STATSMERGE_HD Acc element(int64_t row, int column) const {
    const Acc value = to_acc(data[row * stride + column]);
    if constexpr (kMinus) return value - to_acc(minus[row * minus_stride + column]);
    return value;
  }

  const E* data;
  const E* minus;
  int64_t stride, minus_stride;
  int rows, columns;
  bool aligned;

 private:
  STATSMERGE_HD Raw load(const E* from, int x, bool whole) const {
    if (whole) return *reinterpret_cast<const Raw*>(from + x);
    E elements[kColumns] = {};
    STATSMERGE_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      if (x + c < columns) elements[c] = from[x + c];
    }
    Raw raw;
    memcpy(&raw, elements, sizeof(raw));
    return raw;
  }

  STATSMERGE_HD static void unpack(const Raw& raw, Acc (&values)[kColumns]) {
    E elements[kColumns];
    memcpy(elements, &raw, sizeof(raw));
    STATSMERGE_UNROLL
    for (int c = 0; c < kColumns; ++c) values[c] = to_acc(elements[c]);
  }
};

// Calls f(reader) with the reader of `a`, whose elements are accumulated in Acc.
template <class Acc, class F>
STATSMERGE_HD_PHASE void with_reader(const Matrix& a, const F& f) {
  const auto with = [&]<class E>(E) {
    if (a.minus == nullptr) {
      f(Reader<E, false>(a));
    } else {
      f(Reader<E, true>(a));
    }
  };
  if constexpr (sizeof(Acc) == sizeof(double)) {
    with(double());
  } else if (a.storage == Storage::f32) {
    with(float());
  } else if (a.storage == Storage::bf16) {
    with(bf16());
  } else {
    with(f16());
  }
}

}  // namespace statsmerge::cuda::svd
