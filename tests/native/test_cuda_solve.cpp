// layer_solve's kernels on the host: the functions of their threads by loops, then the kernels themselves.
#include <algorithm>

#include "check.h"
#include "cpu/kernels/symmetric_eigen.h"
#include "emulated_device.h"
// after what stands for the device
#include "cuda/layer_solve.cuh"

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

DEVICE_TEST(cuda_triangle_tiles_cover_the_triangle_once) {
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

DEVICE_TEST(cuda_leaf_factorises_and_substitutes) {
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

DEVICE_TEST(cuda_leaf_sees_what_is_not_positive_definite) {
  for (const double pivot : {0.0, -1.0, std::nan("")}) {
    auto a = positive_definite(20, 3);
    a[7 * 20 + 7] = pivot;
    CHECK(!factor_leaf({a.data(), 20, 20}), pivot);
  }
}

DEVICE_TEST(cuda_vector_solve_goes_through_all_leaves) {
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

DEVICE_TEST(cuda_largest_eigenvalue_of_tridiagonals) {
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

DEVICE_TEST(cuda_lanczos_starts_from_entries_of_every_sign) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < 100000; ++i) {
    const double x = start_entry(i);
    CHECK(x > -1 && x < 1 && x != 0, i);
    sum += x;
    squares += x * x;
  }
  CHECK(std::abs(sum) < 1000 && std::abs(squares / 100000 - 1.0 / 3) < 0.01, sum, squares);
}

DEVICE_TEST(cuda_spectrum_threshold_is_relative_and_never_negative) {
  CHECK(spectrum_threshold(-1e-9, 4, 1e-3) == 0 && spectrum_threshold(0, 4, 1e-3) == 0);
  CHECK(spectrum_threshold(2, 4, 1e-3) == 2e-3);
  CHECK(spectrum_threshold(2, 4, 0) == 8 * 2.220446049250313e-16);
}

DEVICE_TEST(cuda_mirror_kernel) {
  for (const int64_t n : {1, 31, 32, 33, 70}) {
    const int64_t batches = 2, side = (n + kMirrorTile - 1) / kMirrorTile, tiles = side * (side + 1) / 2;
    auto in = cast<float>(normal(batches * n * n, n));
    for (int64_t e = 0; e < batches * n * n; ++e) {
      if (e % n > e / n % n) in[e] = NAN;  // above the diagonal: not read
    }
    std::vector<double> out(in.size(), NAN);
    std::vector<Flags> flags(batches, Flags{});
    const auto run = [&] { mirror_kernel(in.data(), n, tiles, out.data(), flags.data()); };
    emulated::launch({static_cast<unsigned>(batches * tiles), 1}, 256, run);
    for (int64_t e = 0; e < batches * n * n; ++e) {
      const int64_t i = e / n % n, j = e % n, matrix = e - i * n - j;
      CHECK(out[e] == in[matrix + std::max(i, j) * n + std::min(i, j)], n, e);
    }
    CHECK(flags[0].not_finite == 0 && flags[1].not_finite == 0);
  }
}

DEVICE_TEST(cuda_shift_kernels_bound_the_largest_eigenvalue) {
  const int64_t n = 40, batches = 2;
  std::vector<double> c(batches * n * n, 0.0), shift(batches, NAN);
  for (int64_t i = 0; i < n; ++i) {
    c[i * n + i] = 3.0;                                                  // row sums: 3
    for (int64_t j = 0; j < n; ++j) c[n * n + i * n + j] = i == j || i == 0 || j == 0 ? 1.0 : 0.0;  // Frobenius
  }
  std::vector<double2> norms(batches * n);
  emulated::launch({static_cast<unsigned>(batches * n / 8), 1}, 256, [&] { row_norms_kernel(c.data(), batches * n, n, norms.data()); });
  emulated::launch({static_cast<unsigned>(batches), 1}, 32, [&] { shift_kernel(norms.data(), n, 0.5, shift.data()); });
  CHECK(std::abs(shift[0] - 1.5) < 1e-14 && std::abs(shift[1] - 0.5 * std::sqrt(3.0 * n - 2)) < 1e-13, shift[0], shift[1]);
  emulated::launch({1, 1}, 256, [&] { add_to_diagonal_kernel(c.data(), batches, n, 0.0, shift.data()); });
  CHECK(c[0] == 3.0 - shift[0] && c[1] == 0 && c[n * n + 2 * n + 2] == 1.0 - shift[1] && c[n * n] == 1.0 - shift[1]);
}

// A system of three leaves, factorised and solved as the operator does, the products of matrices by loops.
DEVICE_TEST(cuda_solve_kernels_together) {
  const int64_t n = 150, batches = 2, m = 21;
  std::vector<double> a;
  for (int64_t b = 0; b < batches; ++b) {
    const auto one = positive_definite(n, 20 + b);
    a.insert(a.end(), one.begin(), one.end());
  }
  auto l = a;
  auto rows = normal(batches * m * n, 9);
  const auto right = rows;
  std::vector<Flags> flags(batches, Flags{});
  const auto size_at = [&](int64_t first) { return static_cast<int>(std::min<int64_t>(kLeaf, n - first)); };
  const auto substitute_at = [&](int64_t first, const Rows& view, bool forward) {
    const int64_t tiles = (view.count + kRowTile - 1) / kRowTile;
    emulated::launch({static_cast<unsigned>(tiles * batches), 1}, kLeafThreads,
                     [&] { substitute_kernel(l.data(), n, first, size_at(first), view, tiles, forward); });
  };
  for (int64_t first = 0; first < n; first += kLeaf) {
    const int size = size_at(first);
    emulated::launch({static_cast<unsigned>(batches), 1}, kLeafThreads,
                     [&] { factor_kernel(l.data(), n, first, size, &flags[0].unproven, sizeof(Flags) / sizeof(int)); });
    const int64_t below = first + size;
    if (below == n) break;
    substitute_at(first, {l.data() + below * n + first, n * n, n, n - below}, true);
    for (int64_t b = 0; b < batches; ++b) {
      double* matrix = l.data() + b * n * n;
      for (int64_t i = below; i < n; ++i) {
        for (int64_t j = below; j <= i; ++j) {
          for (int64_t k = first; k < below; ++k) matrix[i * n + j] -= matrix[i * n + k] * matrix[j * n + k];
        }
      }
    }
  }
  CHECK(flags[0].unproven == 0 && flags[1].unproven == 0);
  const auto couple = [&](int64_t first, bool forward) {  // takes a solved leaf from the rest
    for (int64_t r = 0; r < batches * m; ++r) {
      const double* matrix = l.data() + r / m * n * n;
      for (int64_t i = forward ? first + size_at(first) : 0; i < (forward ? n : first); ++i) {
        for (int64_t j = first; j < first + size_at(first); ++j) {
          rows[r * n + i] -= rows[r * n + j] * (forward ? matrix[i * n + j] : matrix[j * n + i]);
        }
      }
    }
  };
  for (int64_t first = 0; first < n; first += kLeaf) {
    substitute_at(first, {rows.data() + first, m * n, n, m}, true);
    couple(first, true);
  }
  for (int64_t first = (n - 1) / kLeaf * kLeaf; first >= 0; first -= kLeaf) {
    substitute_at(first, {rows.data() + first, m * n, n, m}, false);
    couple(first, false);
  }
  const auto residual = [&](const double* x, int64_t b, int64_t i) {
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += x[j] * a[(b * n + j) * n + i];
    return sum;
  };
  for (int64_t r = 0; r < batches * m; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      CHECK(std::abs(residual(rows.data() + r * n, r / m, i) - right[r * n + i]) <= 1e-9, r, i);
    }
  }

  // the same for a vector, leaf by leaf
  const auto vector = normal(batches * n, 10);
  const auto solve_vector = [&](std::vector<double>& y) {
    std::vector<double> work(batches * n, NAN);
    const auto leaf = [&](int64_t first, int64_t parts, std::vector<double>& rest, std::vector<double>& out, bool forward) {
      emulated::launch({static_cast<unsigned>(parts * batches), 1}, 256, [&] {
        leaf_vector_kernel(l.data(), n, first, size_at(first), rest.data(), out.data(), parts, forward);
      });
    };
    for (int64_t first = 0; first < n; first += kLeaf) leaf(first, 2, y, work, true);
    for (int64_t first = (n - 1) / kLeaf * kLeaf; first >= 0; first -= kLeaf) leaf(first, 1, work, y, false);
  };
  auto y = vector;
  solve_vector(y);
  for (int64_t e = 0; e < batches * n; ++e) CHECK(std::abs(residual(y.data() + e / n * n, e / n, e % n) - vector[e]) <= 1e-9, e);

  // Lanczos with the matrix and its inverse: the condition number
  const int steps = kLanczosSteps;
  std::vector<double> tridiagonals[2];
  for (const bool inverse : {false, true}) {
    std::vector<double> basis(batches * (steps + 1) * n, NAN), &t = tridiagonals[inverse];
    t.assign(batches * 2 * steps, NAN);
    emulated::launch({static_cast<unsigned>(batches), 1}, kLanczosThreads, [&] { lanczos_start_kernel(n, basis.data()); });
    for (int s = 0; s < steps; ++s) {
      const int64_t stride = (steps + 1) * n;
      std::vector<double> product(batches * n, NAN);
      if (inverse) {
        for (int64_t e = 0; e < batches * n; ++e) product[e] = basis[e / n * stride + s * n + e % n];
        solve_vector(product);
      } else {
        emulated::launch({static_cast<unsigned>((batches * n * 32 + 255) / 256), 1}, 256, [&] {
          product_kernel(a.data(), batches * n, n, basis.data() + s * n, stride, product.data());
        });
      }
      emulated::launch({static_cast<unsigned>(batches), 1}, kLanczosThreads,
                       [&] { lanczos_step_kernel(n, s, product.data(), basis.data(), t.data()); });
    }
    for (int64_t i = 0; i <= steps; ++i) {  // orthonormal
      for (int64_t j = 0; j <= i; ++j) {
        double overlap = 0;
        for (int64_t k = 0; k < n; ++k) overlap += basis[i * n + k] * basis[j * n + k];
        CHECK(std::abs(overlap - (i == j)) <= 1e-12, i, j, overlap);
      }
    }
  }
  std::vector<int64_t> rank(batches, -1);
  std::vector<double> condition(batches, NAN);
  emulated::launch({1, 1}, 64, [&] {
    condition_kernel(tridiagonals[0].data(), tridiagonals[1].data(), batches, n, steps, rank.data(), condition.data());
  });
  for (int64_t b = 0; b < batches; ++b) {
    const auto values =
        statsmerge::symmetric_eigen({a.begin() + b * n * n, a.begin() + (b + 1) * n * n}, n).values;
    const double exact = values.front() / values.back();
    CHECK(rank[b] == n && condition[b] <= 1.01 * exact && condition[b] >= 0.9 * exact, condition[b], exact);
  }
}

DEVICE_TEST(cuda_factor_kernel_flags_the_system_that_fails) {
  const int64_t n = 30, batches = 3;
  std::vector<double> matrices;
  for (int64_t b = 0; b < batches; ++b) {
    auto one = positive_definite(n, 30 + b);
    if (b == 1) one[9 * n + 9] = 0.0;
    matrices.insert(matrices.end(), one.begin(), one.end());
  }
  std::vector<Flags> flags(batches, Flags{});
  emulated::launch({static_cast<unsigned>(batches), 1}, kLeafThreads, [&] {
    factor_kernel(matrices.data(), n, 0, static_cast<int>(n), &flags[0].not_factorised, sizeof(Flags) / sizeof(int));
  });
  CHECK(!flags[0].not_factorised && flags[1].not_factorised && !flags[2].not_factorised && !flags[1].unproven);
}

DEVICE_TEST(cuda_invert_spectrum_kernel) {
  const int64_t count = 50;
  std::vector<double> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(std::pow(10.0, -static_cast<double>(i) / 5));  // descending
  for (int64_t i = count - 1; i >= 0; --i) values.push_back(values[static_cast<size_t>(i)]);           // ascending
  values.insert(values.end(), count, 0.0);
  std::vector<double> inverse(values.size(), NAN), condition(3, NAN);
  std::vector<int64_t> rank(3, -1);
  for (const bool squared : {false, true}) {
    emulated::launch({3, 1}, 32, [&] {
      invert_spectrum_kernel(values.data(), count, 0.5e-4, squared, inverse.data(), rank.data(), condition.data());
    });
    CHECK(rank[0] == 22 && rank[1] == 22 && rank[2] == 0, rank[0], rank[1], rank[2]);
    CHECK(std::abs(condition[0] / std::pow(10.0, squared ? 8.4 : 4.2) - 1) < 1e-12 && condition[1] == condition[0]);
    CHECK(condition[2] == 1);
    for (size_t i = 0; i < values.size(); ++i) CHECK(inverse[i] == (values[i] > 0.5e-4 ? 1 / values[i] : 0), i);
  }
}
