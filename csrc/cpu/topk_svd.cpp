// topk_svd and weight_statistics on the CPU. Thin or small matrices: one-sided Jacobi, exact in double. Others: block Lanczos on
// AᵀA in double with full reorthogonalisation and thick restarts. Each pass reads the matrix once, in its own element type, and
// computes Aᵀ(A V) row by row. Matrices are cut into parts by their shape alone, so results don't depend on the threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "common/tensors.h"
#include "cpu/symmetric_eigen.h"
#include "cpu/vector_ops.h"

namespace statsmerge {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int64_t kDenseSide = 32;            // matrices with at most this many rows or columns are decomposed directly
constexpr int64_t kDenseElements = 1 << 19;   // ... unless they are long
constexpr int64_t kShared = 1 << 18;          // elements from which on the threads share one matrix
constexpr int64_t kBasis = 96;                // Lanczos vectors kept between restarts, unless k needs more

template <class T>
STATSMERGE_CLONES void load_run(const T* x, int64_t n, double* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = static_cast<double>(widen(x[j]));
}

// Differences of float32 values are rounded to float32, as a task vector formed beforehand would be.
template <class T, class U>
STATSMERGE_CLONES void subtract_run(const T* x, const U* y, int64_t n, double* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = static_cast<double>(widen(x[j]) - widen(y[j]));
}

STATSMERGE_CLONES void multiply_run(double factor, int64_t n, double* x) {
  for (int64_t j = 0; j < n; ++j) x[j] *= factor;
}

STATSMERGE_CLONES double largest_magnitude(const double* x, int64_t n) {
  double largest = 0, poison = 0;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
  for (int64_t j = 0; j < n; ++j) {
    largest = largest > std::abs(x[j]) ? largest : std::abs(x[j]);
    poison += x[j] * 0.0;  // NaN for NaN and Inf
  }
  return poison == 0 ? largest : std::numeric_limits<double>::quiet_NaN();
}

// A matrix, minus another one of its shape if there is one. Rows run along the contiguous dimension: a column-major tensor is
// seen as its transpose.
class Operand {
 public:
  Operand(const Tensor& mat, const Tensor* minus)
      : transposed_(mat.stride(0) == 1 && mat.stride(1) != 1), mat_(transposed_ ? aten::transpose(mat) : mat) {
    if (mat_.stride(1) != 1) mat_ = dense(mat_);
    storage_ = storage_of(mat_, "mats");
    if (minus) {
      minus_ = transposed_ ? aten::transpose(*minus) : *minus;
      if (minus_->stride(1) != 1) minus_ = dense(*minus_);
      minus_storage_ = storage_of(*minus_, "minus");
    }
    rows = mat_.sizes()[0];
    columns = mat_.sizes()[1];
    row_stride_ = mat_.stride(0);
    minus_stride_ = minus_ ? minus_->stride(0) : 0;
  }

  bool transposed() const { return transposed_; }

  void load_row(int64_t row, double* out) const {
    dispatch_storage(storage_, [&](auto* type) {
      const auto* x = reinterpret_cast<decltype(type)>(bytes(mat_)) + row * row_stride_;
      if (!minus_) return load_run(x, columns, out);
      dispatch_storage(minus_storage_, [&](auto* other) {
        subtract_run(x, reinterpret_cast<decltype(other)>(bytes(*minus_)) + row * minus_stride_, columns, out);
      });
    });
    if (scale_ != 1) multiply_run(scale_, columns, out);
  }

  // Calls f(part, first row, last row) for every part of the rows, in parallel.
  template <class F>
  void for_parts(const F& f) const {
    parallel_for(0, parts(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) f(p, p * rows / parts(), (p + 1) * rows / parts());
    });
  }
  int64_t parts() const { return std::clamp<int64_t>(rows * columns / kShared, 1, std::min<int64_t>(16, rows)); }

  // Reads everything once. Throws where a value is not finite, and brings extreme float64 values within range of their squares.
  void inspect(int64_t index) {
    std::vector<double> largest(static_cast<size_t>(parts()), 0.0);
    for_parts([&](int64_t part, int64_t first, int64_t last) {
      std::vector<double> row(static_cast<size_t>(columns));
      for (int64_t i = first; i < last; ++i) {
        load_row(i, row.data());
        const double value = largest_magnitude(row.data(), columns);
        if (!(value <= largest[part])) largest[part] = value;
        if (std::isnan(value)) break;
      }
    });
    double all = 0;
    for (double value : largest) {
      check(std::isfinite(value), indexed("mats", index), minus_ ? indexed(" - minus", index) : "", " contains NaN or Inf");
      all = std::max(all, value);
    }
    if (all != 0 && (all > 0x1p300 || all < 0x1p-300)) scale_ = std::ldexp(1.0, -std::ilogb(all));
  }
  double scale() const { return scale_; }

