// Block Lanczos on AᵀA with full reorthogonalisation and thick restarts (Wu and Simon 2000; Baglama and Reichel 2005).
// Everything but the products with A is computed in double. Those are computed in float as long as their rounding
// errors matter little, and in double from there on.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "cpu/kernels/orthonormalize.h"
#include "cpu/kernels/svd.h"
#include "cpu/kernels/symmetric_eigen.h"
#include "cpu/kernels/vector_ops.h"

namespace statsmerge {
namespace {

constexpr double kEps = std::numeric_limits<double>::epsilon();
constexpr double kFloatEps = std::numeric_limits<float>::epsilon();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kBasis = 96;  // Lanczos vectors kept between restarts, unless k needs more

// Differences of matrices with up to so many elements are formed, one matrix at a time: that reads two matrices once
// instead of at every pass.
constexpr int64_t kFormed = 1 << 22;

class Lanczos {
 public:
  Lanczos(Operand a, const SvdSettings& settings)
      : a_(a),
        n_(a.columns),
        k_(settings.k),
        block_(std::min((settings.k + kBlock - 1) / kBlock * kBlock, n_)),
        capacity_(std::min(std::max(kBasis, 6 * block_), n_)),
        settings_(settings),
        // Sums of so many terms err by the square root of their number (Higham and Mary 2019).
        float_rounding_(kFloatEps * std::sqrt(static_cast<double>(n_ + std::min<int64_t>(a.rows, 2048)))),
        single_(!a.is_double() && settings.tol > 4 * float_rounding_),
        random_(settings.seed),
        basis_(capacity_ + block_, n_),
        image_(block_, n_),
        h_(static_cast<size_t>(capacity_ * capacity_), 0.0) {}

  Svd run(Moments* moments) {
    Svd out;
    for (int64_t c = 0; c < block_; ++c) orthonormalize(basis_, 0, c, kInfinity, random_, basis_[c]);
    pending_ = block_;
    first_product(out, moments);
    for (;;) {
      expand();
      ++out.passes;
      const bool last = out.passes >= settings_.max_passes;
      const bool full = filled_ + pending_ > capacity_ || filled_ == n_;
      if (last || full || out.passes >= next_check_) {
        ritz_ = symmetric_eigen(projected(), filled_, filled_ - last_);
        const Progress progress = estimate(out);
        const bool exhausted = filled_ == n_ || progress.rounding_only;  // more passes in this precision gain nothing
        if (progress.excess <= 1 || last || (exhausted && !single_)) break;
        if (exhausted) {
          restart_in_double();
        } else if (full) {
          restart();
        } else {
          schedule(out.passes, progress.excess);
        }
      }
      multiply_pending(nullptr);
    }
    if (settings_.vectors) find_vectors(out);
    for (double& s : out.s) s /= a_.scale;
    for (double& b : out.bound) b /= a_.scale;
    return out;
  }

 private:
  struct Progress {
    double excess;       // by how much the worst bound exceeds the tolerance
    bool rounding_only;  // what is left of the residuals is rounding error
  };

  // The images of the pending block.
  void multiply_pending(Moments* moments) {
    if (single_) {
      float_products_.normal(basis_[filled_], pending_, image_, moments);
    } else {
      double_products_.normal(basis_[filled_], pending_, image_, moments);
    }
  }

