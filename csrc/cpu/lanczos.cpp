// Block Lanczos on AᵀA in double with full reorthogonalisation and thick restarts (Wu and Simon 2000; Baglama and
// Reichel 2005).
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "cpu/orthonormalize.h"
#include "cpu/svd.h"
#include "cpu/kernels/symmetric_eigen.h"
#include "cpu/kernels/vector_ops.h"

namespace statsmerge {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr int64_t kBasis = 96;  // Lanczos vectors kept between restarts, unless k needs more

class Lanczos {
 public:
  Lanczos(const Operand& a, int64_t k, double tol, int64_t max_passes, uint64_t seed)
      : a_(a),
        n_(a.columns),
        k_(k),
        block_(std::min((std::max<int64_t>(k, 4) + 3) / 4 * 4, n_)),
        capacity_(std::min(std::max(kBasis, 6 * block_), n_)),
        tol_(tol),
        max_passes_(max_passes),
        random_(seed),
        basis_(capacity_ + block_, n_),
        h_(static_cast<size_t>(capacity_ * capacity_), 0.0) {}

  Svd run(bool vectors) {
    Svd out;
    for (int64_t c = 0; c < block_; ++c)
      orthonormalize(basis_, c, std::numeric_limits<double>::infinity(), random_, basis_[c]);
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

  // Takes the pending block into the basis: its image under AᵀA gives new columns of the projected matrix, and what the
  // image has outside the basis becomes the next block.
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
        const double length = orthonormalize(basis_, filled_ + found, 8 * n_ * kEps * largest_, random_,
                                             basis_[filled_ + found], components.data());
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
      orthonormalize(basis_, filled_ + found, std::numeric_limits<double>::infinity(), random_,
                     basis_[filled_ + found]);
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

  // Singular values and bounds from the Ritz pairs; true when every bound is within tolerance. With r the residual of
  // the singular pair, a singular value lies within r of σ, and within r²/gap if no other is nearer than gap (Kato and
  // Temple); the neighbours' own residuals are taken off the gap.
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
      if (gap > reach[i])
        out.bound[i] = std::max(reach[i] * reach[i] / gap, rounding / std::max(sigma[i], std::sqrt(rounding)));
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
  Rows basis_;                    // filled_ basis vectors, then pending_ ones whose images are not known yet
  std::vector<double> h_;         // projected matrix, capacity_ × capacity_
  std::vector<double> coupling_;  // block_ × block_: the last block's images along the pending block
  Eigen ritz_;
  int64_t filled_ = 0, pending_ = 0, last_ = 0;
  double largest_ = 0;  // largest image so far: the scale of AᵀA
};

}  // namespace

Svd lanczos_svd(const Operand& a, int64_t k, double tol, int64_t max_passes, bool vectors, uint64_t seed) {
  return Lanczos(a, k, tol, max_passes, seed).run(vectors);
}

}  // namespace statsmerge
