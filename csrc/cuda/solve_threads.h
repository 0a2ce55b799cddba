// What the threads of layer_solve's kernels do between two barriers. Compiled for the device and, so that loops over
// blocks and threads can stand for a launch in a test, for the host. Everything is in double.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cuda/host_device.h"

namespace statsmerge::cuda {

constexpr int kLeaf = 64;          // the Cholesky recursion ends at blocks of this size, which one thread block factorises
constexpr int kLeafPitch = 65;     // doubles between rows in shared memory: columns are read without bank conflicts
constexpr int kLeafThreads = 256;
constexpr int kRowTile = 16;       // right-hand sides that a block substitutes, 16 lanes for each
constexpr int kRowLanes = kLeafThreads / kRowTile;
constexpr int kMirrorTile = 32;
constexpr int kLanczosSteps = 16;

// The lower triangle of tiles, row by row: tile t stands at (row, column), column <= row.
struct TileAt {
  int64_t row, column;
};

STATSMERGE_HD TileAt triangle_tile(int64_t t) {
  int64_t row = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(t) + 1.0) - 1.0) / 2.0);
  while (row * (row + 1) / 2 > t) --row;
  while ((row + 1) * (row + 2) / 2 <= t) ++row;
  return {row, t - row * (row + 1) / 2};
}

// One block of a matrix that is stored row by row.
struct LeafBlock {
  double* data;   // its first entry
  int64_t pitch;  // of the matrix
  int size;       // at most kLeaf
};

// The lower triangle of a block to (or from) shared memory.
STATSMERGE_HD void load_leaf(const LeafBlock& block, double* leaf, int thread) {
  for (int e = thread; e < block.size * kLeaf; e += kLeafThreads) {
    const int i = e / kLeaf, j = e % kLeaf;
    if (j <= i) leaf[i * kLeafPitch + j] = block.data[i * block.pitch + j];
  }
}

// Step j of the factorisation A = V D⁻¹ Vᵀ, D the diagonal of V: takes column j from the columns after it. Neither
// column j nor its pivot changes, so one barrier a step is enough.
STATSMERGE_HD void factor_step(double* leaf, int size, int j, int thread) {
  const double scale = 1.0 / leaf[j * kLeafPitch + j];
  for (int i = j + 1 + thread / 16; i < size; i += kLeafThreads / 16) {
    const double factor = leaf[i * kLeafPitch + j] * scale;
    for (int k = j + 1 + thread % 16; k <= i; k += 16) leaf[i * kLeafPitch + k] -= factor * leaf[k * kLeafPitch + j];
  }
}

// The Cholesky factor L = V D^(−1/2) back to the matrix; NaN where a pivot was not positive.
STATSMERGE_HD void store_factor(const double* leaf, const LeafBlock& block, int thread) {
  for (int e = thread; e < block.size * kLeaf; e += kLeafThreads) {
    const int i = e / kLeaf, j = e % kLeaf;
    if (j <= i) block.data[i * block.pitch + j] = leaf[i * kLeafPitch + j] / sqrt(leaf[j * kLeafPitch + j]);
  }
}

STATSMERGE_HD bool positive_pivots(const double* leaf, int size) {
  for (int j = 0; j < size; ++j) {
    if (!(leaf[j * kLeafPitch + j] > 0.0)) return false;  // nor NaN
  }
  return true;
}

// Solves x Lᵀ = r (forward, j ascending) or x L = r (backward, j descending) for one row r in shared memory: this is what
// lane `lane` of `lanes` does in step j. Entry j itself is divided by its pivot at the end only, so that one barrier a
// step is enough.
STATSMERGE_HD void substitute_step(const double* leaf, double* r, int size, int j, bool forward, int lane, int lanes) {
  const double x = r[j] / leaf[j * kLeafPitch + j];
  if (forward) {
    for (int i = j + 1 + lane; i < size; i += lanes) r[i] -= x * leaf[i * kLeafPitch + j];
  } else {
    for (int i = lane; i < j; i += lanes) r[i] -= x * leaf[j * kLeafPitch + i];
  }
}

// Entry i of a vector after x, the part of the solution that belongs to the leaf at `first`, is known; forward for the
// entries below the leaf, backward for those above. `matrix` is the whole factor.
STATSMERGE_HD double forward_product(const double* matrix, int64_t n, int64_t first, int size, const double* x, int64_t i,
                                     int lane) {
  double sum = 0;
  for (int j = lane; j < size; j += 32) sum += matrix[i * n + first + j] * x[j];
  return sum;  // to be summed over a warp
}

STATSMERGE_HD double backward_product(const double* matrix, int64_t n, int64_t first, int size, const double* x, int64_t i) {
  double sum = 0;
  STATSMERGE_UNROLL
  for (int j = 0; j < kLeaf; ++j) {
    if (j < size) sum += matrix[(first + j) * n + i] * x[j];
  }
  return sum;
}

// Entry i of the vector that Lanczos starts from: any that no eigenvector is orthogonal to. In (−1, 1), never 0.
STATSMERGE_HD double start_entry(int64_t i) {
  uint64_t x = static_cast<uint64_t>(i + 1) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  x ^= x >> 31;
  return (static_cast<double>(x >> 11) + 0.5) * 0x1p-52 - 1.0;
}

// The largest eigenvalue of the symmetric tridiagonal matrix with this diagonal and, beside it, these couplings, by
// bisection on the number of negative pivots; NaN where an entry is NaN.
STATSMERGE_HD double largest_eigenvalue(const double* diagonal, const double* coupling, int size) {
  double low = diagonal[0], high = diagonal[0];
  for (int i = 0; i < size; ++i) {
    const double radius = (i > 0 ? fabs(coupling[i - 1]) : 0.0) + (i + 1 < size ? fabs(coupling[i]) : 0.0);
    if (!(fabs(diagonal[i]) + radius <= DBL_MAX)) return NAN;
    low = diagonal[i] > low ? diagonal[i] : low;  // the largest eigenvalue is at least every diagonal entry
    high = diagonal[i] + radius > high ? diagonal[i] + radius : high;
  }
  for (int step = 0; step < 60; ++step) {
    const double middle = low + (high - low) / 2;
    bool above = false;  // an eigenvalue lies above `middle`: a pivot of the shifted matrix is positive
    double pivot = diagonal[0] - middle;
    for (int i = 1; i < size && !above; ++i) {
      above = pivot > 0.0;
      if (pivot == 0.0) pivot = -DBL_MIN;
      pivot = diagonal[i] - middle - coupling[i - 1] / pivot * coupling[i - 1];
    }
    (above || pivot > 0.0 ? low : high) = middle;
  }
  return low + (high - low) / 2;
}

// What of a spectrum is kept: eigenvalues (or singular values) above `threshold`.
STATSMERGE_HD double spectrum_threshold(double largest, int64_t n, double rcond) {
  const double relative = rcond > static_cast<double>(n) * DBL_EPSILON ? rcond : static_cast<double>(n) * DBL_EPSILON;
  return largest > 0.0 ? relative * largest : 0.0;
}

}  // namespace statsmerge::cuda
