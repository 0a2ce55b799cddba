// The kernels of topk_svd on CUDA, run block by block on the host: the same phases, the same order of every sum.
#include <algorithm>
#include <memory>

#include "check.h"
#include "cuda/svd_dense.cuh"
#include "cuda/svd_lanczos.cuh"

namespace {

using namespace statsmerge;
using namespace statsmerge::cuda;
using namespace statsmerge::cuda::svd;

// Singular values in descending order, by one-sided Jacobi rotations in double.
std::vector<double> singular_values(std::vector<double> a, int rows, int columns) {
  if (rows > columns) {
    std::vector<double> t(a.size());
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) t[j * rows + i] = a[i * columns + j];
    }
    return singular_values(std::move(t), columns, rows);
  }
  const auto dot = [&](int p, int q) {
    double sum = 0;
    for (int e = 0; e < columns; ++e) sum += a[p * columns + e] * a[q * columns + e];
    return sum;
  };
  for (int sweep = 0; sweep < 30; ++sweep) {
    bool rotated = false;
    for (int p = 0; p < rows; ++p) {
      for (int q = p + 1; q < rows; ++q) {
        const double x = dot(p, p), xy = dot(p, q), y = dot(q, q);
        if (std::abs(xy) <= 1e-14 * std::sqrt(x * y)) continue;
        rotated = true;
        const double angle = 0.5 * std::atan2(2 * xy, x - y), c = std::cos(angle), s = std::sin(angle);
        for (int e = 0; e < columns; ++e) {
          const double u = a[p * columns + e], v = a[q * columns + e];
          a[p * columns + e] = c * u + s * v;
          a[q * columns + e] = c * v - s * u;
        }
      }
    }
    if (!rotated) break;
  }
  std::vector<double> out;
  for (int p = 0; p < rows; ++p) out.push_back(std::sqrt(dot(p, p)));
  std::sort(out.rbegin(), out.rend());
  return out;
}

// A matrix with these singular values and random vectors.
std::vector<double> with_spectrum(int rows, int columns, const std::vector<double>& values, uint64_t seed) {
  const int count = static_cast<int>(values.size());
  std::vector<double> u = normal(rows * count, seed), v = normal(columns * count, seed + 1), storage(100000);
  const Sums sums{storage.data(), storage.data() + 50000};
  orthonormalize(Block(), u.data(), 0, u.data(), count, rows, 0, Same{0}, 0, 0, sums, nullptr);
  orthonormalize(Block(), v.data(), 0, v.data(), count, columns, 0, Same{0}, 0, 0, sums, nullptr);
  std::vector<double> a(static_cast<size_t>(rows * columns), 0.0);
  for (int t = 0; t < count; ++t) {
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) a[i * columns + j] += values[t] * u[t * rows + i] * v[t * columns + j];
    }
  }
  return a;
}

template <class T>
constexpr Storage storage_of() {
  return std::is_same_v<T, double> ? Storage::f64
         : std::is_same_v<T, float> ? Storage::f32
         : std::is_same_v<T, bf16> ? Storage::bf16
                                   : Storage::f16;
}

// Memory aligned as the device's is, filled with what must not be read.
struct Memory {
  explicit Memory(int64_t bytes) : words(static_cast<size_t>(bytes / 16 + 1)) {
    std::memset(static_cast<void*>(words.data()), 0xff, words.size() * 16);
  }
  char* data() { return reinterpret_cast<char*>(words.data()); }
  std::vector<Raw> words;
};

// One matrix in memory of its own, rows `stride` apart, starting `offset` elements into it.
template <class T>
struct Stored {
  Stored(const std::vector<double>& values, int rows, int columns, int64_t stride, int64_t offset)
      : memory((rows * stride + offset) * static_cast<int64_t>(sizeof(T))) {
    T* data = reinterpret_cast<T*>(memory.data()) + offset;
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) data[i * stride + j] = narrow<T>(values[i * columns + j]);
    }
    start = reinterpret_cast<char*>(data);
  }
  Memory memory;
  char* start;
};

struct Result {
  std::vector<double> s, residual, u, vh;  // u: [rows][k], vh: [k][columns]
  int64_t passes = 0;
  bool bad = false;
  double statistics[3] = {};
};

