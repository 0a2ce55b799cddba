// The threads of layer_solve's kernels, run by loops on the host with a barrier wherever the kernel has one.
#include <algorithm>

#include "check.h"
#include "cuda/solve_threads.h"

namespace {

using namespace statsmerge::cuda;

// A symmetric positive definite matrix [n, n].
std::vector<double> positive_definite(int64_t n, uint64_t seed) {
  const auto x = normal(2 * n * n, seed);
  std::vector<double> a(static_cast<size_t>(n * n), 0.0);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t k = 0; k < 2 * n; ++k) a[i * n + j] += x[k * n + i] * x[k * n + j];
    }
  }
  return a;
}

std::vector<double> shared_memory() { return std::vector<double>(kLeaf * kLeafPitch, NAN); }

bool factor_leaf(const LeafBlock& block) {
  auto leaf = shared_memory();
  for (int thread = 0; thread < kLeafThreads; ++thread) load_leaf(block, leaf.data(), thread);
  for (int j = 0; j < block.size; ++j) {
    for (int thread = kLeafThreads - 1; thread >= 0; --thread) factor_step(leaf.data(), block.size, j, thread);
  }
  for (int thread = 0; thread < kLeafThreads; ++thread) store_factor(leaf.data(), block, thread);
  return positive_pivots(leaf.data(), block.size);
}

// Lanes in descending order: no step may depend on another lane's.
void substitute(const double* leaf, double* r, int size, bool forward, int lanes) {
  for (int step = 0; step < size; ++step) {
    for (int lane = lanes - 1; lane >= 0; --lane) {
      substitute_step(leaf, r, size, forward ? step : size - 1 - step, forward, lane, lanes);
    }
  }
  for (int j = 0; j < size; ++j) r[j] /= leaf[j * kLeafPitch + j];
}

}  // namespace

NATIVE_TEST(cuda_triangle_tiles_cover_the_triangle_once) {
  int64_t t = 0;
  for (int64_t row = 0; row < 700; ++row) {
    for (int64_t column = 0; column <= row; ++column, ++t) {
      const TileAt at = triangle_tile(t);
      CHECK(at.row == row && at.column == column, t);
    }
  }
  for (const int64_t row : {int64_t{100000}, int64_t{1} << 26}) {
    const int64_t first = row * (row + 1) / 2;
    CHECK(triangle_tile(first).row == row && triangle_tile(first).column == 0);
    CHECK(triangle_tile(first - 1).row == row - 1 && triangle_tile(first - 1).column == row - 1);
  }
}

NATIVE_TEST(cuda_leaf_factorises_and_substitutes) {
  for (const int size : {1, 2, 15, 16, 17, 63, 64}) {
    const int64_t n = size + 5;
    const auto a = positive_definite(n, 1);
    auto l = a;
    double* block = l.data() + 3 * n + 3;  // inside a larger matrix
    CHECK(factor_leaf({block, n, size}));
    for (int i = 0; i < size; ++i) {
      for (int j = 0; j <= i; ++j) {
        double sum = 0;
        for (int k = 0; k <= j; ++k) sum += block[i * n + k] * block[j * n + k];
        CHECK(std::abs(sum - a[(i + 3) * n + j + 3]) <= 1e-12 * n, size, i, j);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const bool inside = i >= 3 && j >= 3 && i < 3 + size && j <= i && j < 3 + size;
        CHECK(inside || l[i * n + j] == a[i * n + j], "outside of the block", i, j);
      }
    }
    auto leaf = shared_memory();
    for (int thread = 0; thread < kLeafThreads; ++thread) load_leaf({block, n, size}, leaf.data(), thread);
    for (const int lanes : {kRowLanes, 32}) {
      for (const bool forward : {true, false}) {
        const auto r = normal(size, 2);
        auto x = r;
        substitute(leaf.data(), x.data(), size, forward, lanes);
        for (int i = 0; i < size; ++i) {
          double sum = 0;  // (x Lᵀ)_i or (x L)_i
          for (int j = 0; j < size; ++j) {
            if (forward ? j <= i : j >= i) sum += x[j] * (forward ? block[i * n + j] : block[j * n + i]);
          }
          CHECK(std::abs(sum - r[i]) <= 1e-11 * (1 + std::abs(r[i])), size, i, forward);
        }
      }
    }
  }
}

