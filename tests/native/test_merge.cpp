#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "check.h"
#include "cpu/kernels/merge.h"

namespace {

using statsmerge::MergeLayer;
using statsmerge::Storage;
using statsmerge::TaskVector;

constexpr Storage kStorages[] = {Storage::f64, Storage::f32, Storage::bf16, Storage::f16};
constexpr int kBits[] = {0, 2, 3, 4, 8};

// A tensor in exactly as many bytes as it needs, so that the address sanitizer sees any that are read beyond, from
// `offset` elements on; and its values as they were stored.
struct Stored {
  Stored(const std::vector<double>& x, Storage storage, int64_t offset = 1)
      : memory((x.size() + offset) * statsmerge::bytes_of(storage)), skipped(offset * statsmerge::bytes_of(storage)) {
    for (size_t i = 0; i < x.size(); ++i) {
      switch (storage) {
        case Storage::f64:
          put(x[i], i);
          break;
        case Storage::f32:
          put(static_cast<float>(x[i]), i);
          break;
        case Storage::bf16:
          put(statsmerge::narrow<statsmerge::bf16>(x[i]), i);
          break;
        case Storage::f16:
          put(statsmerge::narrow<statsmerge::f16>(x[i]), i);
          break;
      }
      values.push_back(at(i, storage));
    }
  }

  template <class T>
  void put(T x, size_t i) {
    std::memcpy(data() + i * sizeof(T), &x, sizeof(T));
  }

  double at(size_t i, Storage storage) const {
    return statsmerge::dispatch_storage(storage, [&](auto* type) {
      std::remove_cv_t<std::remove_pointer_t<decltype(type)>> x;
      std::memcpy(&x, memory.data() + skipped + i * sizeof x, sizeof x);
      return static_cast<double>(statsmerge::widen(x));
    });
  }

  char* data() { return memory.data() + skipped; }

  std::vector<char> memory;
  size_t skipped;
  std::vector<double> values;
};

struct Quantized {
  Quantized(int64_t n, int bits, int64_t group_size, uint64_t seed) : codes((n + 7) / 8 * bits) {
    std::mt19937_64 random(seed);
    for (char& byte : codes) byte = static_cast<char>(random());
    for (int64_t start = 0; start < n; start += group_size) {
      scale.push_back(static_cast<float>(random() % 1000) / 1000);
      zero_point.push_back(static_cast<int32_t>(random() % 9) - 4);
    }
    for (int64_t i = 0; i < n; ++i) {
      int code = 0;
      for (int b = 0; b < bits; ++b) code |= (codes[(i * bits + b) / 8] >> ((i * bits + b) % 8) & 1) << b;
      values.push_back(static_cast<double>(scale[i / group_size]) * (code - zero_point[i / group_size]));
    }
  }

  std::vector<char> codes;
  std::vector<float> scale;
  std::vector<int32_t> zero_point;
  std::vector<double> values;
};

// K task vectors for layers of the given sizes, in turn of every kind or all of one.
struct Tasks {
  Tasks(const std::vector<int64_t>& sizes, int64_t tasks, int first_kind, bool mixed, int64_t group_size) {
    for (int64_t k = 0; k < tasks; ++k) {
      for (size_t l = 0; l < sizes.size(); ++l) {
        const int kind = (first_kind + (mixed ? static_cast<int>(k / 2) : 0)) % 8;
        const uint64_t seed = 100 + k * sizes.size() + l;
        if (kind < 4) {
          stored.emplace_back(new Stored(normal(sizes[l], seed), kStorages[kind]));
          views.push_back({stored.back()->data(), kStorages[kind], 0, nullptr, nullptr, 1});
          values.push_back(stored.back()->values);
        } else {
          const int bits = kBits[kind - 3];
          quantized.emplace_back(new Quantized(sizes[l], bits, group_size, seed));
          const Quantized& q = *quantized.back();
          views.push_back({q.codes.data(), Storage::f32, bits, q.scale.data(), q.zero_point.data(), group_size});
          values.push_back(q.values);
        }
      }
    }
  }

