// topk_svd and weight_statistics on the CPU. Thin or small matrices are decomposed directly, others by block Lanczos.
#include <algorithm>
#include <atomic>
#include <numeric>

#include "common/tensors.h"
#include "cpu/kernels/svd.h"

namespace statsmerge {
namespace {

constexpr int64_t kDenseSide = 32;           // matrices with at most this many rows or columns are decomposed directly
constexpr int64_t kDenseElements = 1 << 19;  // ... unless they are long
constexpr int64_t kLarge = 1 << 22;          // elements from which on the threads share one matrix

// A matrix as the kernels see it: a column-major tensor as its transpose.
class Matrix {
 public:
  Matrix(const Tensor& mat, const Tensor* minus)
      : transposed_(mat.stride(0) == 1 && mat.stride(1) != 1), mat_(with_rows(mat)) {
    view_ = {mat_.sizes()[0], mat_.sizes()[1], bytes(mat_), storage_of(mat_, "mats"), mat_.stride(0)};
    if (!minus) return;
    minus_ = with_rows(*minus);
    view_.minus = bytes(*minus_);
    view_.minus_storage = storage_of(*minus_, "minus");
    view_.minus_stride = minus_->stride(0);
  }

  const Operand& view() const { return view_; }

  Svd decompose(const SvdSettings& settings, Moments* moments = nullptr) const {
    const int64_t side = std::min(view_.rows, view_.columns);
    const bool direct = side <= kDenseSide && view_.rows * view_.columns <= kDenseElements;
    Svd out = direct ? dense_svd(view_, settings, moments) : lanczos_svd(view_, settings, moments);
    if (transposed_) std::swap(out.u, out.v);
    return out;
  }

 private:
  Tensor with_rows(const Tensor& x) const {
    const Tensor oriented = transposed_ ? aten::transpose(x) : x;
    return oriented.stride(1) == 1 ? oriented : dense(oriented);
  }

  bool transposed_;
  Tensor mat_;
  std::optional<Tensor> minus_;
  Operand view_;
};

// Calls f(index, matrix) for every matrix: large ones one after another with all threads, then the others, each on one
// thread, the largest first so that the threads finish together.
template <class F>
void for_each_matrix(const TensorList& mats, const TensorList& minus, const F& f) {
  std::vector<char> finite(mats.size(), 1);
  const auto one = [&](int64_t i) {
    try {
      f(i, Matrix(mats[i], minus.empty() ? nullptr : &minus[i]));
    } catch (const NotFinite&) {
      finite[i] = 0;
    }
  };
  std::vector<int64_t> order(mats.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return mats[i].numel() > mats[j].numel(); });
  size_t shared = 0;
  while (shared < order.size() && (mats[order[shared]].numel() >= kLarge || shared + 1 == order.size())) {
    one(order[shared++]);
  }
  const int64_t left = static_cast<int64_t>(order.size() - shared);
  std::atomic<int64_t> next{0};
  parallel_for(0, left, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < left; i = next++) one(order[shared + static_cast<size_t>(i)]);
  });
  for (size_t i = 0; i < mats.size(); ++i) {
    const int64_t index = static_cast<int64_t>(i);
    check(finite[i], indexed("mats", index), minus.empty() ? "" : indexed(" - minus", index), " contains NaN or Inf");
  }
}

// A matrix of the list, or one of a batch in it.
struct Place {
  size_t entry;
  int64_t index;
};

template <class T>
T* data_at(Tensor& batch, int64_t offset) {
  return static_cast<T*>(batch.mutable_data_ptr()) + offset;
}

template <class T>
void store(const std::vector<double>& values, int64_t count, T* out) {
  std::transform(values.begin(), values.begin() + count, out, [](double x) { return static_cast<T>(x); });
}

