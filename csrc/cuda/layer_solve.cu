// layer_solve on CUDA: T = A + (D − A C) (C + ridge·I)^†, always computed in double, for all systems of a batch at once. A
// system takes a Cholesky factorisation where its matrix is proven to be safely positive definite and aten's symmetric
// eigendecomposition where not, by the same rule as on the CPU. The host waits for the device once, to learn which.
#include "cuda/layer_solve.cuh"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <algorithm>

#include "common/tensors.h"
#include "cuda/launch.h"

namespace statsmerge {
namespace {

// A diagonal block up to this size is updated as a whole, both triangles: half the arithmetic of a small block is cheaper
// than more launches.
constexpr int64_t kWholeUpdate = 1024;
// Up to this size aten's batched eigendecomposition is used; beyond, some versions of torch are faster one by one.
constexpr int64_t kBatchedEigen = 32;

double* data(const Tensor& x) { return static_cast<double*>(x.mutable_data_ptr()); }

unsigned blocks_of(int64_t threads, int64_t block) { return grid((threads + block - 1) / block); }

Tensor to_host(const Tensor& x) {
  return torch::stable::to(x, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

Tensor multiply(const Tensor& a, const Tensor& b) { return call_aten<1>("aten::mul", "Tensor", a, b)[0]; }

// c −= a b of batches of matrices. Straight to cuBLAS: the dispatcher of the stable ABI takes no scalars.
void subtract_product(const Tensor& c, const Tensor& a, const Tensor& b) {
  if (c.numel() == 0 || a.numel() == 0) return;
  const auto error = aoti_torch_cuda_baddbmm_out(c.get(), c.get(), a.get(), b.get(), 1.0, -1.0);
  if (error != TORCH_SUCCESS) throw std::runtime_error("aten::baddbmm failed");
}

// Where a range of rows or columns is cut in two: between leaves.
int64_t first_half(int64_t size) {
  const int64_t leaves = (size + cuda::kLeaf - 1) / cuda::kLeaf;
  return (leaves + 1) / 2 * cuda::kLeaf;
}

// Cholesky factors of symmetric matrices [batches, n, n], in their lower triangles; what is above means nothing.
class Factors {
 public:
  // Factorises `matrices` in place; failed[b · stride] is set to 1 where matrix b is not positive definite.
  Factors(const Tensor& matrices, int* failed, int64_t stride)
      : matrices_(matrices),
        batches_(matrices.sizes()[0]),
        n_(matrices.sizes()[1]),
        failed_(failed),
        stride_(stride),
        stream_(current_stream(matrices)) {
    factorize(0, n_);
  }

  // rows [batches, m, n] <- rows (L Lᵀ)⁻¹.
  void solve(const Tensor& rows) const {
    substitute(0, n_, rows, true);
    substitute(0, n_, rows, false);
  }

  // y <- (L Lᵀ)⁻¹ y for a vector for every system; `work` is as large. A launch for every leaf and direction instead of
  // the products of matrices above.
  void solve_vectors(const Tensor& y, const Tensor& work) const {
    for (int64_t first = 0; first < n_; first += cuda::kLeaf) {
      const int64_t below = std::max<int64_t>(0, n_ - first - cuda::kLeaf);
      vector_leaf(first, (below + cuda::kForwardRows - 1) / cuda::kForwardRows, y, work, true);
    }
    for (int64_t first = (n_ - 1) / cuda::kLeaf * cuda::kLeaf; first >= 0; first -= cuda::kLeaf) {
      vector_leaf(first, (first + cuda::kBackwardColumns - 1) / cuda::kBackwardColumns, work, y, false);
    }
  }

 private:
  Tensor block(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    return slice(slice(matrices_, 1, row, rows), 2, column, columns);
  }

  void factorize(int64_t first, int64_t size) {
    if (size <= cuda::kLeaf) {
      cuda::factor_kernel<<<grid(batches_), cuda::kLeafThreads, 0, stream_>>>(data(matrices_), n_, first,
                                                                              static_cast<int>(size), failed_, stride_);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      return;
    }
    const int64_t left = first_half(size), right = size - left;
    factorize(first, left);
    const Tensor panel = block(first + left, right, first, left);
    substitute(first, left, panel, true);
    subtract_square(first + left, panel);
    factorize(first + left, right);
  }

  // The diagonal block at `first` minus x xᵀ; its upper triangle only where that is cheaper than to leave it.
  void subtract_square(int64_t first, const Tensor& x) const {
    const int64_t size = x.sizes()[1];
    if (size <= kWholeUpdate) {
      subtract_product(block(first, size, first, size), x, aten::transpose(x));
      return;
    }
    const int64_t top = first_half(size), bottom = size - top;
    const Tensor upper = slice(x, 1, 0, top), lower = slice(x, 1, top, bottom);
    subtract_square(first, upper);
    subtract_product(block(first + top, bottom, first, top), lower, aten::transpose(upper));
    subtract_square(first + top, lower);
  }

  // rows <- rows L⁻ᵀ (forward) or rows L⁻¹ with the diagonal block of L at `first`; rows [batches, m, size] with unit
  // stride in the last dimension.
  void substitute(int64_t first, int64_t size, const Tensor& rows, bool forward) const {
    if (size <= cuda::kLeaf) return substitute_leaf(first, size, rows, forward);
    const int64_t left = first_half(size), right = size - left;
    const Tensor before = slice(rows, 2, 0, left), after = slice(rows, 2, left, right);
    const Tensor coupling = block(first + left, right, first, left);
    if (forward) {
      substitute(first, left, before, true);
      subtract_product(after, before, aten::transpose(coupling));
      substitute(first + left, right, after, true);
    } else {
      substitute(first + left, right, after, false);
      subtract_product(before, after, coupling);
      substitute(first, left, before, false);
    }
  }

  void substitute_leaf(int64_t first, int64_t size, const Tensor& rows, bool forward) const {
    const cuda::Rows view{data(rows), rows.stride(0), rows.stride(1), rows.sizes()[1]};
    const int64_t tiles = (view.count + cuda::kRowTile - 1) / cuda::kRowTile;
    if (tiles == 0) return;
    cuda::substitute_kernel<<<grid(tiles * batches_), cuda::kLeafThreads, 0, stream_>>>(
        data(matrices_), n_, first, static_cast<int>(size), view, tiles, forward);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void vector_leaf(int64_t first, int64_t parts, const Tensor& rest, const Tensor& solution, bool forward) const {
    const int size = static_cast<int>(std::min<int64_t>(cuda::kLeaf, n_ - first));
    parts = std::max<int64_t>(1, parts);
    cuda::leaf_vector_kernel<<<grid(parts * batches_), 256, 0, stream_>>>(data(matrices_), n_, first, size, data(rest),
                                                                          data(solution), parts, forward);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  Tensor matrices_;
  int64_t batches_, n_;
  int* failed_;
  int64_t stride_;
  cudaStream_t stream_;
};

struct Solution {
  Tensor t, rank, condition;
};

// The symmetric matrices whose lower triangles c holds, in double.
Tensor mirrored(const Tensor& c, cuda::Flags* flags) {
  const int64_t batches = c.sizes()[0], n = c.sizes()[1];
  const Tensor full = new_empty(c, {batches, n, n}, ScalarType::Double);
  const int64_t side = (n + cuda::kMirrorTile - 1) / cuda::kMirrorTile, tiles = side * (side + 1) / 2;
  const auto mirror = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    cuda::mirror_kernel<<<grid(batches * tiles), 256, 0, current_stream(c)>>>(
        static_cast<const T*>(c.const_data_ptr()), n, tiles, data(full), flags);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (c.scalar_type() == ScalarType::Double) {
    mirror(static_cast<double*>(nullptr));
  } else {
    mirror(static_cast<float*>(nullptr));
  }
  return full;
}

void add_to_diagonal(const Tensor& x, double value, const double* each) {
  const int64_t batches = x.sizes()[0], n = x.sizes()[1];
  cuda::add_to_diagonal_kernel<<<blocks_of(batches * n, 256), 256, 0, current_stream(x)>>>(data(x), batches, n, value, each);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// c [batches, n, n] minus what every eigenvalue has to exceed: if that is positive definite, all of them do.
Tensor shifted(const Tensor& c, double rcond) {
  const int64_t batches = c.sizes()[0], n = c.sizes()[1];
  const cudaStream_t stream = current_stream(c);
  const Tensor norms = new_empty(c, {batches, n, 2}, ScalarType::Double), shift = new_empty(c, {batches}, ScalarType::Double);
  double2* pairs = reinterpret_cast<double2*>(data(norms));
  cuda::row_norms_kernel<<<blocks_of(batches * n * 32, 256), 256, 0, stream>>>(data(c), batches * n, n, pairs);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  cuda::shift_kernel<<<grid(batches), 32, 0, stream>>>(pairs, n, rcond, data(shift));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const Tensor out = torch::stable::clone(c);
  add_to_diagonal(out, 0.0, data(shift));
  return out;
}

// The tridiagonal matrices of a few steps of Lanczos with an operator that maps a basis vector of every system, n apart
// by (kLanczosSteps + 1) n, to y.
template <class Apply>
Tensor lanczos(const Tensor& c, int steps, const Tensor& y, const Apply& apply) {
  const int64_t batches = c.sizes()[0], n = c.sizes()[1];
  const cudaStream_t stream = current_stream(c);
  const Tensor basis = new_empty(c, {batches, cuda::kLanczosSteps + 1, n}, ScalarType::Double);
  const Tensor tridiagonal = new_empty(c, {batches, 2, cuda::kLanczosSteps}, ScalarType::Double);
  cuda::lanczos_start_kernel<<<grid(batches), cuda::kLanczosThreads, 0, stream>>>(n, data(basis));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  for (int s = 0; s < steps; ++s) {
    apply(slice(basis, 1, s, 1));
    cuda::lanczos_step_kernel<<<grid(batches), cuda::kLanczosThreads, 0, stream>>>(n, s, data(y), data(basis),
                                                                                   data(tridiagonal));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return tridiagonal;
}

// Rank and condition of systems whose matrices c have these factors: estimates from below, by a few steps of Lanczos with
// the matrix and with its inverse.
void condition_of(const Tensor& c, const Factors& factors, const Solution& out) {
  const int64_t batches = c.sizes()[0], n = c.sizes()[1];
  const cudaStream_t stream = current_stream(c);
  const int steps = static_cast<int>(std::min<int64_t>(cuda::kLanczosSteps, n));
  Tensor y = new_empty(c, {batches, 1, n}, ScalarType::Double);
  const Tensor work = new_empty(c, {batches, 1, n}, ScalarType::Double);
  const Tensor of_matrix = lanczos(c, steps, y, [&](const Tensor& x) {
    cuda::product_kernel<<<blocks_of(batches * n * 32, 256), 256, 0, stream>>>(data(c), batches * n, n, data(x), x.stride(0),
                                                                               data(y));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  const Tensor of_inverse = lanczos(c, steps, y, [&](const Tensor& x) {
    torch::stable::copy_(y, x);
    factors.solve_vectors(y, work);
  });
  cuda::condition_kernel<<<blocks_of(batches, 64), 64, 0, stream>>>(data(of_matrix), data(of_inverse), batches, n, steps,
                                                                    static_cast<int64_t*>(out.rank.mutable_data_ptr()),
                                                                    data(out.condition));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// What of the spectra `values` [batches, count] is kept, inverted, with rank and condition.
Solution inverted_spectrum(const Tensor& values, double rcond, bool squared) {
  const int64_t batches = values.sizes()[0], count = values.sizes()[1];
  const Solution out{new_empty(values, {batches, 1, count}, ScalarType::Double),
                     new_empty(values, {batches}, ScalarType::Long), new_empty(values, {batches}, ScalarType::Double)};
  cuda::invert_spectrum_kernel<<<grid(batches), 32, 0, current_stream(values)>>>(
      data(values), count, rcond, squared, data(out.t), static_cast<int64_t*>(out.rank.mutable_data_ptr()),
      data(out.condition));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

// Solves the systems `which` by their eigenvalues and puts what they give into `out`.
void solve_by_spectrum(const Tensor& c, const Tensor& rows, double rcond, std::vector<int64_t> which, Solution& out) {
  const int64_t count = static_cast<int64_t>(which.size());
  const Tensor host = torch::stable::from_blob(which.data(), {count}, {1},
                                               torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Long);
  const Tensor index = torch::stable::to(
      host, torch::stable::Device(torch::headeronly::DeviceType::CUDA, c.get_device_index()));
  const auto select = [&](const Tensor& x) { return call_aten<1>("aten::index_select", "", x, int64_t{0}, index)[0]; };
  const auto put = [&](const Tensor& x, const Tensor& values) {
    call_aten<1>("aten::index_copy_", "", x, int64_t{0}, index, values);
  };
  const auto [values, vectors] = call_aten<2>("aten::linalg_eigh", "", select(c), std::string("L"));
  const Solution kept = inverted_spectrum(dense(values), rcond, false);
  const Tensor coordinates = multiply(aten::matmul(select(rows), vectors), kept.t);
  put(out.t, aten::matmul(coordinates, aten::transpose(vectors)));
  put(out.rank, kept.rank);
  put(out.condition, kept.condition);
}

// rows [batches, m, n] (C + ridge·I)^†; c is symmetric with the ridge on its diagonal. `flags` says whether the lower
// triangle that c was made of is finite.
Solution solve(const Tensor& c, const Tensor& rows, double rcond, const Tensor& flags) {
  const int64_t batches = c.sizes()[0], n = c.sizes()[1];
  auto* flag = static_cast<cuda::Flags*>(flags.mutable_data_ptr());
  constexpr int64_t stride = sizeof(cuda::Flags) / sizeof(int);
  Tensor work = shifted(c, rcond);
  const Factors proof(work, &flag->unproven, stride);
  torch::stable::copy_(work, c);
  const Factors factors(work, &flag->not_factorised, stride);
  Solution out{torch::stable::clone(rows), new_empty(c, {batches}, ScalarType::Long),
               new_empty(c, {batches}, ScalarType::Double)};
  factors.solve(out.t);
  condition_of(c, factors, out);

  const Tensor host = to_host(flags);  // the only wait for the device
  const auto* seen = static_cast<const cuda::Flags*>(host.const_data_ptr());
  std::vector<int64_t> others;
  for (int64_t b = 0; b < batches; ++b) {
    check(seen[b].not_finite == 0, batches > 1 ? indexed("C", b) : "C", " contains NaN or Inf");
    if (seen[b].unproven || seen[b].not_factorised) others.push_back(b);
  }
  if (n <= kBatchedEigen && !others.empty()) {
    solve_by_spectrum(c, rows, rcond, others, out);
  } else {
    for (const int64_t b : others) solve_by_spectrum(c, rows, rcond, {b}, out);
  }
  return out;
}

// c [B, n, n], d and anchor [B, m, n]; shapes are checked by the Python wrapper.
std::tuple<Tensor, Tensor, Tensor> layer_solve(Tensor c, Tensor d, std::optional<Tensor> anchor, double rcond,
                                               double ridge) {
  const torch::stable::accelerator::DeviceGuard guard(c.get_device_index());
  const int64_t batches = c.sizes()[0], n = c.sizes()[1];
  const ScalarType type = d.scalar_type();
  if (batches == 0 || n == 0) {
    Tensor condition = new_empty(c, {batches}, ScalarType::Double);
    torch::stable::fill_(condition, 1.0);
    return {torch::stable::clone(d), torch::stable::new_zeros(c, {batches}, ScalarType::Long), condition};
  }
  c = dense(c);
  const Tensor flags = torch::stable::new_zeros(c, {batches, sizeof(cuda::Flags) / sizeof(int)}, ScalarType::Int);
  const Tensor full = mirrored(c, static_cast<cuda::Flags*>(flags.mutable_data_ptr()));
  Tensor rows = dense(to_dtype(d, ScalarType::Double));
  Tensor start;
  if (anchor) {
    start = dense(to_dtype(*anchor, ScalarType::Double));
    rows = torch::stable::clone(rows);
    subtract_product(rows, start, full);
  }
  if (ridge != 0.0) add_to_diagonal(full, ridge, nullptr);
  const Solution out = solve(full, rows, rcond, flags);
  const Tensor t = anchor ? torch::stable::subtract(out.t, start, -1.0) : out.t;
  return {to_dtype(t, type), out.rank, out.condition};
}

bool finite(const Tensor& x) {
  const Tensor all = call_aten<1>("aten::all", "", call_aten<1>("aten::isfinite", "", x)[0])[0];
  return *static_cast<const bool*>(to_host(all).const_data_ptr());
}

// T = Yᵀ (X^†)ᵀ with the rows X_k of all experts stacked and Y_k = X_k T_kᵀ, by the singular values of the triangular
// factor of X (or Xᵀ, whichever is tall), which are those of X. A weight w of a token multiplies its row by √w.
std::tuple<Tensor, Tensor, Tensor> layer_solve_features(TensorList xs, TensorList ts, TensorList weights, double rcond) {
  const torch::stable::accelerator::DeviceGuard guard(xs[0].get_device_index());
  const ScalarType type = ts[0].scalar_type();
  TensorList outputs;
  for (size_t k = 0; k < xs.size(); ++k) {
    Tensor x = to_dtype(xs[k], ScalarType::Double);
    if (!weights.empty()) {
      const Tensor root = call_aten<1>("aten::sqrt", "", to_dtype(weights[k], ScalarType::Double))[0];
      x = multiply(x, reshape(root, {x.sizes()[0], 1}));
    }
    outputs.push_back(aten::matmul(x, aten::transpose(to_dtype(ts[k], ScalarType::Double))));
    xs[k] = x;
  }
  const Tensor x = call_aten<1>("aten::cat", "", xs, int64_t{0})[0];
  const Tensor y = call_aten<1>("aten::cat", "", outputs, int64_t{0})[0];
  const int64_t tokens = x.sizes()[0], n = x.sizes()[1], m = ts[0].sizes()[0];
  if (tokens == 0 || n == 0) {
    Tensor condition = new_empty(x, {1}, ScalarType::Double);
    torch::stable::fill_(condition, 1.0);
    return {torch::stable::new_zeros(ts[0], {m, n}), torch::stable::new_zeros(x, {1}, ScalarType::Long), condition};
  }
  check(finite(x), "xs contains NaN or Inf");
  const bool wide = tokens < n;
  const auto [q, r] = call_aten<2>("aten::linalg_qr", "", wide ? aten::transpose(x) : x, std::string("reduced"));
  const auto [u, s, vh] = call_aten<3>("aten::linalg_svd", "", wide ? aten::transpose(r) : r, false,
                                       std::optional<std::string>());
  const Solution kept = inverted_spectrum(reshape(dense(s), {1, s.numel()}), rcond, true);
  Tensor rows = aten::transpose(y);  // [m, tokens]
  if (!wide) rows = aten::matmul(rows, q);
  rows = multiply(aten::matmul(rows, u), reshape(kept.t, {1, s.numel()}));
  rows = aten::matmul(rows, vh);
  if (wide) rows = aten::matmul(rows, aten::transpose(q));
  return {to_dtype(rows, type), kept.rank, kept.condition};
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CUDA, m) {
  m.impl("layer_solve", TORCH_BOX(&statsmerge::layer_solve));
  m.impl("layer_solve_features", TORCH_BOX(&statsmerge::layer_solve_features));
}