NATIVE_TEST(cuda_leaf_sees_what_is_not_positive_definite) {
  for (const double pivot : {0.0, -1.0, std::nan("")}) {
    auto a = positive_definite(20, 3);
    a[7 * 20 + 7] = pivot;
    CHECK(!factor_leaf({a.data(), 20, 20}), pivot);
  }
}

NATIVE_TEST(cuda_vector_solve_goes_through_all_leaves) {
  const int64_t n = 150;  // two whole leaves and a part
  const auto a = positive_definite(n, 4);
  auto l = a;
  for (int64_t j = 0; j < n; ++j) {  // a plain factorisation
    for (int64_t i = j; i < n; ++i) {
      double sum = a[i * n + j];
      for (int64_t k = 0; k < j; ++k) sum -= l[i * n + k] * l[j * n + k];
      l[i * n + j] = i == j ? std::sqrt(sum) : sum / l[j * n + j];
    }
  }
  const auto right = normal(n, 5);
  auto y = right, work = std::vector<double>(n, NAN);
  const auto leaf_at = [&](int64_t first, bool forward, std::vector<double>& rest, std::vector<double>& solution) {
    const int size = static_cast<int>(std::min<int64_t>(kLeaf, n - first));
    auto leaf = shared_memory();
    for (int thread = 0; thread < kLeafThreads; ++thread) load_leaf({l.data() + first * n + first, n, size}, leaf.data(), thread);
    std::vector<double> x(rest.begin() + first, rest.begin() + first + size);
    substitute(leaf.data(), x.data(), size, forward, 32);
    std::copy(x.begin(), x.end(), solution.begin() + first);
    for (int64_t i = forward ? first + size : 0; i < (forward ? n : first); ++i) {
      double product = 0;
      if (forward) {
        for (int lane = 0; lane < 32; ++lane) product += forward_product(l.data(), n, first, size, x.data(), i, lane);
      } else {
        product = backward_product(l.data(), n, first, size, x.data(), i);
      }
      rest[i] -= product;
    }
  };
  for (int64_t first = 0; first < n; first += kLeaf) leaf_at(first, true, y, work);
  for (int64_t first = (n - 1) / kLeaf * kLeaf; first >= 0; first -= kLeaf) leaf_at(first, false, work, y);
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += a[i * n + j] * y[j];
    CHECK(std::abs(sum - right[i]) <= 1e-9, i);
  }
}

NATIVE_TEST(cuda_largest_eigenvalue_of_tridiagonals) {
  // 2 on the diagonal and −1 beside it: 2 + 2 cos(π / (n + 1))
  for (int n = 1; n <= kLanczosSteps; ++n) {
    const std::vector<double> diagonal(kLanczosSteps, 2.0), coupling(kLanczosSteps, -1.0);
    const double expected = 2 + 2 * std::cos(M_PI / (n + 1));
    CHECK(std::abs(largest_eigenvalue(diagonal.data(), coupling.data(), n) - expected) <= 1e-14 * expected, n);
  }
  const double ascending[] = {1, 2, 3e30}, zeros[] = {0, 0, 0}, bad[] = {1, std::nan(""), 2};
  CHECK(std::abs(largest_eigenvalue(ascending, zeros, 3) / 3e30 - 1) < 1e-15);
  CHECK(largest_eigenvalue(zeros, zeros, 3) == 0);
  CHECK(std::isnan(largest_eigenvalue(bad, zeros, 3)) && std::isnan(largest_eigenvalue(zeros, bad, 3)));
}

NATIVE_TEST(cuda_lanczos_starts_from_entries_of_every_sign) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < 100000; ++i) {
    const double x = start_entry(i);
    CHECK(x > -1 && x < 1 && x != 0, i);
    sum += x;
    squares += x * x;
  }
  CHECK(std::abs(sum) < 1000 && std::abs(squares / 100000 - 1.0 / 3) < 0.01, sum, squares);
}

NATIVE_TEST(cuda_spectrum_threshold_is_relative_and_never_negative) {
  CHECK(spectrum_threshold(-1e-9, 4, 1e-3) == 0 && spectrum_threshold(0, 4, 1e-3) == 0);
  CHECK(spectrum_threshold(2, 4, 1e-3) == 2e-3);
  CHECK(spectrum_threshold(2, 4, 0) == 8 * 2.220446049250313e-16);
}