// mats: matrices, or batches [B, m, n] of them, whose results have a first dimension of B too.
std::tuple<TensorList, TensorList, TensorList, TensorList, Tensor> topk_svd(TensorList mats, TensorList minus,
                                                                            int64_t k, double tol, int64_t max_passes,
                                                                            bool vectors, int64_t seed) {
  check(!mats.empty(), "mats: expected at least one matrix");
  const SvdSettings settings{k, tol, max_passes, vectors, static_cast<uint64_t>(seed)};
  TensorList s, u, vh, residual, matrices, subtrahends;
  std::vector<Place> places;
  const int64_t kept = vectors ? k : 0;
  for (size_t i = 0; i < mats.size(); ++i) {
    const Tensor& mat = mats[i];
    const bool single = mat.dim() == 2;
    const int64_t batch = single ? 1 : mat.sizes()[0], m = mat.sizes()[mat.dim() - 2], n = mat.sizes()[mat.dim() - 1];
    const ScalarType type = mat.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    s.push_back(single ? new_empty(mat, {k}, type) : new_empty(mat, {batch, k}, type));
    residual.push_back(torch::stable::empty_like(s.back()));
    u.push_back(single ? new_empty(mat, {m, kept}, type) : new_empty(mat, {batch, m, kept}, type));
    vh.push_back(single ? new_empty(mat, {kept, n}, type) : new_empty(mat, {batch, kept, n}, type));
    for (int64_t b = 0; b < batch; ++b) {
      places.push_back({i, b});
      matrices.push_back(single ? mat : torch::stable::select(mat, 0, b));
      if (!minus.empty()) subtrahends.push_back(single ? minus[i] : torch::stable::select(minus[i], 0, b));
    }
  }
  Tensor passes = new_empty(mats[0], {static_cast<int64_t>(places.size())}, ScalarType::Long);
  for_each_matrix(matrices, subtrahends, [&](int64_t i, const Matrix& a) {
    const Svd svd = a.decompose(settings);
    const auto [entry, index] = places[i];
    const auto write = [&](auto zero) {
      using T = decltype(zero);
      store(svd.s, k, data_at<T>(s[entry], index * k));
      store(svd.bound, k, data_at<T>(residual[entry], index * k));
      if (!vectors) return;
      T* u_out = data_at<T>(u[entry], index * k * svd.u.length);
      T* vh_out = data_at<T>(vh[entry], index * k * svd.v.length);
      for (int64_t c = 0; c < k; ++c) {
        for (int64_t r = 0; r < svd.u.length; ++r) u_out[r * k + c] = static_cast<T>(svd.u[c][r]);
        for (int64_t r = 0; r < svd.v.length; ++r) vh_out[c * svd.v.length + r] = static_cast<T>(svd.v[c][r]);
      }
    };
    s[entry].scalar_type() == ScalarType::Double ? write(0.0) : write(0.0f);
    static_cast<int64_t*>(passes.mutable_data_ptr())[i] = svd.passes;
  });
  return {s, u, vh, residual, passes};
}

Tensor weight_statistics(TensorList mats, TensorList minus, int64_t r, double tol, int64_t max_passes, int64_t seed) {
  check(!mats.empty(), "mats: expected at least one tensor");
  Tensor out = new_empty(mats[0], {static_cast<int64_t>(mats.size()), 3 + r}, ScalarType::Double);
  double* table = static_cast<double*>(out.mutable_data_ptr());
  std::fill(table, table + mats.size() * static_cast<size_t>(3 + r), 0.0);
  for_each_matrix(mats, minus, [&](int64_t i, const Matrix& a) {
    const int64_t side = std::min(a.view().rows, a.view().columns);
    if (side == 0) return;
    double* row = table + i * (3 + r);
    Moments moments;
    if (r > 0) {
      const Svd svd =
          a.decompose({std::min(r, side), tol, max_passes, false, static_cast<uint64_t>(seed)}, &moments);
      std::copy(svd.s.begin(), svd.s.end(), row + 3);
    } else {
      Operand view = a.view();
      inspect(view);
      moments = statsmerge::moments(view);
    }
    row[0] = moments.mean();
    row[1] = moments.variance();
    row[2] = moments.norm();
  });
  return out;
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CPU, m) {
  m.impl("topk_svd", TORCH_BOX(&statsmerge::topk_svd));
  m.impl("weight_statistics", TORCH_BOX(&statsmerge::weight_statistics));
}