  std::vector<std::unique_ptr<Stored>> stored;
  std::vector<std::unique_ptr<Quantized>> quantized;
  std::vector<TaskVector> views;
  std::vector<std::vector<double>> values;
};

double epsilon(Storage storage) {
  return storage == Storage::f64   ? 0x1p-52
         : storage == Storage::f32 ? 0x1p-23
         : storage == Storage::f16 ? 0x1p-10
                                   : 0x1p-7;
}

void check_model(const std::vector<int64_t>& sizes, int64_t tasks, int kind, bool mixed, int64_t group_size,
                 Storage storage) {
  const Tasks t(sizes, tasks, kind, mixed, group_size);
  const auto coefficients = normal(static_cast<int64_t>(sizes.size()) * tasks, 3);
  std::vector<Stored> base, out;
  std::vector<MergeLayer> layers;
  for (size_t l = 0; l < sizes.size(); ++l) {
    base.emplace_back(normal(sizes[l], l), storage, l % 3);
    out.emplace_back(std::vector<double>(sizes[l], 7), storage, l % 2);
  }
  for (size_t l = 0; l < sizes.size(); ++l) layers.push_back({base[l].data(), out[l].data(), storage, sizes[l]});
  std::vector<double> products(sizes.size() * tasks, 7);
  statsmerge::merge(layers, t.views, coefficients.data());
  statsmerge::merge_products(layers, t.views, products.data());
  // Arithmetic is in float, or in double for a double base, where only codes are first made floats.
  const double unit = storage == Storage::f64 ? 0x1p-52 : 0x1p-23;
  for (size_t l = 0; l < sizes.size(); ++l) {
    for (int64_t i = 0; i < sizes[l]; ++i) {
      double expected = base[l].values[i], magnitude = std::abs(expected);
      for (int64_t k = 0; k < tasks; ++k) {
        const double term = coefficients[l * tasks + k] * t.values[k * sizes.size() + l][i];
        expected += term;
        magnitude += std::abs(term);
      }
      const double error = std::abs(out[l].at(i, storage) - expected);
      CHECK(error <= (tasks + 1) * unit * magnitude + epsilon(storage) * std::abs(expected), "kind ", kind, " size ",
            sizes[l], " element ", i, " got ", out[l].at(i, storage), " not ", expected);
    }
    for (int64_t k = 0; k < tasks; ++k) {
      double expected = 0, magnitude = 0;
      for (int64_t i = 0; i < sizes[l]; ++i) {
        const double term = base[l].values[i] * t.values[k * sizes.size() + l][i];
        expected += term;
        magnitude += std::abs(term);
      }
      CHECK(std::abs(products[l * tasks + k] - expected) <= 1e-14 * magnitude, "kind ", kind, " size ", sizes[l],
            " got ", products[l * tasks + k], " not ", expected);
    }
  }
}

}  // namespace

NATIVE_TEST(merge_and_products_of_every_kind_at_odd_sizes) {
  const std::vector<int64_t> sizes = {0, 1, 7, 8, 9, 15, 16, 17, 31, 40, 0, 67, 8191, 8200, 0};
  for (int kind = 0; kind < 8; ++kind) {
    for (const int64_t group_size : {8, 24, 64, 9000}) {
      if (kind < 4 && group_size > 8) continue;
      for (const Storage storage : kStorages) check_model(sizes, kind % 2 == 0 ? 7 : 4, kind, false, group_size, storage);
    }
  }
}

NATIVE_TEST(merge_of_mixed_kinds_and_of_no_tasks) {
  for (const Storage storage : kStorages) {
    check_model({40, 0, 20001, 3}, 16, 0, true, 16, storage);
    check_model({40, 0, 20001, 3}, 1, 5, true, 16, storage);
    check_model({40, 0, 20001, 3}, 0, 0, true, 16, storage);
    check_model({}, 0, 0, true, 16, storage);
  }
}

NATIVE_TEST(large_results_are_streamed_whole) {
  // larger than what is kept in the caches, and unaligned in one of two tensors
  check_model({2500003, 2000001}, 1, 1, false, 8, Storage::f32);
}

NATIVE_TEST(merge_is_the_same_for_any_number_of_threads) {
  const std::vector<int64_t> sizes = {100003, 5, 70000};
  const Tasks t(sizes, 5, 1, true, 64);
  const auto coefficients = normal(15, 3);
  std::vector<Stored> base;
  for (const int64_t n : sizes) base.emplace_back(normal(n, 5), Storage::f32);
  std::vector<std::vector<char>> results;
  std::vector<std::vector<double>> sums;
  for (const int threads : {1, 2, 3, 7}) {
    set_threads(threads);
    std::vector<Stored> out;
    std::vector<MergeLayer> layers;
    for (const int64_t n : sizes) out.emplace_back(std::vector<double>(n), Storage::f32);
    for (size_t l = 0; l < sizes.size(); ++l) layers.push_back({base[l].data(), out[l].data(), Storage::f32, sizes[l]});
    sums.emplace_back(15);
    statsmerge::merge(layers, t.views, coefficients.data());
    statsmerge::merge_products(layers, t.views, sums.back().data());
    results.push_back(out[0].memory);
    CHECK(results.back() == results.front() && sums.back() == sums.front(), threads);
  }
}