  int64_t rows, columns;

 private:
  bool transposed_;
  Tensor mat_;
  std::optional<Tensor> minus_;
  Storage storage_, minus_storage_ = Storage::f32;
  int64_t row_stride_, minus_stride_;
  double scale_ = 1;
};

// Rows of doubles.
struct Rows {
  Rows() = default;
  Rows(int64_t count, int64_t length) : length(length), values(static_cast<size_t>(count * length), 0.0) {}
  double* operator[](int64_t i) { return values.data() + i * length; }
  const double* operator[](int64_t i) const { return values.data() + i * length; }

  int64_t length = 0;
  std::vector<double> values;
};

// out[c] += Σ_r factors[r][c] rows[r], four rows and one c at a time.
STATSMERGE_CLONES void add_four_rows(const double* r0, const double* r1, const double* r2, const double* r3, double f0, double f1,
                                     double f2, double f3, double* out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] += f0 * r0[j] + f1 * r1[j] + f2 * r2[j] + f3 * r3[j];
}

STATSMERGE_CLONES void dot_four_rows(const double* r0, const double* r1, const double* r2, const double* r3, const double* v,
                                     double* out, int64_t n) {
  double s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t j = 0; j < n; ++j) {
    s0 += r0[j] * v[j];
    s1 += r1[j] * v[j];
    s2 += r2[j] * v[j];
    s3 += r3[j] * v[j];
  }
  out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
}

// w[c] = Aᵀ(A v[c]) for `count` vectors: one pass over A.
void normal_product(const Operand& a, const double* v, int64_t count, double* w) {
  const int64_t n = a.columns;
  std::vector<Rows> partial(static_cast<size_t>(a.parts()));
  a.for_parts([&](int64_t part, int64_t first, int64_t last) {
    Rows& sum = partial[part] = Rows(count, n);
    Rows tile(4, n);
    double y[4];
    for (int64_t i = first; i < last; i += 4) {
      for (int64_t r = 0; r < 4; ++r) {
        if (i + r < last) {
          a.load_row(i + r, tile[r]);
        } else {
          std::fill(tile[r], tile[r] + n, 0.0);
        }
      }
      for (int64_t c = 0; c < count; ++c) {
        dot_four_rows(tile[0], tile[1], tile[2], tile[3], v + c * n, y, n);
        add_four_rows(tile[0], tile[1], tile[2], tile[3], y[0], y[1], y[2], y[3], sum[c], n);
      }
    }
  });
  std::fill(w, w + count * n, 0.0);
  for (const Rows& sum : partial) axpy(1.0, sum.values.data(), w, count * n);
}

// y[c] = A v[c].
Rows product(const Operand& a, const Rows& v, int64_t count) {
  Rows y(count, a.rows);
  a.for_parts([&](int64_t, int64_t first, int64_t last) {
    std::vector<double> row(static_cast<size_t>(a.columns));
    for (int64_t i = first; i < last; ++i) {
      a.load_row(i, row.data());
      for (int64_t c = 0; c < count; ++c) y[c][i] = dot(row.data(), v[c], a.columns);
    }
  });
  return y;
}

// Reproducible random numbers in [-1, 1) (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  double operator()() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<double>(static_cast<int64_t>(z ^ (z >> 31))) * 0x1p-63;
  }

 private:
  uint64_t state_;
};

// Makes x orthogonal to the first `count` rows of `basis` and of unit length, and returns its length before that. Where
// nothing is left of x (length at most `negligible`), a random direction takes its place and 0 is returned. `count` must be
// smaller than the length of x. The components found along the basis are added to `components` if that is given.
double orthonormalize(const Rows& basis, int64_t count, double negligible, Random& random, double* x,
                      double* components = nullptr) {
  const int64_t n = basis.length;
  const auto project = [&] {
    for (int64_t i = 0; i < count; ++i) {
      const double along = dot(basis[i], x, n);
      axpy(-along, basis[i], x, n);
      if (components) components[i] += along;
    }
  };
  project();
  project();
  double norm = std::sqrt(dot(x, x, n));
  const double length = norm > negligible ? norm : 0;
  components = nullptr;
  while (!(norm > negligible)) {
    negligible = 1e-8;
    for (int64_t j = 0; j < n; ++j) x[j] = random();
    multiply_run(1 / std::sqrt(dot(x, x, n)), n, x);
    project();
    project();
    norm = std::sqrt(dot(x, x, n));
  }
  multiply_run(1 / norm, n, x);
  if (length == 0) {  // a random direction can lose much of its length to the basis: clean it once more
    project();
    multiply_run(1 / std::sqrt(dot(x, x, n)), n, x);
  }
  return length;
}