  // Values that are not finite, and those whose squares are out of range, show in the first images.
  void first_product(Svd& out, Moments* moments) {
    multiply_pending(moments);
    double size = 0;
    for (int64_t c = 0; c < pending_; ++c) size += std::sqrt(dot(image_[c], image_[c], n_));
    const int range = a_.is_double() ? 400 : 80;
    if (size > std::ldexp(1.0, -range) && size < std::ldexp(1.0, range)) return;
    inspect(a_);
    ++out.passes;
    multiply_pending(moments);
  }

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
    pending_ = std::min(block_, n_ - filled_);
    coupling_.assign(static_cast<size_t>(block_ * block_), 0.0);
    std::vector<double> along(static_cast<size_t>(filled_ * kBlock)), components(static_cast<size_t>(filled_ + block_));
    int64_t found = 0;
    // Less than this is rounding error. Not much more may be: what is taken for nothing is missing in the residuals.
    const double negligible = 8 * std::sqrt(static_cast<double>(n_)) * kEps;
    for (int64_t c = 0; c < last_; ++c) {
      if (c % kBlock == 0) {
        for (int64_t i = c; i < std::min(c + kBlock, last_); ++i)
          largest_ = std::max(largest_, std::sqrt(dot(image_[i], image_[i], n_)));
        std::fill(along.begin(), along.end(), 0.0);
        project_out(basis_, filled_, image_[c], along.data());
      }
      for (int64_t i = 0; i < filled_; ++i) components[i] = along[i * kBlock + c % kBlock];
      // Beyond the room that is left in the space there is nothing but rounding error.
      if (found < pending_) {
        std::fill(components.begin() + filled_, components.end(), 0.0);
        double* next = basis_[filled_ + found];
        std::copy_n(image_[c], n_, next);
        coupling_[found * block_ + c] = orthonormalize(basis_, filled_, filled_ + found, negligible * largest_,
                                                       random_, next, components.data());
        for (int64_t i = 0; i < found; ++i) coupling_[i * block_ + c] = components[filled_ + i];
        ++found;
      } else {
        for (int64_t i = 0; i < found; ++i) coupling_[i * block_ + c] = dot(basis_[filled_ + i], image_[c], n_);
      }
      for (int64_t i = 0; i < filled_; ++i) h_[i * capacity_ + old + c] = h_[(old + c) * capacity_ + i] = components[i];
    }
    for (; found < pending_; ++found)  // a block that grows again after a smaller one
      orthonormalize(basis_, 0, filled_ + found, kInfinity, random_, basis_[filled_ + found]);
  }

  // Norm of AᵀA x − θ x for Ritz pair i.
  double residual(int64_t i) const {
    const double* tail = ritz_.vectors.data() + i * last_;
    double sum = 0;
    for (int64_t r = 0; r < pending_; ++r) {
      double component = 0;
      for (int64_t c = 0; c < last_; ++c) component += coupling_[r * block_ + c] * tail[c];
      sum += component * component;
    }
    return std::sqrt(sum);
  }

  // Singular values and bounds from the Ritz pairs. With r the residual of the singular pair, a singular value lies
  // within r of σ, and within r²/gap if no other is nearer than gap (Kato and Temple); the neighbours' own residuals
  // are taken off the gap. The rounding error of the products is a part of every residual.
  Progress estimate(Svd& out) {
    const int64_t count = std::min(k_ + 1, filled_);
    const double theta_max = std::max(ritz_.values[0], 0.0);
    const double rounding = theta_max * (single_ ? float_rounding_ : static_cast<double>(filled_) * kEps);
    std::vector<double> sigma, reach;
    for (int64_t i = 0; i < count; ++i) {
      const double theta = ritz_.values[i] > rounding ? ritz_.values[i] : 0.0;
      const double r = residual(i) + rounding;
      sigma.push_back(std::sqrt(theta));
      reach.push_back(theta > r ? r / (std::numbers::sqrt2 * sigma[i]) : std::sqrt(theta + r));
    }
    out.s.assign(sigma.begin(), sigma.begin() + k_);
    out.bound.assign(reach.begin(), reach.begin() + k_);
    Progress progress{0, true};
    for (int64_t i = 0; i < k_; ++i) {
      double gap = i + 1 < count ? sigma[i] - sigma[i + 1] - reach[i + 1] : 0;
      if (i > 0) gap = std::min(gap, sigma[i - 1] - reach[i - 1] - sigma[i]);
      if (gap > reach[i])
        out.bound[i] = std::max(reach[i] * reach[i] / gap, rounding / std::max(sigma[i], std::sqrt(rounding)));
      const bool null = !single_ && ritz_.values[i] <= 1e-13 * theta_max && residual(i) <= 1e-12 * theta_max;
      if (null || out.bound[i] <= settings_.tol * sigma[i]) continue;
      progress.excess = std::max(progress.excess, sigma[i] > 0 ? out.bound[i] / (settings_.tol * sigma[i]) : kInfinity);
      progress.rounding_only = progress.rounding_only && residual(i) <= rounding;
    }
    return progress;
  }

