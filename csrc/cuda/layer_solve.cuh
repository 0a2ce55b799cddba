// The CUDA kernels of layer_solve, without torch: everything that is not a product of matrices, in double.
//
// The factorisation and the triangular solves are recursive: down to blocks of 64 they are products of matrices (cuBLAS,
// on the fp64 tensor cores); the blocks are factorised and substituted here. One launch serves all systems of a batch.
//
// Floors on an H200 (60 TFLOP/s in fp64 with tensor cores assumed), n³/3 + 2n²p, and predictions, which add the proof's
// second factorisation, the condition number and the launches:
//   72 × (n = 768, p = 768):  76 GFLOP, 1.3 ms; predicted 10 ms, most of it launches
//   n = p = 4096:            160 GFLOP, 2.7 ms; predicted 30 ms
//   n = 14336, p = 4096:     2.7 TFLOP, 44 ms;  predicted 150 ms
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/solve_threads.h"

namespace statsmerge::cuda {

// What the host reads back about every system.
struct Flags {
  int not_finite, unproven, not_factorised;
};

// out = the symmetric matrices whose lower triangles are in `in`, [batches, n, n]; a block takes a tile and its mirror
// image.
template <class T>
__global__ void __launch_bounds__(256) mirror_kernel(const T* in, int64_t n, int64_t tiles, double* out, Flags* flags) {
  __shared__ double tile[kMirrorTile][kMirrorTile + 1];
  const int64_t batch = blockIdx.x / tiles;
  const auto [tile_row, tile_column] = triangle_tile(blockIdx.x % tiles);
  const int64_t row = tile_row * kMirrorTile, column = tile_column * kMirrorTile;
  const int x = static_cast<int>(threadIdx.x % 32), y = static_cast<int>(threadIdx.x / 32);
  in += batch * n * n;
  out += batch * n * n;
  for (int r = y; r < kMirrorTile; r += 8) {
    const int64_t i = row + r, j = column + x;
    if (i < n && j <= i) {
      const double value = static_cast<double>(in[i * n + j]);
      if (!isfinite(value)) flags[batch].not_finite = 1;
      tile[r][x] = value;
      out[i * n + j] = value;
    }
  }
  __syncthreads();
  for (int r = y; r < kMirrorTile; r += 8) {
    const int64_t i = column + r, j = row + x;
    if (j < n && i < j) out[i * n + j] = tile[x][r];
  }
}

// norms[row] = (Σ|x|, Σx²) of every row of [rows, n]; one warp for each.
__global__ void __launch_bounds__(256) row_norms_kernel(const double* x, int64_t rows, int64_t n, double2* norms) {
  const int64_t row = (blockIdx.x * int64_t{256} + threadIdx.x) / 32;
  if (row >= rows) return;
  double sum = 0, squares = 0;
  for (int64_t j = threadIdx.x % 32; j < n; j += 32) {
    const double value = x[row * n + j];
    sum += fabs(value);
    squares += value * value;
  }
  sum = warp_sum(sum);
  squares = warp_sum(squares);
  if (threadIdx.x % 32 == 0) norms[row] = make_double2(sum, squares);
}

// shift[b] = max(rcond, n · eps) times a bound on the largest eigenvalue of system b: the smaller of the largest row sum
// and the Frobenius norm. One warp for each.
__global__ void __launch_bounds__(32) shift_kernel(const double2* norms, int64_t n, double rcond, double* shift) {
  double largest = 0, squares = 0;
  for (int64_t i = threadIdx.x; i < n; i += 32) {
    const double2 norm = norms[blockIdx.x * n + i];
    largest = fmax(largest, norm.x);
    squares += norm.y;
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  }
  const double bound = fmin(largest, sqrt(warp_sum(squares)));
  if (threadIdx.x == 0) shift[blockIdx.x] = spectrum_threshold(bound, n, rcond);
}

// x[b, i, i] += value, or − each[b] where there is `each`.
__global__ void __launch_bounds__(256) add_to_diagonal_kernel(double* x, int64_t batches, int64_t n, double value,
                                                              const double* each) {
  const int64_t e = blockIdx.x * int64_t{256} + threadIdx.x;
  if (e >= batches * n) return;
  const int64_t batch = e / n, i = e % n;
  x[(batch * n + i) * n + i] += each == nullptr ? value : -each[batch];
}

// The Cholesky factors of the diagonal blocks at `first` of every matrix, in place; one block for each. Sets a flag where
// a block is not positive definite: `failed` is that of the first system, `stride` apart.
__global__ void __launch_bounds__(kLeafThreads) factor_kernel(double* matrices, int64_t n, int64_t first, int size,
                                                              int* failed, int64_t stride) {
  __shared__ double leaf[kLeaf * kLeafPitch];
  const int thread = static_cast<int>(threadIdx.x);
  const LeafBlock block{matrices + (blockIdx.x * n + first) * n + first, n, size};
  load_leaf(block, leaf, thread);
  for (int j = 0; j < size; ++j) {
    __syncthreads();
    factor_step(leaf, size, j, thread);
  }
  __syncthreads();
  store_factor(leaf, block, thread);
  if (thread == 0 && !positive_pivots(leaf, size)) failed[blockIdx.x * stride] = 1;
}

// Right-hand sides of every system: `count` rows of a leaf's width, in place.
struct Rows {
  double* data;
  int64_t batch_stride, row_stride, count;
};

// Substitutes with the leaf at `first`; blocks: tiles of kRowTile rows, system by system.
__global__ void __launch_bounds__(kLeafThreads) substitute_kernel(const double* matrices, int64_t n, int64_t first, int size,
                                                                  Rows rows, int64_t tiles, bool forward) {
  __shared__ double leaf[kLeaf * kLeafPitch];
  __shared__ double tile[kRowTile * kLeafPitch];
  const int thread = static_cast<int>(threadIdx.x), row = thread / kRowLanes, lane = thread % kRowLanes;
  const int64_t batch = blockIdx.x / tiles, i = blockIdx.x % tiles * kRowTile + row;
  const LeafBlock block{const_cast<double*>(matrices) + (batch * n + first) * n + first, n, size};
  load_leaf(block, leaf, thread);
  double* r = tile + row * kLeafPitch;
  double* out = rows.data + batch * rows.batch_stride + i * rows.row_stride;
  const bool valid = i < rows.count;
  for (int j = lane; j < size; j += kRowLanes) r[j] = valid ? out[j] : 0.0;
  __syncthreads();
  for (int step = 0; step < size; ++step) {
    substitute_step(leaf, r, size, forward ? step : size - 1 - step, forward, lane, kRowLanes);
    __syncwarp();  // a row's lanes are in one warp
  }
  for (int j = lane; j < size; j += kRowLanes) {
    if (valid) out[j] = r[j] / leaf[j * kLeafPitch + j];
  }
}

// y = matrix · x for the matrices [batches, n, n] and a vector each; one warp for every row.
__global__ void __launch_bounds__(256) product_kernel(const double* matrices, int64_t rows, int64_t n, const double* x,
                                                      int64_t x_stride, double* y) {
  const int64_t row = (blockIdx.x * int64_t{256} + threadIdx.x) / 32;
  if (row >= rows) return;
  const double* vector = x + row / n * x_stride;
  double sum = 0;
  for (int64_t j = threadIdx.x % 32; j < n; j += 32) sum += matrices[row * n + j] * vector[j];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) y[row] = sum;
}