struct Svd {
  std::vector<double> s, bound;  // [k] singular values, largest first, and how far each may be from a true one
  Rows u, v;                     // [k] left and right vectors, if asked for
  int64_t passes = 0;
};

// All singular values by one-sided Jacobi rotations of the vectors along the shorter side (Demmel and Veselić 1992: small
// singular values come out with high relative accuracy too).
Svd dense_svd(const Operand& a, int64_t k, bool vectors, uint64_t seed) {
  const bool wide = a.rows <= a.columns;
  const int64_t side = std::min(a.rows, a.columns), length = std::max(a.rows, a.columns);
  Rows g(side, length), rotation(side, side);
  std::vector<double> row(static_cast<size_t>(a.columns));
  for (int64_t i = 0; i < a.rows; ++i) {
    a.load_row(i, row.data());
    for (int64_t j = 0; j < a.columns; ++j) (wide ? g[i][j] : g[j][i]) = row[j];
  }
  for (int64_t i = 0; i < side; ++i) rotation[i][i] = 1;
  const auto rotate = [](double* x, double* y, double c, double s, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const double old = x[j];
      x[j] = c * old - s * y[j];
      y[j] = s * old + c * y[j];
    }
  };
  bool rotated = true;
  for (int sweep = 0; sweep < 60 && rotated; ++sweep) {
    rotated = false;
    for (int64_t p = 0; p < side; ++p) {
      for (int64_t q = p + 1; q < side; ++q) {
        const double pp = dot(g[p], g[p], length), qq = dot(g[q], g[q], length), pq = dot(g[p], g[q], length);
        if (std::abs(pq) <= kEps * std::sqrt(pp) * std::sqrt(qq) || pq == 0) continue;
        rotated = true;
        const double zeta = (qq - pp) / (2 * pq);
        const double t = std::copysign(1.0, zeta) / (std::abs(zeta) + std::hypot(1.0, zeta));
        const double c = 1 / std::hypot(1.0, t);
        rotate(g[p], g[q], c, c * t, length);
        rotate(rotation[p], rotation[q], c, c * t, side);
      }
    }
  }
  std::vector<std::pair<double, int64_t>> order;
  for (int64_t i = 0; i < side; ++i) order.emplace_back(-std::sqrt(dot(g[i], g[i], length)), i);
  std::sort(order.begin(), order.end());
  const double largest = -order[0].first;
  Svd out;
  out.passes = 1;
  Rows shorter(k, side), longer(k, length);
  Random random(seed);
  for (int64_t i = 0; i < k; ++i) {
    const double sigma = -order[i].first;
    out.s.push_back(sigma > kEps * length * largest ? sigma : 0.0);
    out.bound.push_back(kEps * length * largest);
    if (!vectors) continue;
    std::copy_n(rotation[order[i].second], side, shorter[i]);
    std::copy_n(g[order[i].second], length, longer[i]);
    orthonormalize(longer, i, kEps * length * largest, random, longer[i]);
  }
  out.u = std::move(wide ? shorter : longer);
  out.v = std::move(wide ? longer : shorter);
  return out;
}

// Block Lanczos on AᵀA with thick restarts (Wu and Simon 2000; Baglama and Reichel 2005).
class Lanczos {
 public:
  Lanczos(const Operand& a, int64_t k, double tol, int64_t max_passes, uint64_t seed)
      : a_(a), n_(a.columns), k_(k), block_(std::min((std::max<int64_t>(k, 4) + 3) / 4 * 4, n_)),
        capacity_(std::min(std::max(kBasis, 6 * block_), n_)), tol_(tol), max_passes_(max_passes), random_(seed),
        basis_(capacity_ + block_, n_), h_(static_cast<size_t>(capacity_ * capacity_), 0.0) {}

