#include <limits>
#include <string>

#include "check.h"
#include "cpu/kernels/product.h"

using namespace statsmerge;

namespace {

// A matrix of normal numbers in any storage, with the values as they were rounded.
struct Stored {
  std::vector<char> bytes;
  std::vector<double> values;  // in memory order
  Storage storage;

  Stored(int64_t count, Storage storage, uint64_t seed) : storage(storage) {
    dispatch_storage(storage, [&](auto* type) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
      // One element in front: the data is not aligned to more than its elements.
      bytes.resize(static_cast<size_t>(count + 1) * sizeof(T));
      T* to = reinterpret_cast<T*>(bytes.data()) + 1;
      for (double x : normal(count, seed)) {
        *to = narrow<T>(x);
        values.push_back(widen(*to++));
      }
    });
  }
  const char* data() const { return bytes.data() + bytes_of(storage); }
};

template <class Acc>
void check_product(int64_t n, int64_t p, int64_t q, Storage storage, bool by_column, bool weighted, bool lower) {
  if (lower) q = p;
  const int64_t padding = 3;
  const auto view = [&](const Stored& s, int64_t columns) {
    return MatrixView{s.data(), storage, n, columns, by_column ? 1 : columns + padding, by_column ? n + padding : 1};
  };
  const Stored left((n + padding) * (p + padding), storage, 1);
  const Stored right((n + padding) * (q + padding), storage, 2);
  const Stored& second = lower ? left : right;
  const MatrixView a = view(left, p), b = view(second, q);
  const std::vector<Acc> weights = cast<Acc>(normal(n, 3));
  const Acc* weight = weighted ? weights.data() : nullptr;
  const Acc untouched = 7;
  std::vector<Acc> c[2];
  for (int threads : {1, 3}) {
    set_threads(threads);
    std::vector<Acc>& out = c[threads == 3];
    out.assign(static_cast<size_t>(p * (q + padding)), untouched);
    accumulate_product<Acc>(Acc(0.5), a, b, weight, out.data(), q + padding, 1, lower);
    std::vector<Acc> transposed(static_cast<size_t>(p * q), untouched);
    accumulate_product<Acc>(Acc(0.5), a, b, weight, transposed.data(), 1, p, lower);
    for (int64_t i = 0; i < p; ++i) {
      for (int64_t j = 0; j < (lower ? i + 1 : q); ++j) {
        CHECK(transposed[i + j * p] == out[i * (q + padding) + j], "column stride", i, j);
      }
    }
  }
  CHECK(c[0] == c[1], "threads");
  // Roundings of a sum wander off with the square root of its length.
  const double tolerance = (4 + std::sqrt(n)) * std::numeric_limits<Acc>::epsilon() / 2;
  for (int64_t i = 0; i < p; ++i) {
    for (int64_t j = 0; j < q + padding; ++j) {
      const double got = c[0][i * (q + padding) + j];
      if (j >= q) CHECK(got == untouched, "beyond c");
      if (j >= (lower ? i + 1 : q)) continue;
      double expected = untouched, magnitude = untouched;
      for (int64_t t = 0; t < n; ++t) {
        const double term = 0.5 * left.values[t * a.row_stride + i * a.column_stride] *
                            (weighted ? weights[t] : 1.0) *
                            second.values[t * b.row_stride + j * b.column_stride];
        expected += term;
        magnitude += std::abs(term);
      }
      CHECK(std::abs(got - expected) <= tolerance * magnitude, n, p, q, i, j, got - expected);
    }
  }
}

template <class Acc>
void check_products() {
  constexpr Storage kStorages[] = {Storage::f64, Storage::f32, Storage::bf16, Storage::f16};
  int turn = 0;
  for (int64_t n : {1, 2, 37, 401}) {
    for (int64_t p : {1, 9, 50}) {
      for (int64_t q : {1, 31, 97}) {
        for (Storage storage : kStorages) {
          ++turn;
          check_product<Acc>(n, p, q, storage, turn & 1, turn & 2, false);
          check_product<Acc>(n, p, q, storage, turn & 2, turn & 1, true);
        }
      }
    }
  }
}

}  // namespace

NATIVE_TEST(products_in_single_precision) { check_products<float>(); }
NATIVE_TEST(products_in_double_precision) { check_products<double>(); }

NATIVE_TEST(products_of_many_blocks_and_slices) {
  check_product<float>(300, 500, 0, Storage::f32, false, false, true);
  check_product<float>(250, 333, 410, Storage::bf16, true, true, false);
  check_product<float>(5000, 20, 0, Storage::f16, true, true, true);
  check_product<double>(5000, 9, 30, Storage::f32, false, true, false);
}

NATIVE_TEST(products_of_nothing) {
  const double one = 1;
  double c = 5;
  const auto view = [&](int64_t rows, int64_t columns) {
    return MatrixView{reinterpret_cast<const char*>(&one), Storage::f64, rows, columns, 1, 1};
  };
  accumulate_product<double>(1, view(0, 1), view(0, 1), nullptr, &c, 1, 1, true);
  accumulate_product<double>(1, view(1, 0), view(1, 1), nullptr, &c, 1, 1, false);
  accumulate_product<double>(1, view(1, 1), view(1, 0), nullptr, &c, 1, 1, false);
  CHECK(c == 5);
}