struct Options {
  int k = 3;
  double tol = 1e-3;
  int64_t max_passes = 1000;
  bool vectors = true;
  uint64_t seed = 0;
  int64_t stride_over = 0, offset = 0;
  const std::vector<double>* minus = nullptr;
};

template <class T>
Result run(const std::vector<double>& values, int rows, int columns, const Options& o, bool dense) {
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t stride = columns + o.stride_over;
  Stored<T> stored(values, rows, columns, stride, o.offset);
  std::unique_ptr<Stored<T>> minus;
  if (o.minus) minus = std::make_unique<Stored<T>>(*o.minus, rows, columns, stride, o.offset);
  const Problem p = make_problem(o.k, o.tol, o.max_passes, o.vectors, o.seed);
  Matrix a{};
  a.data = stored.start;
  a.minus = minus ? minus->start : nullptr;
  a.stride = a.minus_stride = stride;
  a.storage = storage_of<T>();
  a.rows = rows;
  a.columns = columns;
  a.k = std::min(o.k, std::min(rows, columns));
  a.aligned = o.offset == 0 && stride * sizeof(T) % 16 == 0;
  Result result;
  std::vector<Acc> s(static_cast<size_t>(a.k)), residual(s), u(static_cast<size_t>(rows * a.k)),
      vh(static_cast<size_t>(a.k * columns));
  std::vector<double> statistics(static_cast<size_t>(3 + a.k));
  a.out_s = reinterpret_cast<char*>(s.data());
  a.out_residual = reinterpret_cast<char*>(residual.data());
  a.out_u = reinterpret_cast<char*>(u.data());
  a.out_vh = reinterpret_cast<char*>(vh.data());
  a.out_passes = &result.passes;
  a.out_statistics = statistics.data();
  const auto layout = [&](Arena arena) {
    dense ? take_dense_memory(a, p.vectors, arena) : take_memory<Acc>(a, p, arena);
    return arena.used();
  };
  Memory work(layout(Arena(nullptr)));
  layout(Arena(work.data()));
  const Block block;
  if (dense) {
    Memory shared(dense_shared_bytes(rows, columns, a.k));
    Arena arena(shared.data());
    const DenseWork dense_work = take_dense_work(std::min(rows, columns), std::max(rows, columns), a.k, arena);
    with_reader<Acc>(a, [&](const auto& reader) { dense_svd<Acc>(block, p, a, reader, dense_work); });
  } else {
    Arena sizes(nullptr);
    take_step_work(p, sizes);
    Memory shared(sizes.used());
    Arena arena(shared.data());
    const StepWork step = take_step_work(p, arena);
    std::vector<Moments> moments(kPassThreads);
    for (int b = 0; b < product_blocks(a); ++b) inspect_block<Acc, true>(block, a, b, moments.data());
    const auto multiply = [&] {
      for (int b = 0; b < product_blocks(a); ++b) {
        for (int g = 0; g < p.groups(); ++g) product_block<Acc>(block, a, b, g);
      }
    };
    bool done = begin<Acc>(block, p, a, step);
    std::vector<Quad<Acc>> panel(kPassWarps * panel_columns(a.storage));
    while (!done) {
      multiply();
      for (int b = 0; b < split_blocks(a); ++b) {
        for (int g = 0; g < p.groups(); ++g) transposed_block<Acc>(block, p, a, b, g, panel.data());
      }
      done = advance<Acc>(block, p, a, step);
    }
    if (!a.progress->bad && p.vectors) multiply();
    write_results<Acc>(block, p, a, step);
  }
  result.bad = a.progress->bad;
  result.s.assign(s.begin(), s.end());
  result.residual.assign(residual.begin(), residual.end());
  result.u.assign(u.begin(), u.end());
  result.vh.assign(vh.begin(), vh.end());
  std::copy_n(statistics.begin(), 3, result.statistics);
  return result;
}

}  // namespace