  Svd run(bool vectors) {
    Svd out;
    for (int64_t c = 0; c < block_; ++c) orthonormalize(basis_, c, std::numeric_limits<double>::infinity(), random_, basis_[c]);
    pending_ = block_;
    int64_t next_check = std::min(2 * block_, capacity_);
    for (;;) {
      expand();
      ++out.passes;
      const bool last = out.passes >= max_passes_ || filled_ == n_;
      if (filled_ < next_check && !last && filled_ + pending_ <= capacity_) continue;
      next_check = filled_ + std::max(block_, filled_ / 4);
      ritz_ = symmetric_eigen(projected(), filled_);
      if (estimate(out) || last) break;
      if (filled_ + pending_ > capacity_) {
        restart();
        next_check = filled_ + 3 * block_;
      }
    }
    if (vectors) find_vectors(out);
    return out;
  }

 private:
  std::vector<double> projected() const {
    std::vector<double> t(static_cast<size_t>(filled_ * filled_));
    for (int64_t i = 0; i < filled_; ++i) std::copy_n(h_.data() + i * capacity_, filled_, t.data() + i * filled_);
    return t;
  }

  // Takes the pending block into the basis: its image under AᵀA gives new columns of the projected matrix, and what the image
  // has outside the basis becomes the next block.
  void expand() {
    const int64_t old = filled_;
    last_ = pending_;
    filled_ += pending_;
    Rows image(last_, n_);
    normal_product(a_, basis_[old], last_, image[0]);
    std::vector<double> components(static_cast<size_t>(filled_ + last_));
    coupling_.assign(static_cast<size_t>(block_ * block_), 0.0);
    pending_ = std::min(block_, n_ - filled_);
    int64_t found = 0;
    for (int64_t c = 0; c < last_; ++c) {
      const double size = std::sqrt(dot(image[c], image[c], n_));
      largest_ = std::max(largest_, size);
      std::fill(components.begin(), components.end(), 0.0);
      // Beyond the room that is left in the space there is nothing but rounding error.
      const bool room = found < pending_;
      if (room) {
        std::copy_n(image[c], n_, basis_[filled_ + found]);
        const double length =
            orthonormalize(basis_, filled_ + found, 8 * n_ * kEps * largest_, random_, basis_[filled_ + found], components.data());
        coupling_[found * block_ + c] = length;
        for (int64_t i = 0; i < found; ++i) coupling_[i * block_ + c] = components[filled_ + i];
        ++found;
      } else {
        for (int64_t i = 0; i < filled_; ++i) components[i] = dot(basis_[i], image[c], n_);
        for (int64_t i = 0; i < found; ++i) coupling_[i * block_ + c] = dot(basis_[filled_ + i], image[c], n_);
      }
      for (int64_t i = 0; i < filled_; ++i) h_[i * capacity_ + old + c] = h_[(old + c) * capacity_ + i] = components[i];
    }
    for (; found < pending_; ++found) {  // a block that grows again after a smaller one
      orthonormalize(basis_, filled_ + found, std::numeric_limits<double>::infinity(), random_, basis_[filled_ + found]);
    }
  }

  // Norm of AᵀA x − θ x for Ritz pair i.
  double residual(int64_t i) const {
    const double* tail = ritz_.vectors.data() + i * filled_ + (filled_ - last_);
    double sum = 0;
    for (int64_t r = 0; r < pending_; ++r) {
      double component = 0;
      for (int64_t c = 0; c < last_; ++c) component += coupling_[r * block_ + c] * tail[c];
      sum += component * component;
    }
    return std::sqrt(sum);
  }

  // Singular values and bounds from the Ritz pairs; true when every bound is within tolerance. With r the residual of the
  // singular pair, a singular value lies within r of σ, and within r²/gap if no other is nearer than gap (Kato and Temple);
  // the neighbours' own residuals are taken off the gap.
  bool estimate(Svd& out) {
    const int64_t count = std::min(k_ + 1, filled_);
    const double theta_max = std::max(ritz_.values[0], 0.0);
    const double rounding = static_cast<double>(filled_) * kEps * theta_max;
    std::vector<double> sigma, reach;
    for (int64_t i = 0; i < count; ++i) {
      const double theta = ritz_.values[i] > rounding ? ritz_.values[i] : 0.0;
      const double r = residual(i) + rounding;
      sigma.push_back(std::sqrt(theta));
      reach.push_back(theta > r ? r / (std::numbers::sqrt2 * sigma[i]) : std::sqrt(theta + r));
    }
    out.s.assign(sigma.begin(), sigma.begin() + k_);
    out.bound.assign(reach.begin(), reach.begin() + k_);
    bool done = true;
    for (int64_t i = 0; i < k_; ++i) {
      double gap = i + 1 < count ? sigma[i] - sigma[i + 1] - reach[i + 1] : 0;
      if (i > 0) gap = std::min(gap, sigma[i - 1] - reach[i - 1] - sigma[i]);
      if (gap > reach[i]) out.bound[i] = std::max(reach[i] * reach[i] / gap, rounding / std::max(sigma[i], std::sqrt(rounding)));
      const bool null = ritz_.values[i] <= 1e-13 * theta_max && residual(i) <= 1e-12 * theta_max;
      done = done && (null || out.bound[i] <= tol_ * sigma[i]);
    }
    return done;
  }

