// Loading rows of any element type, and the fused product Aᵀ(A V): each row is loaded once and used for both factors.
#include "cpu/operand.h"

#include <cmath>
#include <limits>

#include "cpu/kernels/vector_ops.h"

namespace statsmerge {
namespace {

template <class T>
STATSMERGE_CLONES void load_run(const T* x, int64_t n, double* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = static_cast<double>(widen(x[j]));
}

// Differences of float32 values are rounded to float32, as a task vector formed beforehand would be.
template <class T, class U>
STATSMERGE_CLONES void subtract_run(const T* x, const U* y, int64_t n, double* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = static_cast<double>(widen(x[j]) - widen(y[j]));
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

// out[c] += Σ_r factors[r][c] rows[r], four rows and one c at a time.
STATSMERGE_CLONES void add_four_rows(const double* r0, const double* r1, const double* r2, const double* r3, double f0,
                                     double f1, double f2, double f3, double* out, int64_t n) {
  for (int64_t j = 0; j < n; ++j) out[j] += f0 * r0[j] + f1 * r1[j] + f2 * r2[j] + f3 * r3[j];
}

STATSMERGE_CLONES void dot_four_rows(const double* r0, const double* r1, const double* r2, const double* r3,
                                     const double* v, double* out, int64_t n) {
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

}  // namespace

Operand::Operand(const Tensor& mat, const Tensor* minus)
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

void Operand::load_row(int64_t row, double* out) const {
  dispatch_storage(storage_, [&](auto* type) {
    const auto* x = reinterpret_cast<decltype(type)>(bytes(mat_)) + row * row_stride_;
    if (!minus_) return load_run(x, columns, out);
    dispatch_storage(minus_storage_, [&](auto* other) {
      subtract_run(x, reinterpret_cast<decltype(other)>(bytes(*minus_)) + row * minus_stride_, columns, out);
    });
  });
  if (scale_ != 1) multiply(scale_, out, columns);
}

void Operand::inspect(int64_t index) {
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
    check(std::isfinite(value), indexed("mats", index), minus_ ? indexed(" - minus", index) : "",
          " contains NaN or Inf");
    all = std::max(all, value);
  }
  if (all != 0 && (all > 0x1p300 || all < 0x1p-300)) scale_ = std::ldexp(1.0, -std::ilogb(all));
}

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

}  // namespace statsmerge