constexpr int kForwardRows = 64, kBackwardColumns = 256;  // entries of the vector that a block updates

// One leaf of a triangular solve with a single vector for every system. `rest` [batches, n] holds what is left of the
// right-hand sides; the leaf's part of the solution goes to `solution`, a different vector, because every block needs the
// leaf's part of `rest`. Blocks: parts of the entries that are left, system by system.
__global__ void __launch_bounds__(256) leaf_vector_kernel(const double* factors, int64_t n, int64_t first, int size,
                                                          double* rest, double* solution, int64_t parts, bool forward) {
  __shared__ double leaf[kLeaf * kLeafPitch];
  __shared__ double x[kLeaf];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int64_t batch = blockIdx.x / parts, part = blockIdx.x % parts;
  const double* factor = factors + batch * n * n;
  rest += batch * n;
  solution += batch * n;
  load_leaf({const_cast<double*>(factor) + first * n + first, n, size}, leaf, thread);
  if (thread < size) x[thread] = rest[first + thread];
  __syncthreads();
  if (thread < 32) {
    for (int step = 0; step < size; ++step) {
      substitute_step(leaf, x, size, forward ? step : size - 1 - step, forward, lane, 32);
      __syncwarp();
    }
    for (int j = lane; j < size; j += 32) {
      x[j] /= leaf[j * kLeafPitch + j];
      if (part == 0) solution[first + j] = x[j];
    }
  }
  __syncthreads();
  if (forward) {
    const int64_t begin = first + size + part * kForwardRows;
    const int64_t end = begin + kForwardRows < n ? begin + kForwardRows : n;
    for (int64_t i = begin + thread / 32; i < end; i += 8) {
      const double product = warp_sum(forward_product(factor, n, first, size, x, i, lane));
      if (lane == 0) rest[i] -= product;
    }
  } else {
    const int64_t i = part * kBackwardColumns + thread;
    if (i < first) rest[i] -= backward_product(factor, n, first, size, x, i);
  }
}

constexpr int kLanczosThreads = 512;