namespace {

double unit_rounding(Storage storage) { return storage == Storage::f64 ? 2.3e-16 : 1.2e-7; }

// Singular values and bounds against exact ones; vectors orthonormal, and a decomposition as good as Ritz vectors are.
template <class T>
void check_result(const Result& r, const std::vector<double>& exact, const std::vector<double>& values, int rows,
                  int columns, const Options& o, double floor = 1e-6) {
  const int k = static_cast<int>(r.s.size());
  const double eps = unit_rounding(storage_of<T>()), top = exact[0];
  CHECK(!r.bad);
  for (int i = 0; i < k; ++i) {
    const double error = std::abs(r.s[i] - exact[i]);
    CHECK(error <= o.tol * exact[i] + floor * top, rows, columns, i, r.s[i], exact[i]);
    CHECK(error <= r.residual[i] + 8 * eps * top, rows, columns, i, r.s[i], exact[i], r.residual[i]);
  }
  if (!o.vectors) return;
  for (int i = 0; i < k; ++i) {
    for (int j = 0; j <= i; ++j) {
      double u = 0, v = 0;
      for (int e = 0; e < rows; ++e) u += r.u[e * k + i] * r.u[e * k + j];
      for (int e = 0; e < columns; ++e) v += r.vh[i * columns + e] * r.vh[j * columns + e];
      CHECK(std::abs(u - (i == j)) <= 20 * eps && std::abs(v - (i == j)) <= 20 * eps, rows, columns, i, j, u, v);
    }
    double error = 0;
    for (int e = 0; e < rows; ++e) {
      double image = 0;
      for (int x = 0; x < columns; ++x) image += values[e * columns + x] * r.vh[i * columns + x];
      error += std::pow(image - r.s[i] * r.u[e * k + i], 2);
    }
    CHECK(std::sqrt(error) <= 0.05 * top, rows, columns, i, std::sqrt(error));
  }
}

template <class T>
std::vector<double> rounded(std::vector<double> values) {
  for (double& x : values) x = static_cast<double>(to_acc(narrow<T>(x)));
  return values;
}

template <class T>
void check_random(int rows, int columns, Options o, bool dense) {
  const auto values = rounded<T>(normal(rows * columns, rows * 1000 + columns));
  check_result<T>(run<T>(values, rows, columns, o, dense), singular_values(values, rows, columns), values, rows,
                  columns, o);
}

}  // namespace

DEVICE_TEST(cuda_svd_every_pair_of_a_tournament_meets_once) {
  for (int players = 2; players <= 20; players += 2) {
    std::vector<int> met(players * players, 0);
    for (int step = 0; step < players - 1; ++step) {
      std::vector<int> plays(players, 0);
      for (int i = 0; i < players / 2; ++i) {
        int p, q;
        pair_of(players, step, i, p, q);
        CHECK(0 <= p && p < q && q < players);
        ++plays[p], ++plays[q], ++met[p * players + q];
      }
      for (int count : plays) CHECK(count == 1);
    }
    for (int p = 0; p < players; ++p) {
      for (int q = p + 1; q < players; ++q) CHECK(met[p * players + q] == 1);
    }
  }
}

DEVICE_TEST(cuda_svd_every_column_and_row_has_one_place) {
  for (Storage storage : {Storage::f64, Storage::f32, Storage::bf16, Storage::f16}) {
    for (int side : {1, 2, 31, 32, 33, 127, 256, 257, 511, 512, 513, 1000, 2049}) {
      Matrix a{};
      a.storage = storage;
      a.rows = a.columns = side;
      std::vector<int> taken(static_cast<size_t>(padded_columns(a)), 0);
      for (int x = 0; x < side; ++x) ++taken.at(static_cast<size_t>(padded_position(a, x)));
      CHECK(std::count(taken.begin(), taken.end(), 1) == side && *std::max_element(taken.begin(), taken.end()) == 1);
      CHECK(product_blocks(a) * kProductRows >= side && (product_blocks(a) - 1) * kProductRows < side);
      CHECK(splits(a) * kSplitRows >= side && (splits(a) - 1) * kSplitRows < side);
      CHECK(split_blocks(a) == static_cast<int64_t>(splits(a)) * panels(a) && padded_columns(a) >= side);
    }
  }
}

