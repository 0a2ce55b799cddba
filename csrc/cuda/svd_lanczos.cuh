// Block Lanczos on AᵀA with full reorthogonalisation and thick restarts (Wu and Simon 2000; Baglama and Reichel 2005):
// all that is done with one matrix between two passes over it, in one block of threads.
//
// When the Ritz pairs look converged, the basis is given up for the leading Ritz vectors alone, whose images the next
// pass measures anew. The rounding error of that pass is in proportion to each image, not to the largest one, so what
// is then reported is good to rounding error times the largest singular value, and its bound includes that error.
#pragma once

#include "cuda/svd_passes.cuh"
#include "cuda/svd_small.cuh"

namespace statsmerge::cuda::svd {

constexpr int kStepThreads = 384;

template <class Acc>
constexpr double kRounding = 8.0 * std::numeric_limits<Acc>::epsilon();

// Shared memory of a block between two passes.
struct StepWork {
  EigenWork eigen;
  Sums sums;
  char* along;         // [capacity][kGroup] Acc, of one orthogonalisation
  double* components;  // [capacity][block] of the images along the basis
  double* residual;    // [k + 1]
  double* sigma;       // [k + 1]
  double* reach;       // [k + 1]
  int* converged;      // [1]
};

STATSMERGE_HD_PHASE StepWork take_step_work(const Problem& p, Arena& arena) {
  const int64_t size = p.capacity;
  const int64_t sums = p.k > size ? p.k : size;
  StepWork w{};
  w.eigen = {arena.take<double>(size * size), arena.take<double>(size * size),      arena.take<double>(size),
             arena.take<int>(size),           arena.take<Rotation>(size / 2 + 1), arena.take<int>(size / 2 + 1)};
  w.sums = {arena.take<double>(sums * kParts), arena.take<double>(sums)};
  w.along = reinterpret_cast<char*>(arena.take<double>(size * kGroup));
  w.components = arena.take<double>(size * p.block);
  w.residual = arena.take<double>(p.k + 1);
  w.sigma = arena.take<double>(p.k + 1);
  w.reach = arena.take<double>(p.k + 1);
  w.converged = arena.take<int>(1);
  return w;
}

// The power of two that brings `largest` near 1, as far as the square of it is within Acc's range.
template <class Acc>
STATSMERGE_HD double scale_for(double largest) {
  if (!(largest > 0)) return 1;
  constexpr int kLimit = sizeof(Acc) == sizeof(float) ? 100 : 1000;
  int exponent;
  frexp(largest, &exponent);
  exponent = exponent > kLimit ? kLimit : exponent < -kLimit ? -kLimit : exponent;
  return ldexp(1.0, -exponent);
}

STATSMERGE_HD void write_moments(const Moments& m, double origin, double count, double* out) {
  const double shift = m.deviation / count, variance = m.squared_deviation / count - shift * shift;
  out[0] = origin + shift;
  out[1] = variance > 0 ? variance : 0;
  out[2] = sqrt(m.square);
}

// The rows of `image` become the pending block, after `filled` basis vectors.
template <class Acc>
STATSMERGE_HD_PHASE void store_pending(const Block& block, const Problem& p, const Matrix& a, const Progress& at) {
  const int64_t n = a.columns;
  const Acc* image = reinterpret_cast<const Acc*>(a.image);
  Acc* basis = reinterpret_cast<Acc*>(a.basis) + at.filled * n;
  auto* factors = reinterpret_cast<Quad<Acc>*>(a.block);
  const Acc scale = static_cast<Acc>(at.scale);
  block.each(n * p.groups(), [&](int64_t i) {
    const int64_t g = i / n, e = i % n;
    Quad<Acc> quad;
    for (int j = 0; j < kGroup; ++j) {
      const Acc value = image[(g * kGroup + j) * n + e];
      basis[(g * kGroup + j) * n + e] = value;
      quad.v[j] = value * scale;
    }
    factors[g * padded_columns(a) + padded_position(a, e)] = quad;
  });
}

// After the inspection: scale and random start. Returns whether there is nothing more to do.
template <class Acc>
STATSMERGE_HD_PHASE bool begin(const Block& block, const Problem& p, const Matrix& a, const StepWork& work) {
  auto* shared = reinterpret_cast<Moments*>(work.eigen.t);  // kPassThreads Moments are less than capacity² doubles
  block.each(kPassThreads, [&](int64_t i) {
    Moments m{};
    for (int64_t b = i; b < product_blocks(a); b += kPassThreads) add(m, a.moments[b]);
    shared[i] = m;
  });
  for (int half = kPassThreads / 2; half > 0; half /= 2) {
    block.each(half, [&](int64_t i) { add(shared[i], shared[i + half]); });
  }
  const Moments total = shared[0];
  Progress at{};
  at.bad = !(total.largest <= finite_limit<double>());
  at.done = at.bad || a.k == 0;
  at.scale = scale_for<Acc>(total.largest);
  if (a.out_statistics != nullptr) {
    block.each(1, [&](int64_t) {
      with_reader<Acc>(a, [&](const auto& reader) {
        write_moments(total, static_cast<double>(reader.element(0, 0)),
                      static_cast<double>(a.rows) * static_cast<double>(a.columns), a.out_statistics);
      });
    });
  }
  if (!at.done) {
    const Same everything{std::numeric_limits<double>::infinity()};
    at.rank = orthonormalize(block, reinterpret_cast<Acc*>(a.basis), 0, reinterpret_cast<Acc*>(a.image), p.block,
                             a.columns, 0, everything, p.seed, 0, work.sums, nullptr);
    at.draws = p.block;
    at.next_check = 2 * p.block;
    store_pending<Acc>(block, p, a, at);
  }
  block.each(1, [&](int64_t) { *a.progress = at; });
  return at.done;
}

// image = Σ of the partial products, split by split.
template <class Acc>
STATSMERGE_HD_PHASE void gather_image(const Block& block, const Problem& p, const Matrix& a) {
  const int64_t n = a.columns;
  const auto* partial = reinterpret_cast<const Quad<Acc>*>(a.partial);
  Acc* image = reinterpret_cast<Acc*>(a.image);
  const int count = splits(a);
  block.each(n * p.groups(), [&](int64_t i) {
    Quad<Acc> sum = partial[i];
    for (int split = 1; split < count; ++split) {
      const Quad<Acc> part = partial[split * n * p.groups() + i];
      for (int j = 0; j < kGroup; ++j) sum.v[j] += part.v[j];
    }
    for (int j = 0; j < kGroup; ++j) image[(i / n * kGroup + j) * n + i % n] = sum.v[j];
  });
}

// Takes the components along the first `filled` basis vectors off the image, and adds them to `components`.
template <class Acc>
STATSMERGE_HD_PHASE void project_image(const Block& block, const Problem& p, const Matrix& a, int filled,
                                       const StepWork& work) {
  const int64_t n = a.columns;
  const Acc* basis = reinterpret_cast<const Acc*>(a.basis);
  Acc* along = reinterpret_cast<Acc*>(work.along);
  for (int g = 0; g < p.groups(); ++g) {
    Acc* w = reinterpret_cast<Acc*>(a.image) + g * kGroup * n;
    block.each_warp(filled, [&](int i, const Warp& warp) {
      const Acc* q = basis + i * n;
      double total[kGroup];
      warp.sums(total, [&](int lane, double(&share)[kGroup]) {
        Acc sum[kGroup] = {};
        for (int64_t e = lane; e < n; e += kWarp) {
          const Acc x = q[e];
          STATSMERGE_UNROLL
          for (int j = 0; j < kGroup; ++j) sum[j] += x * w[j * n + e];
        }
        STATSMERGE_UNROLL
        for (int j = 0; j < kGroup; ++j) share[j] += static_cast<double>(sum[j]);
      });
      warp.each(kGroup, [&](int j) {
        const double value = j == 0 ? total[0] : j == 1 ? total[1] : j == 2 ? total[2] : total[3];
        along[i * kGroup + j] = static_cast<Acc>(value);
        work.components[i * p.block + g * kGroup + j] += value;
      });
    });
    block.each(n, [&](int64_t e) {
      Acc x[kGroup];
      STATSMERGE_UNROLL
      for (int j = 0; j < kGroup; ++j) x[j] = w[j * n + e];
      for (int i = 0; i < filled; ++i) {
        const Acc q = basis[i * n + e];
        STATSMERGE_UNROLL
        for (int j = 0; j < kGroup; ++j) x[j] -= along[i * kGroup + j] * q;
      }
      STATSMERGE_UNROLL
      for (int j = 0; j < kGroup; ++j) w[j * n + e] = x[j];
    });
  }
}

// Singular values and bounds from the Ritz pairs; true when every bound is within tolerance, or as small as rounding
// error lets it be. With r the residual of the singular pair, a singular value lies within r of σ, and within r²/gap if
// no other is nearer than gap (Kato and Temple); the neighbours' own residuals are taken off the gap. A report, unlike
// a look ahead, has the rounding error of the images in its bounds. That is in proportion to the largest image until
// the leading Ritz vectors have been measured by themselves, after which the other images have nothing of theirs.
template <class Acc>
STATSMERGE_HD_PHASE bool estimate(const Block& block, const Problem& p, const Matrix& a, const Progress& at,
                                  bool report, const StepWork& work) {
  const bool measured = at.verifications > 0;
  const int count = a.k + 1 < at.filled ? a.k + 1 : at.filled;
  block.each(count, [&](int64_t i) {
    const double* tail = work.eigen.vectors + work.eigen.order[i] * p.capacity + at.filled - p.block;
    double square = 0;
    for (int row = 0; row < p.block; ++row) {
      double component = 0;
      for (int c = 0; c < p.block; ++c) component += a.coupling[row * p.block + c] * tail[c];
      square += component * component;
    }
    work.residual[i] = sqrt(square);
  });
  block.each(1, [&](int64_t) {
    const double top = work.eigen.values[work.eigen.order[0]];
    const double theta_max = top > 0 ? top : 0, sigma_max = sqrt(theta_max), floor = kRounding<Acc> * sigma_max;
    const auto noise = [&](double sigma) { return floor * (measured ? (sigma > floor ? sigma : floor) : sigma_max); };
    for (int i = 0; i < count; ++i) {
      double theta = work.eigen.values[work.eigen.order[i]];
      if (!(theta > (measured ? floor * floor : report ? floor * sigma_max : 0.0))) theta = 0;
      const double sigma = sqrt(theta), r = work.residual[i] + (report ? noise(sigma) : 0);
      work.sigma[i] = sigma;
      work.reach[i] = theta > r ? r / (sqrt(2.0) * sigma) : sqrt(theta + r);
    }
    const double tol = report ? p.tol : 0.7 * p.tol;
    bool converged = true;
    for (int i = 0; i < a.k; ++i) {
      const double sigma = work.sigma[i], reach = work.reach[i];
      double gap = i + 1 < count ? sigma - work.sigma[i + 1] - work.reach[i + 1] : 0;
      if (i > 0) gap = fmin(gap, work.sigma[i - 1] - work.reach[i - 1] - sigma);
      double bound = gap > reach ? reach * reach / gap : reach;
      const double rounding = measured ? floor / 2 : sigma > 0 ? fmin(floor * sigma_max / sigma, reach) : reach;
      if (report) bound = fmax(bound, rounding);
      converged = converged && (bound <= tol * sigma || work.residual[i] <= noise(sigma));
      a.s[i] = sigma / at.scale;
      a.bound[i] = bound / at.scale;
    }
    *work.converged = converged;
  });
  return *work.converged != 0;
}

// Everything between a pass and the next: the image of the pending block gives new columns of the projected matrix, and
// what it has outside the basis becomes the next block; from time to time the Ritz pairs are examined. Returns whether
// the matrix is done. With vectors wanted, the pending block then holds the right ones.
template <class Acc>
STATSMERGE_HD_PHASE bool advance(const Block& block, const Problem& p, const Matrix& a, const StepWork& work) {
  constexpr double eps = std::numeric_limits<Acc>::epsilon();
  Progress at = *a.progress;
  const int n = a.columns, s = p.block, ld = p.capacity, old = at.filled;
  Acc* basis = reinterpret_cast<Acc*>(a.basis);
  Acc* image = reinterpret_cast<Acc*>(a.image);
  Acc* spare = reinterpret_cast<Acc*>(a.spare);
  at.filled += s;
  ++at.passes;

  gather_image<Acc>(block, p, a);
  dots(block, image, s, image, n, n, work.sums);
  for (int c = 0; c < s; ++c) at.largest = fmax(at.largest, sqrt(work.sums.sums[c]));
  block.each(at.filled * s, [&](int64_t i) { work.components[i] = 0; });
  for (int round = 0; round < 2; ++round) project_image<Acc>(block, p, a, at.filled, work);
  block.each(at.filled * s, [&](int64_t i) {
    const int row = static_cast<int>(i) / s, c = static_cast<int>(i) % s;
    if (row > old + c) return;  // of two images along each other the shorter one, which comes later, is the exacter
    a.projected[row * ld + old + c] = a.projected[(old + c) * ld + row] = work.components[i];
  });
  // What an image's own rounding error amounts to: that is in proportion to ‖A‖ ‖A v‖.
  const double noise = 2 * kRounding<Acc> * sqrt(at.largest);
  const auto negligible = [&](int c) {
    const double length = sqrt(fmax(work.components[(old + c) * s + c], 0.0));
    return noise * fmax(length, noise);
  };
  at.rank = orthonormalize(block, basis, at.filled, image, s, n, at.rank, negligible, p.seed, at.draws, work.sums,
                           a.coupling);
  at.draws += s;

  const bool last = at.passes >= p.max_passes, nearly_last = at.passes + 1 >= p.max_passes;
  const bool room = at.filled + s <= p.capacity;
  if (at.verifying || nearly_last || !room || at.rank >= n || at.filled >= at.next_check) {
    block.each(at.filled * at.filled, [&](int64_t i) {
      const int64_t at_ld = i / at.filled * ld + i % at.filled;
      work.eigen.t[at_ld] = a.projected[at_ld];
    });
    symmetric_eigen(block, work.eigen, at.filled, ld, at.verifying ? 0.0 : eps * 1e-3);
    const bool report = at.verifying || last;
    const bool converged = estimate<Acc>(block, p, a, at, report, work);
    const double* ritz = work.eigen.vectors;
    if (last || (converged && report) || (at.verifying && at.verifications >= kVerifications)) {
      at.done = true;
      if (p.vectors) {
        combine(block, ritz, work.eigen.order, ld, a.k, basis, at.filled, n, image);
        orthonormalize(block, basis, 0, image, a.k, n, 0, Same{0.5}, p.seed, at.draws, work.sums, nullptr);
        block.each(static_cast<int64_t>(s - a.k) * n, [&](int64_t i) { image[static_cast<int64_t>(a.k) * n + i] = 0; });
        at.filled = 0;
      }
    } else if ((converged || nearly_last) && !at.verifying) {
      combine(block, ritz, work.eigen.order, ld, s, basis, at.filled, n, image);
      at.rank = orthonormalize(block, basis, 0, image, s, n, 0, Same{0.5}, p.seed, at.draws, work.sums, nullptr);
      at.draws += s;
      at.filled = 0;
      at.verifying = true;
      ++at.verifications;
    } else {
      if (!room) {
        combine(block, ritz, work.eigen.order, ld, p.keep, basis, at.filled, n, spare);
        block.each(static_cast<int64_t>(p.keep) * n, [&](int64_t i) { basis[i] = spare[i]; });
        block.each(p.keep * p.keep, [&](int64_t i) {
          const int row = static_cast<int>(i) / p.keep, c = static_cast<int>(i) % p.keep;
          a.projected[row * ld + c] = row == c ? work.eigen.values[work.eigen.order[row]] : 0;
        });
        at.rank -= at.filled - p.keep;
        at.filled = p.keep;
      }
      at.verifying = false;
      at.next_check = at.filled + (at.filled / 4 > s ? at.filled / 4 : s) + (room ? 0 : s);
    }
  }
  if (!at.done || p.vectors) store_pending<Acc>(block, p, a, at);
  block.each(1, [&](int64_t) { *a.progress = at; });
  return at.done;
}

// NaN for all results of a matrix that is not finite.
template <class Out>
STATSMERGE_HD_PHASE void write_bad(const Block& block, const Problem& p, const Matrix& a) {
  const int64_t left = p.vectors ? a.transposed ? a.columns : a.rows : 0;
  const int64_t right = p.vectors ? a.transposed ? a.rows : a.columns : 0;
  block.each(a.k, [&](int64_t i) {
    if (a.out_s != nullptr) reinterpret_cast<Out*>(a.out_s)[i] = static_cast<Out>(NAN);
    if (a.out_residual != nullptr) reinterpret_cast<Out*>(a.out_residual)[i] = static_cast<Out>(NAN);
    if (a.out_statistics != nullptr) a.out_statistics[3 + i] = NAN;
  });
  block.each(a.k * left, [&](int64_t i) { reinterpret_cast<Out*>(a.out_u)[i] = static_cast<Out>(NAN); });
  block.each(a.k * right, [&](int64_t i) { reinterpret_cast<Out*>(a.out_vh)[i] = static_cast<Out>(NAN); });
}

// Writes the results of one matrix; with vectors, `y` holds the images of the right ones.
template <class Acc>
STATSMERGE_HD_PHASE void write_results(const Block& block, const Problem& p, const Matrix& a, const StepWork& work) {
  const int n = a.columns, m = a.rows;
  if (a.out_passes != nullptr) {
    block.each(1, [&](int64_t) { *a.out_passes = a.progress->passes + 1 + (p.vectors ? 1 : 0); });
  }
  if (a.progress->bad) return write_bad<Acc>(block, p, a);
  block.each(a.k, [&](int64_t i) {
    if (a.out_s != nullptr) reinterpret_cast<Acc*>(a.out_s)[i] = static_cast<Acc>(a.s[i]);
    if (a.out_residual != nullptr) reinterpret_cast<Acc*>(a.out_residual)[i] = static_cast<Acc>(a.bound[i]);
    if (a.out_statistics != nullptr) a.out_statistics[3 + i] = a.s[i];
  });
  if (!p.vectors || a.k == 0) return;
  Acc* u = reinterpret_cast<Acc*>(a.out_u);
  Acc* vh = reinterpret_cast<Acc*>(a.out_vh);
  const auto* y = reinterpret_cast<const Quad<Acc>*>(a.y);
  const Acc* right = reinterpret_cast<const Acc*>(a.image);
  Acc* left = reinterpret_cast<Acc*>(a.left);
  block.each(static_cast<int64_t>(a.k) * m, [&](int64_t i) {
    left[i] = y[i / m / kGroup * m + i % m].v[i / m % kGroup];
  });
  dots(block, left, a.k, left, m, m, work.sums);
  double largest = 0;
  for (int i = 0; i < a.k; ++i) largest = fmax(largest, sqrt(work.sums.sums[i]));
  orthonormalize(block, left, 0, left, a.k, m, 0, Same{kRounding<Acc> * largest}, p.seed, 0, work.sums, nullptr);
  block.each(static_cast<int64_t>(a.k) * m, [&](int64_t i) {
    const int64_t j = i / m, e = i % m;
    (a.transposed ? vh[i] : u[e * a.k + j]) = left[i];
  });
  block.each(static_cast<int64_t>(a.k) * n, [&](int64_t i) {
    const int64_t j = i / n, e = i % n;
    (a.transposed ? u[e * a.k + j] : vh[i]) = right[i];
  });
}

}  // namespace statsmerge::cuda::svd