// The basis of every system is [kLanczosSteps + 1, n]; `tridiagonal` [2, kLanczosSteps] has its diagonal and couplings.
__device__ inline double block_squares(const double* y, int64_t n) {
  __shared__ double sums[kLanczosThreads / 32];
  double sum = 0;
  for (int64_t j = threadIdx.x; j < n; j += kLanczosThreads) sum += y[j] * y[j];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kLanczosThreads / 32; ++w) total += sums[w];
  return total;
}

__device__ inline void store_normalized(const double* y, int64_t n, double norm, double* out) {
  for (int64_t j = threadIdx.x; j < n; j += kLanczosThreads) out[j] = norm > 0.0 ? y[j] / norm : 0.0;
}

__global__ void __launch_bounds__(kLanczosThreads) lanczos_start_kernel(int64_t n, double* basis) {
  double* first = basis + blockIdx.x * (kLanczosSteps + 1) * n;
  for (int64_t j = threadIdx.x; j < n; j += kLanczosThreads) first[j] = start_entry(j);
  __syncthreads();
  const double norm = sqrt(block_squares(first, n));
  store_normalized(first, n, norm, first);
}

// Step s: y [batches, n], the operator's product with basis vector s, is orthogonalised against the basis, twice, and
// becomes vector s + 1. One block for every system.
__global__ void __launch_bounds__(kLanczosThreads) lanczos_step_kernel(int64_t n, int s, double* y, double* basis,
                                                                       double* tridiagonal) {
  __shared__ double overlap[kLanczosSteps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  y += blockIdx.x * n;
  basis += blockIdx.x * (kLanczosSteps + 1) * n;
  tridiagonal += blockIdx.x * 2 * kLanczosSteps;
  for (int pass = 0; pass < 2; ++pass) {
    for (int v = warp; v <= s; v += kLanczosThreads / 32) {
      double sum = 0;
      for (int64_t j = lane; j < n; j += 32) sum += y[j] * basis[v * n + j];
      sum = warp_sum(sum);
      if (lane == 0) overlap[v] = sum;
    }
    __syncthreads();
    if (pass == 0 && threadIdx.x == 0) tridiagonal[s] = overlap[s];
    for (int64_t j = threadIdx.x; j < n; j += kLanczosThreads) {
      double value = y[j];
      for (int v = 0; v <= s; ++v) value -= overlap[v] * basis[v * n + j];
      y[j] = value;
    }
    __syncthreads();
  }
  const double norm = sqrt(block_squares(y, n));
  if (threadIdx.x == 0) tridiagonal[kLanczosSteps + s] = norm;
  store_normalized(y, n, norm, basis + (s + 1) * n);
}

// rank = n and condition = the product of the largest eigenvalues that Lanczos saw of the matrix and of its inverse; one
// thread for every system.
__global__ void __launch_bounds__(64) condition_kernel(const double* of_matrix, const double* of_inverse, int64_t batches,
                                                       int64_t n, int steps, int64_t* rank, double* condition) {
  const int64_t b = blockIdx.x * int64_t{64} + threadIdx.x;
  if (b >= batches) return;
  const double* a = of_matrix + b * 2 * kLanczosSteps;
  const double* i = of_inverse + b * 2 * kLanczosSteps;
  rank[b] = n;
  condition[b] = largest_eigenvalue(a, a + kLanczosSteps, steps) * largest_eigenvalue(i, i + kLanczosSteps, steps);
}

// inverse = 1/value where a value is kept, else 0, and what that makes of rank and condition; `values` [batches, count],
// ascending or descending. The threshold is that of `n` values. One warp for every system.
__global__ void __launch_bounds__(32) invert_spectrum_kernel(const double* values, int64_t count, double rcond, bool squared,
                                                             double* inverse, int64_t* rank, double* condition) {
  values += blockIdx.x * count;
  inverse += blockIdx.x * count;
  const double largest = fmax(values[0], values[count - 1]);
  const double threshold = spectrum_threshold(largest, count, rcond);
  double smallest = INFINITY, kept = 0;
  for (int64_t i = threadIdx.x; i < count; i += 32) {
    const bool keep = values[i] > threshold;
    inverse[i] = keep ? 1.0 / values[i] : 0.0;
    if (keep) smallest = fmin(smallest, values[i]);
    kept += keep;
  }
  kept = warp_sum(kept);
  for (int distance = 16; distance > 0; distance /= 2) {
    smallest = fmin(smallest, __shfl_xor_sync(0xffffffffu, smallest, distance));
  }
  if (threadIdx.x == 0) {
    const double ratio = kept > 0 ? largest / smallest : 1.0;
    rank[blockIdx.x] = static_cast<int64_t>(kept);
    condition[blockIdx.x] = squared ? ratio * ratio : ratio;
  }
}

}  // namespace statsmerge::cuda
