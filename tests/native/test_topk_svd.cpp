#include <limits>

#include "check.h"
#include "cpu/kernels/svd.h"
#include "cpu/kernels/symmetric_eigen.h"

using statsmerge::Moments;
using statsmerge::Operand;
using statsmerge::Rows;
using statsmerge::Storage;
using statsmerge::Svd;
using statsmerge::SvdSettings;

namespace {

// A matrix of any storage type, its rows three elements further apart than they are long and NaN or huge in between.
struct Stored {
  Stored(int64_t rows, int64_t columns, Storage storage, const std::vector<double>& values)
      : storage(storage), stride(columns + 3), exact(values) {
    bytes.resize(static_cast<size_t>(rows * stride * statsmerge::bytes_of(storage)), '\x7f');
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) exact[i * columns + j] = put(i * stride + j, values[i * columns + j]);
    }
  }

  double put(int64_t at, double value) {
    return statsmerge::dispatch_storage(storage, [&](auto* type) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
      const T narrowed = statsmerge::narrow<T>(value);
      std::memcpy(bytes.data() + at * static_cast<int64_t>(sizeof(T)), &narrowed, sizeof(T));
      return static_cast<double>(statsmerge::widen(narrowed));
    });
  }

  Storage storage;
  int64_t stride;
  std::vector<double> exact;
  std::vector<char> bytes;
};

Operand operand(const Stored& a, int64_t rows, int64_t columns) {
  return {rows, columns, a.bytes.data(), a.storage, a.stride};
}

// The largest singular values, squared, from the smaller Gram matrix.
std::vector<double> squared_values(const std::vector<double>& a, int64_t rows, int64_t columns) {
  const bool wide = rows < columns;
  const int64_t n = wide ? rows : columns, m = wide ? columns : rows;
  std::vector<double> gram(static_cast<size_t>(n * n), 0.0);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t k = 0; k < m; ++k)
        gram[i * n + j] += wide ? a[i * columns + k] * a[j * columns + k] : a[k * columns + i] * a[k * columns + j];
    }
  }
  return statsmerge::symmetric_eigen(gram, n).values;
}

constexpr Storage kStorages[] = {Storage::f64, Storage::f32, Storage::bf16, Storage::f16};

template <class Real>
void check_products(const Operand& a, const std::vector<double>& exact, double allowed) {
  for (int64_t count : {1, 4, 6}) {
    Rows v(count, a.columns), w(count, a.columns);
    const auto random = normal(count * a.columns, 5);
    for (int64_t c = 0; c < count; ++c) std::copy_n(random.data() + c * a.columns, a.columns, v[c]);
    statsmerge::Products<Real>(a).normal(v[0], count, w);
    const Rows images = statsmerge::product(a, v, count);
    for (int64_t c = 0; c < count; ++c) {
      std::vector<double> expected(static_cast<size_t>(a.columns), 0.0);
      double magnitude = 0;
      for (int64_t i = 0; i < a.rows; ++i) {
        double y = 0;
        for (int64_t j = 0; j < a.columns; ++j) y += exact[i * a.columns + j] * v[c][j];
        CHECK(std::abs(images[c][i] - y) <= 1e-12 * static_cast<double>(a.columns), images[c][i], y);
        for (int64_t j = 0; j < a.columns; ++j) expected[j] += y * exact[i * a.columns + j];
        magnitude += std::abs(y) * 4;
      }
      for (int64_t j = 0; j < a.columns; ++j)
        CHECK(std::abs(w[c][j] - expected[j]) <= allowed * (magnitude + 1), a.rows, a.columns, count);
    }
  }
}

}  // namespace

NATIVE_TEST(products_of_every_storage_and_size) {
  for (auto [rows, columns] : {std::pair<int64_t, int64_t>{1, 1}, {3, 17}, {4, 16}, {9, 5}, {21, 33}, {6, 130}}) {
    const auto values = normal(rows * columns, 1), others = normal(rows * columns, 2);
    for (Storage storage : kStorages) {
      const Stored a(rows, columns, storage, values);
      Operand view = operand(a, rows, columns);
      check_products<double>(view, a.exact, 1e-13);
      if (storage != Storage::f64) check_products<float>(view, a.exact, 1e-5);
      for (Storage minus_storage : kStorages) {
        const Stored b(rows, columns, minus_storage, others);
        view.minus = b.bytes.data();
        view.minus_storage = minus_storage;
        view.minus_stride = b.stride;
        std::vector<double> difference = a.exact;
        for (size_t i = 0; i < difference.size(); ++i) {
          difference[i] -= b.exact[i];
          if (!view.is_double()) difference[i] = static_cast<double>(static_cast<float>(difference[i]));
        }
        check_products<double>(view, difference, 1e-13);
        if (!view.is_double()) check_products<float>(view, difference, 1e-5);
      }
    }
  }
}

