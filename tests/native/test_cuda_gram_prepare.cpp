// What comes before and after the products of a Gram on CUDA, the kernels themselves run on the host.
#include <algorithm>
#include <array>
#include <limits>

#include "check.h"
#include "emulated_device.h"
// after what stands for the device
#include "cuda/gram_prepare.cuh"

namespace {

using namespace statsmerge;
using namespace statsmerge::cuda;
using namespace statsmerge::cuda::gram;

constexpr uint16_t kUnwritten = 0xffff;  // a NaN

// Operands of ragged features, with weights of every kind and a step of zeros; `from` moves rows off their alignment.
template <int kParts, class T>
void check_prepare(Kept kept, int64_t columns, int64_t from) {
  constexpr int kTokens = Parts<kParts>::kTokens;
  const int64_t tokens = 3 * kTokens + 5, steps = 4, stride = columns + 7, pitch = (columns + 7) / 8 * 8;
  std::vector<T> data;
  for (const double x : normal(tokens * stride + from + 8, 8)) data.push_back(narrow<T>(x));
  const auto at = reinterpret_cast<uintptr_t>(data.data()) % 32 / sizeof(T);
  const T* x = data.data() + (32 / sizeof(T) - at) % (32 / sizeof(T)) + from;
  std::vector<float> weight;
  for (int64_t t = 0; t < tokens; ++t) weight.push_back(t / kTokens == 1 ? 0 : std::array{0.0f, 1.0f, -0.3f}[t % 3]);
  const bool weighted = kept != Kept::all, vectors = from == 0 && stride % 4 == 0;
  const int64_t part_stride = tokens * pitch;
  std::vector<uint16_t> left(static_cast<size_t>(kParts * part_stride), kUnwritten), right = left;
  std::vector<int> used(steps, -1);
  const bool two = kParts > 1 && weighted;
  const Features<T> features{x, stride, tokens, columns, weighted ? weight.data() : nullptr, kept, vectors};
  const Prepared prepared{left.data(), two ? right.data() : nullptr, pitch, part_stride, used.data()};
  const unsigned across = static_cast<unsigned>((columns + kPrepareColumns - 1) / kPrepareColumns);
  emulated::launch({static_cast<unsigned>(steps), across}, kPrepareThreads,
                   [&] { prepare_kernel<kParts, T>(features, prepared); });

  const auto sum_of = [&](const std::vector<uint16_t>& operand, int64_t place) {
    double sum = 0;
    for (int part = 0; part < kParts; ++part) {
      const uint16_t bits = operand[part * part_stride + place];
      sum += kParts == 1 && std::is_same_v<T, f16> ? to_acc(f16{bits}) : to_acc(bf16{bits});
    }
    return sum;
  };
  for (int64_t t = 0; t < tokens; ++t) {
    const bool expected_use = !weighted || t / kTokens != 1;
    CHECK(used[t / kTokens] == expected_use, t);
    const float w = weighted ? weight[t] : 1.0f;
    const bool nonzero = w != 0 && (kept == Kept::nonzero || w != 1);
    const bool keeps_token = kept == Kept::all || (kept == Kept::ones ? w == 1 : nonzero);
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t place = t * pitch + c;
      if (!expected_use) {
        CHECK(left[place] == kUnwritten, t, c);
        continue;
      }
      const float value = keeps_token ? static_cast<float>(to_acc(x[t * stride + c])) : 0.0f;
      CHECK(sum_of(left, place) == static_cast<double>(kParts == 1 ? value : value * w), t, c);
      if (two) CHECK(sum_of(right, place) == static_cast<double>(value), t, c);
    }
  }
}

}  // namespace

DEVICE_TEST(cuda_gram_operands) {
  check_prepare<1, bf16>(Kept::all, 1025, 0);
  check_prepare<1, f16>(Kept::ones, 29, 0);
  check_prepare<3, float>(Kept::nonzero, 1030, 0);
  check_prepare<3, float>(Kept::all, 33, 1);
  check_prepare<3, double>(Kept::nonzero, 21, 0);
  check_prepare<3, bf16>(Kept::neither_zero_nor_one, 9, 3);
}

DEVICE_TEST(cuda_gram_used_steps_are_listed) {
  for (const int steps : {1, 255, 256, 700}) {
    std::mt19937 random(static_cast<unsigned>(steps));
    std::vector<int> used, list(static_cast<size_t>(steps), -1), expected;
    for (int step = 0; step < steps; ++step) {
      used.push_back(random() % 3 > 0);
      if (used.back()) expected.push_back(step);
    }
    int count = -1;
    emulated::launch({1, 1}, kListThreads, [&] { list_steps_kernel(used.data(), steps, list.data(), &count); });
    CHECK(count == static_cast<int>(expected.size()), steps, count);
    CHECK(std::equal(expected.begin(), expected.end(), list.begin()), steps);
  }
}

DEVICE_TEST(cuda_gram_conversions_and_sums) {
  const int64_t batches = 3, rows = 7, columns = 41;
  std::vector<float> data;
  for (const double x : normal(batches * rows * columns, 9)) data.push_back(static_cast<float>(x));
  data[2] = std::numeric_limits<float>::quiet_NaN();  // of a token that is dropped
  const Strided<const float> x{data.data(), rows * columns, 1, rows};
  std::vector<double> weight;
  for (int64_t i = 0; i < batches * (rows + 2); ++i) weight.push_back(static_cast<double>(i % 4) - 2);
  const auto blocks = static_cast<unsigned>((batches * rows + kRowsOfBlock - 1) / kRowsOfBlock);
  for (const bool weighted : {true, false}) {
    std::vector<double> out(data.size(), 77.0);
    emulated::launch({blocks, 1}, kRowThreads, [&] {
      const double* factors = weighted ? weight.data() : nullptr;
      convert_kernel<double, float>(x, factors, rows + 2, batches, rows, columns, out.data());
    });
    for (int64_t i = 0; i < batches * rows; ++i) {
      const double w = weighted ? weight[i / rows * (rows + 2) + i % rows] : 1.0;
      for (int64_t c = 0; c < columns; ++c) {
        const double expected = w == 0 ? 0.0 : w * static_cast<double>(x.at(i / rows, i % rows, c));
        CHECK(out[i * columns + c] == expected || (!weighted && std::isnan(expected)), i, c);
      }
    }
  }
  std::vector<float> gram(data.size() * 2, 1.0f), product;
  for (int64_t i = 0; i < batches * rows * columns; ++i) product.push_back(static_cast<float>(i));
  const Strided<float> out{gram.data(), 2 * rows * columns, 2, 2 * rows};
  emulated::launch({blocks, 1}, kRowThreads, [&] { add_product_kernel(out, product.data(), batches, rows, columns); });
  for (int64_t i = 0; i < batches * rows * columns; ++i) {
    CHECK(out.at(i / (rows * columns), i / columns % rows, i % columns) == 1.0f + product[i], i);
  }
  CHECK(std::count(gram.begin(), gram.end(), 1.0f) == batches * rows * columns + 1);  // the gaps, and where 0 was added
}