  // The next look at the Ritz values: a little before the pass that the trend of the last two promises to be enough.
  void schedule(int64_t passes, double excess) {
    const double rate = std::log(last_excess_ / excess) / static_cast<double>(passes - last_check_);
    const double left = rate > 0 ? 0.6 * std::log(excess) / rate : kInfinity;
    last_excess_ = excess;
    last_check_ = passes;
    const double most = std::min(4.0, 1 + static_cast<double>(passes) / 4);
    next_check_ = passes + static_cast<int64_t>(std::clamp(left, 1.0, most));
  }

  Rows ritz_vectors(int64_t count) const {
    const Eigen all = symmetric_eigen(projected(), filled_);
    Rows out(count, n_);
    for (int64_t c = 0; c < count; c += kBlock) {
      for (int64_t r = 0; r < filled_; r += kBlock) {
        alignas(64) double factors[kBlock * kBlock] = {};
        for (int64_t i = 0; i < std::min(kBlock, filled_ - r); ++i) {
          for (int64_t j = 0; j < std::min(kBlock, count - c); ++j)
            factors[i * kBlock + j] = all.vectors[(c + j) * filled_ + r + i];
        }
        BlockProducts<double>::combine(basis_[r], factors, basis_.stride, basis_.stride, out[c]);
      }
    }
    return out;
  }

  // Keeps the leading Ritz vectors and the pending block.
  void restart() {
    const int64_t keep = std::min(k_ + 2 * block_, filled_ / 2);
    const Rows kept = ritz_vectors(keep);
    for (int64_t i = 0; i < keep; ++i) std::copy_n(kept[i], n_, basis_[i]);
    for (int64_t i = 0; i < pending_; ++i) std::copy_n(basis_[filled_ + i], n_, basis_[keep + i]);
    std::fill(h_.begin(), h_.end(), 0.0);
    for (int64_t i = 0; i < keep; ++i) h_[i * capacity_ + i] = ritz_.values[i];
    filled_ = keep;
  }

  // Starts anew from the leading Ritz vectors.
  void restart_in_double() {
    const Rows kept = ritz_vectors(block_);
    for (int64_t i = 0; i < block_; ++i) {
      std::copy_n(kept[i], n_, basis_[i]);
      orthonormalize(basis_, 0, i, 0.0, random_, basis_[i]);
    }
    std::fill(h_.begin(), h_.end(), 0.0);
    single_ = false;
    filled_ = 0;
    pending_ = block_;
  }

  void find_vectors(Svd& out) {
    out.v = ritz_vectors(k_);
    for (int64_t i = 0; i < k_; ++i) orthonormalize(out.v, 0, i, 0.0, random_, out.v[i]);
    out.u = product(a_, out.v, k_);
    ++out.passes;
    for (int64_t i = 0; i < k_; ++i) orthonormalize(out.u, 0, i, 1e-7 * out.s[0], random_, out.u[i]);
  }

  Operand a_;
  const int64_t n_, k_, block_, capacity_;
  const SvdSettings settings_;
  const double float_rounding_;
  bool single_;  // products are computed in float
  Products<float> float_products_{a_};
  Products<double> double_products_{a_};
  Random random_;
  Rows basis_;                    // filled_ basis vectors, then pending_ ones whose images are not known yet
  Rows image_;                    // of the pending block
  std::vector<double> h_;         // projected matrix, capacity_ × capacity_
  std::vector<double> coupling_;  // block_ × block_: the last block's images along the pending block
  Eigen ritz_;                    // of the projected matrix, the vectors' components along the last block
  int64_t filled_ = 0, pending_ = 0, last_ = 0;
  int64_t next_check_ = 3, last_check_ = 0;
  double last_excess_ = 1;
  double largest_ = 0;  // largest image so far: the scale of AᵀA
};

}  // namespace

Svd lanczos_svd(Operand a, const SvdSettings& settings, Moments* moments) {
  AlignedVector<float> difference;
  const bool form = a.minus && !a.is_double() && a.rows * a.columns <= kFormed;
  if (form) form_difference(a, difference);
  Svd out = Lanczos(a, settings).run(moments);
  out.passes += form;
  return out;
}

}  // namespace statsmerge