  Rows ritz_vectors(int64_t count) const {
    Rows out(count, n_);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < filled_; ++j) axpy(ritz_.vectors[i * filled_ + j], basis_[j], out[i], n_);
    }
    return out;
  }

  // Keeps the leading Ritz vectors and the pending block.
  void restart() {
    const int64_t keep = std::min(k_ + 2 * block_, filled_ / 2);
    const Rows kept = ritz_vectors(keep);
    std::copy(kept.values.begin(), kept.values.end(), basis_[0]);
    std::copy_n(basis_[filled_], pending_ * n_, basis_[keep]);
    std::fill(h_.begin(), h_.end(), 0.0);
    for (int64_t i = 0; i < keep; ++i) h_[i * capacity_ + i] = ritz_.values[i];
    filled_ = keep;
  }

  void find_vectors(Svd& out) {
    out.v = ritz_vectors(k_);
    for (int64_t i = 0; i < k_; ++i) orthonormalize(out.v, i, 0.0, random_, out.v[i]);
    out.u = product(a_, out.v, k_);
    ++out.passes;
    for (int64_t i = 0; i < k_; ++i) orthonormalize(out.u, i, 1e-7 * out.s[0], random_, out.u[i]);
  }

  const Operand& a_;
  const int64_t n_, k_, block_, capacity_;
  const double tol_;
  const int64_t max_passes_;
  Random random_;
  Rows basis_;                   // filled_ basis vectors, then pending_ ones whose images are not known yet
  std::vector<double> h_;        // projected matrix, capacity_ × capacity_
  std::vector<double> coupling_; // block_ × block_: the last block's images along the pending block
  Eigen ritz_;
  int64_t filled_ = 0, pending_ = 0, last_ = 0;
  double largest_ = 0;           // largest image so far: the scale of AᵀA
};

struct Settings {
  int64_t k;
  double tol;
  int64_t max_passes;
  bool vectors;
  uint64_t seed;
};

Svd decompose(const Operand& a, const Settings& settings) {
  const int64_t k = std::min(settings.k, std::min(a.rows, a.columns));
  Svd out;
  if (k > 0) {
    const bool dense = std::min(a.rows, a.columns) <= kDenseSide && a.rows * a.columns <= kDenseElements;
    out = dense ? dense_svd(a, k, settings.vectors, settings.seed)
                : Lanczos(a, k, settings.tol, settings.max_passes, settings.seed).run(settings.vectors);
  }
  ++out.passes;  // the inspection
  for (double& s : out.s) s /= a.scale();
  for (double& b : out.bound) b /= a.scale();
  if (a.transposed()) std::swap(out.u, out.v);
  return out;
}

// Calls f(index, operand) for every matrix: large ones one after another with all threads, then small ones in parallel.
template <class F>
void for_each_matrix(const TensorList& mats, const TensorList& minus, const F& f) {
  std::vector<int64_t> small;
  const auto one = [&](int64_t i) {
    Operand a(mats[i], minus.empty() ? nullptr : &minus[i]);
    a.inspect(i);
    f(i, a);
  };
  for (size_t i = 0; i < mats.size(); ++i) {
    if (mats[i].numel() < kShared) {
      small.push_back(static_cast<int64_t>(i));
    } else {
      one(static_cast<int64_t>(i));
    }
  }
  parallel_for(0, static_cast<int64_t>(small.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) one(small[i]);
  });
}

template <class T>
void store(const std::vector<double>& values, int64_t count, Tensor& out) {
  std::transform(values.begin(), values.begin() + count, static_cast<T*>(out.mutable_data_ptr()),
                 [](double x) { return static_cast<T>(x); });
}