NATIVE_TEST(singular_values_lie_within_their_bounds) {
  for (auto [rows, columns] : {std::pair<int64_t, int64_t>{5, 40}, {40, 5}, {60, 47}, {47, 90}, {150, 64}}) {
    for (Storage storage : {Storage::f64, Storage::f32}) {
      for (double decay : {0.0, 1.0, 3.0}) {
        auto values = normal(rows * columns, 7);
        for (int64_t i = 0; i < rows * columns; ++i)
          values[i] *= std::pow(1.0 + static_cast<double>(i % columns), -decay);
        const Stored a(rows, columns, storage, values);
        const auto squares = squared_values(a.exact, rows, columns);
        const int64_t k = 4;
        const SvdSettings settings{k, 1e-3, 1000, true, 11};
        Moments moments;
        for (const Svd& svd : {statsmerge::lanczos_svd(operand(a, rows, columns), settings, &moments),
                               statsmerge::dense_svd(operand(a, rows, columns), settings, &moments)}) {
          double sum = 0, norm = 0;
          for (double x : a.exact) sum += x, norm += x * x;
          CHECK(std::abs(moments.mean() - sum / static_cast<double>(rows * columns)) <= 1e-14, moments.mean());
          CHECK(std::abs(moments.norm() - std::sqrt(norm)) <= 1e-12 * std::sqrt(norm), moments.norm());
          for (int64_t i = 0; i < k; ++i) {
            const double exact = std::sqrt(squares[i]), rounding = 1e-7 * std::sqrt(squares[0]);
            CHECK(std::abs(svd.s[i] - exact) <= svd.bound[i] + rounding, svd.s[i], exact, svd.bound[i]);
            CHECK(svd.bound[i] <= 1e-3 * svd.s[i] + rounding, svd.s[i], svd.bound[i]);
            for (int64_t j = 0; j <= i; ++j) {
              double product = 0;
              for (int64_t l = 0; l < columns; ++l) product += svd.v[i][l] * svd.v[j][l];
              CHECK(std::abs(product - (i == j)) <= 1e-13, product);
            }
          }
        }
      }
    }
  }
}

NATIVE_TEST(differences_are_decomposed_as_their_matrix_would_be) {
  const int64_t rows = 71, columns = 55;
  const SvdSettings settings{3, 1e-3, 100, true, 5};
  for (Storage storage : {Storage::f32, Storage::bf16, Storage::f16}) {
    const Stored a(rows, columns, storage, normal(rows * columns, 1));
    const Stored b(rows, columns, Storage::f32, normal(rows * columns, 2));
    std::vector<double> difference = a.exact;
    for (size_t i = 0; i < difference.size(); ++i) difference[i] -= b.exact[i];
    Operand view = operand(a, rows, columns);
    view.minus = b.bytes.data();
    view.minus_stride = b.stride;
    const Stored formed(rows, columns, Storage::f32, difference);
    Moments ours, expected;
    const Svd svd = statsmerge::lanczos_svd(view, settings, &ours);
    const Svd same = statsmerge::lanczos_svd(operand(formed, rows, columns), settings, &expected);
    CHECK(svd.s == same.s && svd.bound == same.bound && svd.v.length == columns && svd.u.length == rows);
    CHECK(ours.mean() == expected.mean() && ours.variance() == expected.variance());
  }
}

NATIVE_TEST(singular_values_do_not_depend_on_threads) {
  const int64_t rows = 2300, columns = 1100;  // several parts
  const Stored a(rows, columns, Storage::bf16, normal(rows * columns, 9));
  const SvdSettings settings{3, 0.05, 6, false, 0};
  const Svd one = statsmerge::lanczos_svd(operand(a, rows, columns), settings);
  set_threads(3);
  const Svd three = statsmerge::lanczos_svd(operand(a, rows, columns), settings);
  CHECK(one.s == three.s && one.bound == three.bound && one.passes == three.passes);
}

NATIVE_TEST(values_that_are_not_finite_are_refused) {
  for (double value : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    for (int64_t side : {8, 50}) {
      auto values = normal(side * side, 1);
      values.back() = value;
      const Stored a(side, side, Storage::f32, values);
      for (auto* svd : {&statsmerge::dense_svd, &statsmerge::lanczos_svd}) {
        bool refused = false;
        try {
          svd(operand(a, side, side), {2, 1e-3, 100, false, 0}, nullptr);
        } catch (const statsmerge::NotFinite&) {
          refused = true;
        }
        CHECK(refused, side, value);
      }
    }
  }
}