DEVICE_TEST(cuda_svd_eigenvalues_of_graded_and_repeated_matrices) {
  for (int size : {1, 2, 3, 8, 31, 48}) {
    const int ld = size + 3;
    std::vector<double> q = normal(size * size, 5), storage(4000), d(size);
    const Sums sums{storage.data(), storage.data() + 3000};
    orthonormalize(Block(), q.data(), 0, q.data(), size, size, 0, Same{0}, 0, 0, sums, nullptr);
    for (int i = 0; i < size; ++i) d[i] = i % 3 == 0 ? 2.0 : std::pow(0.5, i);
    std::vector<double> t(ld * ld), vectors(ld * ld), values(ld);
    std::vector<int> order(ld), rotated(ld);
    std::vector<Rotation> rotation(ld);
    for (int i = 0; i < size; ++i) {
      for (int j = 0; j < size; ++j) {
        for (int l = 0; l < size; ++l) t[i * ld + j] += d[l] * q[l * size + i] * q[l * size + j];
      }
    }
    const auto before = t;
    symmetric_eigen(Block(), {t.data(), vectors.data(), values.data(), order.data(), rotation.data(), rotated.data()},
                    size, ld, 0);
    std::sort(d.rbegin(), d.rend());
    for (int i = 0; i < size; ++i) {
      CHECK(std::abs(values[order[i]] - d[i]) <= 1e-15 * size, size, i, values[order[i]], d[i]);
      for (int row = 0; row < size; ++row) {
        double sum = 0;
        for (int j = 0; j < size; ++j) sum += before[row * ld + j] * vectors[order[i] * ld + j];
        CHECK(std::abs(sum - d[i] * vectors[order[i] * ld + row]) <= 1e-15 * size, size, i, row);
      }
    }
  }
}

DEVICE_TEST(cuda_svd_dense) {
  Options o;
  for (auto [rows, columns] : {std::pair(1, 1), {1, 50}, {50, 1}, {7, 300}, {300, 7}, {40, 41}, {33, 33}, {128, 60}}) {
    o.k = std::min({5, rows, columns});
    check_random<double>(rows, columns, o, true);
    check_random<float>(rows, columns, o, true);
    check_random<bf16>(rows, columns, o, true);
  }
  o.k = 40;
  check_random<double>(40, 50, o, true);
}

DEVICE_TEST(cuda_svd_lanczos) {
  Options o;
  for (auto [rows, columns] :
       {std::pair(150, 150), {64, 200}, {200, 64}, {70, 601}, {601, 70}, {1100, 33}, {33, 530}}) {
    o.k = 3;
    check_random<double>(rows, columns, o, false);
    check_random<float>(rows, columns, o, false);
    o.k = 5;
    check_random<bf16>(rows, columns, o, false);
    check_random<f16>(rows, columns, o, false);
  }
}

DEVICE_TEST(cuda_svd_lanczos_of_thin_matrices) {
  Options o;
  for (auto [rows, columns] : {std::pair(1, 700), {700, 1}, {700, 2}, {2, 700}, {600, 5}, {5, 600}}) {
    o.k = std::min({3, rows, columns});
    check_random<double>(rows, columns, o, false);
    check_random<float>(rows, columns, o, false);
  }
}

DEVICE_TEST(cuda_svd_strides_and_subtrahends) {
  const int rows = 90, columns = 77;
  const auto values = rounded<bf16>(normal(rows * columns, 1)), minus = rounded<bf16>(normal(rows * columns, 2));
  std::vector<double> difference(values);
  for (size_t i = 0; i < values.size(); ++i) difference[i] -= minus[i];
  const auto exact = singular_values(difference, rows, columns);
  for (bool dense : {false, true}) {
    for (auto [over, offset] : {std::pair(0, 0), {3, 0}, {3, 1}, {11, 5}}) {
      Options o;
      o.stride_over = over;
      o.offset = offset;
      o.minus = &minus;
      check_result<bf16>(run<bf16>(values, rows, columns, o, dense), exact, difference, rows, columns, o);
      check_result<float>(run<float>(values, rows, columns, o, dense), exact, difference, rows, columns, o);
      check_result<double>(run<double>(values, rows, columns, o, dense), exact, difference, rows, columns, o);
    }
  }
}

DEVICE_TEST(cuda_svd_spectra) {
  std::vector<double> graded, repeated{5, 5, 5}, clustered{3, 3 - 1e-5, 3 - 2e-5, 2.9};
  for (int i = 0; i < 60; ++i) graded.push_back(std::pow(10.0, -5.0 * i / 59));
  repeated.resize(43, 1.0);
  clustered.resize(44, 1.0);
  const std::vector<std::vector<double>> spectra{
      graded, repeated, clustered, std::vector<double>(80, 1.0), {1, 1e-2, 1e-4}, {1, 1e-4, 1e-5}, {4, 2}, {0}};
  for (const auto& spectrum : spectra) {
    const auto values = with_spectrum(120, 90, spectrum, 3);
    auto exact = spectrum;
    exact.resize(90, 0.0);
    for (bool dense : {false, true}) {
      const Options o;
      check_result<double>(run<double>(values, 120, 90, o, dense), exact, values, 120, 90, o, 1e-7);
      check_result<float>(run<float>(values, 120, 90, o, dense), exact, values, 120, 90, o, 2e-6);
    }
  }
}