std::tuple<TensorList, TensorList, TensorList, TensorList, Tensor> topk_svd(TensorList mats, TensorList minus, int64_t k,
                                                                            double tol, int64_t max_passes, bool vectors,
                                                                            int64_t seed) {
  check(!mats.empty(), "mats: expected at least one matrix");
  const Settings settings{k, tol, max_passes, vectors, static_cast<uint64_t>(seed)};
  TensorList s, u, vh, residual;
  Tensor passes = new_empty(mats[0], {static_cast<int64_t>(mats.size())}, ScalarType::Long);
  const auto type_of = [](const Tensor& mat) { return mat.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; };
  for (const Tensor& mat : mats) {
    const int64_t kept = vectors ? k : 0;
    s.push_back(new_empty(mat, {k}, type_of(mat)));
    residual.push_back(new_empty(mat, {k}, type_of(mat)));
    u.push_back(new_empty(mat, {mat.sizes()[0], kept}, type_of(mat)));
    vh.push_back(new_empty(mat, {kept, mat.sizes()[1]}, type_of(mat)));
  }
  for_each_matrix(mats, minus, [&](int64_t i, const Operand& a) {
    const Svd svd = decompose(a, settings);
    const auto write = [&](auto zero) {
      using T = decltype(zero);
      store<T>(svd.s, k, s[i]);
      store<T>(svd.bound, k, residual[i]);
      if (!vectors) return;
      store<T>(svd.v.values, k * svd.v.length, vh[i]);
      T* out = static_cast<T*>(u[i].mutable_data_ptr());
      for (int64_t r = 0; r < svd.u.length; ++r) {
        for (int64_t c = 0; c < k; ++c) out[r * k + c] = static_cast<T>(svd.u[c][r]);
      }
    };
    s[i].scalar_type() == ScalarType::Double ? write(0.0) : write(0.0f);
    static_cast<int64_t*>(passes.mutable_data_ptr())[i] = svd.passes;
  });
  return {s, u, vh, residual, passes};
}

// Mean, biased variance and L2 norm. Deviations are taken from the first element, so that a constant has variance 0 exactly.
void moments(const Operand& a, double* out) {
  const double count = static_cast<double>(a.rows * a.columns);
  std::vector<double> first_row(static_cast<size_t>(a.columns)), sums(static_cast<size_t>(3 * a.parts()), 0.0);
  a.load_row(0, first_row.data());
  const double origin = first_row[0];
  a.for_parts([&](int64_t part, int64_t first, int64_t last) {
    std::vector<double> row(static_cast<size_t>(a.columns)), ones(static_cast<size_t>(a.columns), 1.0);
    for (int64_t i = first; i < last; ++i) {
      a.load_row(i, row.data());
      sums[3 * part + 2] += dot(row.data(), row.data(), a.columns);
      axpy(-origin, ones.data(), row.data(), a.columns);
      sums[3 * part] += dot(row.data(), ones.data(), a.columns);
      sums[3 * part + 1] += dot(row.data(), row.data(), a.columns);
    }
  });
  double deviation = 0, squares = 0, norm = 0;
  for (int64_t p = 0; p < a.parts(); ++p) {
    deviation += sums[3 * p];
    squares += sums[3 * p + 1];
    norm += sums[3 * p + 2];
  }
  const double shift = deviation / count;
  out[0] = (origin + shift) / a.scale();
  out[1] = std::max(0.0, squares / count - shift * shift) / a.scale() / a.scale();
  out[2] = std::sqrt(norm) / a.scale();
}

Tensor weight_statistics(TensorList mats, TensorList minus, int64_t r, double tol, int64_t max_passes, int64_t seed) {
  check(!mats.empty(), "mats: expected at least one tensor");
  Tensor out = new_empty(mats[0], {static_cast<int64_t>(mats.size()), 3 + r}, ScalarType::Double);
  double* table = static_cast<double*>(out.mutable_data_ptr());
  std::fill(table, table + mats.size() * static_cast<size_t>(3 + r), 0.0);
  const Settings settings{r, tol, max_passes, false, static_cast<uint64_t>(seed)};
  for_each_matrix(mats, minus, [&](int64_t i, const Operand& a) {
    if (a.rows * a.columns == 0) return;
    double* row = table + i * (3 + r);
    moments(a, row);
    const Svd svd = decompose(a, settings);
    std::copy(svd.s.begin(), svd.s.end(), row + 3);
  });
  return out;
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CPU, m) {
  m.impl("topk_svd", TORCH_BOX(&statsmerge::topk_svd));
  m.impl("weight_statistics", TORCH_BOX(&statsmerge::weight_statistics));
}