DEVICE_TEST(cuda_svd_tolerance_and_passes) {
  const int rows = 300, columns = 260;
  const auto values = normal(rows * columns, 9);
  const auto exact = singular_values(values, rows, columns);
  int64_t before = 0;
  for (double tol : {1e-1, 1e-3, 1e-6, 1e-9}) {
    Options o;
    o.tol = tol;
    o.k = 4;
    const auto result = run<double>(values, rows, columns, o, false);
    check_result<double>(result, exact, values, rows, columns, o, 1e-12);
    for (int i = 0; i < o.k; ++i) CHECK(result.residual[i] <= tol * result.s[i], tol, i, result.residual[i]);
    CHECK(result.passes > before && result.passes < 100, tol, result.passes, before);
    before = result.passes;
  }
  Options o;
  o.vectors = false;
  for (int64_t limit : {1, 2, 3, 5}) {
    o.max_passes = limit;
    const auto result = run<float>(values, rows, columns, o, false);
    CHECK(result.passes == limit + 1);
    CHECK(result.residual[0] > o.tol * result.s[0]);  // few passes are admitted
    if (limit < 3) continue;                          // the values of a random start may be near any others
    for (int i = 0; i < o.k; ++i) CHECK(std::abs(result.s[i] - exact[i]) <= result.residual[i], limit, i);
  }
}

DEVICE_TEST(cuda_svd_extreme_scales) {
  const auto plain = normal(150 * 70, 4);
  const auto exact = singular_values(plain, 150, 70);
  const auto check_scale = [&]<class T>(T, double scale) {
    for (bool dense : {false, true}) {
      auto values = plain;
      for (double& x : values) x *= scale;
      const auto result = run<T>(values, 150, 70, Options(), dense);
      for (int i = 0; i < 3; ++i) {
        CHECK(std::abs(result.s[i] / scale - exact[i]) <= 1e-3 * exact[i], scale, i, result.s[i]);
      }
    }
  };
  check_scale(float(), 1e-30);
  check_scale(float(), 1e30);
  check_scale(float(), 1e37);
  check_scale(double(), 1e-200);
  check_scale(double(), 1e200);
}

DEVICE_TEST(cuda_svd_statistics_and_bad_values) {
  for (bool dense : {false, true}) {
    const int rows = 90, columns = 77;
    auto values = rounded<float>(normal(rows * columns, 6));
    for (double& x : values) x = static_cast<float>(x + 1e3);
    double mean = 0, variance = 0, square = 0;
    for (double x : values) mean += x / values.size(), square += x * x;
    for (double x : values) variance += (x - mean) * (x - mean) / values.size();
    auto result = run<float>(values, rows, columns, Options(), dense);
    CHECK(std::abs(result.statistics[0] - mean) <= 1e-12 * mean);
    CHECK(std::abs(result.statistics[1] - variance) <= 1e-10 * variance);
    CHECK(std::abs(result.statistics[2] - std::sqrt(square)) <= 1e-12 * std::sqrt(square));
    result = run<float>(std::vector<double>(rows * columns, 0.1), rows, columns, Options(), dense);
    CHECK(result.statistics[1] == 0);
    for (double bad : {NAN, INFINITY, -INFINITY}) {
      auto spoilt = values;
      spoilt.back() = bad;
      result = run<float>(spoilt, rows, columns, Options(), dense);
      CHECK(result.bad);
      CHECK(std::isnan(result.s[0]) && std::isnan(result.u[0]) && std::isnan(result.vh.back()));
    }
  }
}

DEVICE_TEST(cuda_svd_seeds) {
  const auto values = normal(150 * 70, 8);
  Options o;
  const auto first = run<float>(values, 150, 70, o, false), again = run<float>(values, 150, 70, o, false);
  CHECK(first.s == again.s && first.u == again.u && first.vh == again.vh);
  o.seed = 1;
  CHECK(run<float>(values, 150, 70, o, false).vh != first.vh);
}
