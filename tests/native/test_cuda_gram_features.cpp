// Grams of matrices and of patches on CUDA, the kernels themselves run on the host: the small kernel with both kinds of
// features, and the kernel that writes patches as matrices.
#include <algorithm>
#include <array>
#include <limits>

#include "check.h"
#include "emulated_device.h"
// after what stands for the device
#include "cuda/gram_small.cuh"

namespace {

using namespace statsmerge;
using namespace statsmerge::cuda::gram;

// Integers, so that every sum is exact and every mistake shows.
template <class T>
std::vector<T> integers(int64_t count, uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::vector<T> out(static_cast<size_t>(count));
  for (T& x : out) x = narrow<T>(static_cast<double>(generator() % 7) - 3);
  return out;
}

// A convolution's input and what it reads of it.
template <class T>
struct Convolution {
  Convolution(int images, int groups, int channels, std::array<int, 3> size, std::array<int, 3> kernel,
              std::array<int, 3> stride, std::array<int, 3> padding, std::array<int, 3> dilation, bool channels_last)
      : images(images), groups(groups), channels(channels) {
    PatchShape& s = patches.shape;
    int64_t elements = 1, tokens_of_image = 1;
    for (int d = 0; d < 3; ++d) {
      s.size[d] = size[d];
      s.kernel[d] = kernel[d];
      s.stride[d] = stride[d];
      s.padding[d] = padding[d];
      s.dilation[d] = dilation[d];
      // one more row of padding behind than in front
      s.out[d] = (size[d] + 2 * padding[d] + (padding[d] > 0) - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
      elements *= size[d];
      tokens_of_image *= s.out[d];
    }
    const int64_t all = int64_t{groups} * channels, step = channels_last ? all : 1;
    s.channel_stride = channels_last ? 1 : elements;
    s.group_stride = s.channel_stride * channels;
    s.image_stride = all * elements;
    for (int d = 2, stride_of = 1; d >= 0; stride_of *= size[d--]) s.element_stride[d] = step * stride_of;
    data = integers<T>(images * s.image_stride, 5);
    patches.data = data.data();
    tokens = images * tokens_of_image;
    columns = int64_t{channels} * kernel[0] * kernel[1] * kernel[2];
  }

  // The definition, index by index.
  double at(int64_t group, int64_t token, int64_t column) const {
    const PatchShape& s = patches.shape;
    int64_t offset = group * s.group_stride;
    for (int d = 2; d >= 0; --d) {
      const int64_t x = token % s.out[d] * s.stride[d] - s.padding[d] + column % s.kernel[d] * s.dilation[d];
      if (x < 0 || x >= s.size[d]) return 0;
      offset += x * s.element_stride[d];
      token /= s.out[d];
      column /= s.kernel[d];
    }
    return static_cast<double>(widen(data[offset + column * s.channel_stride + token * s.image_stride]));
  }

  int images, groups, channels;
  int64_t tokens, columns;
  std::vector<T> data;
  Patches<T> patches;
};

// Every kind of shape: 1-D as 1 × 1 × n, strides over the edge, dilation, padding wider than the kernel, groups.
template <class T, class F>
void for_convolutions(const F& f) {
  for (const bool channels_last : {false, true}) {
    f(Convolution<T>(3, 5, 1, {1, 7, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}, channels_last));
    f(Convolution<T>(2, 1, 3, {1, 9, 8}, {1, 3, 2}, {1, 2, 3}, {0, 0, 2}, {1, 2, 1}, channels_last));
    f(Convolution<T>(2, 2, 2, {3, 4, 5}, {2, 1, 3}, {2, 1, 1}, {1, 0, 3}, {1, 1, 2}, channels_last));
    f(Convolution<T>(1, 1, 33, {1, 1, 140}, {1, 1, 3}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, channels_last));
  }
}

// Runs the small kernel, and the one that adds up its partial sums, on Grams that start from ones; `at` gives features.
template <class Acc, class Features, class At>
void check_small(const Features& x, int64_t batches, int64_t tokens, int columns, const At& at, bool weighted,
                 int wanted) {
  const SmallShape shape{columns};
  const int64_t weight_stride = weighted ? tokens + 1 : 0, gram_size = int64_t{columns} * (columns + 2);
  std::vector<Acc> weight;
  for (int64_t i = 0; i < batches * (tokens + 1); ++i) weight.push_back(static_cast<Acc>(i * 7 % 4) - 1);
  std::vector<Acc> gram(static_cast<size_t>(batches * gram_size), Acc{1}), expected = gram;
  const int64_t range = ((tokens + wanted - 1) / wanted + shape.tokens() - 1) / shape.tokens() * shape.tokens();
  const int ranges = static_cast<int>((tokens + range - 1) / range);
  std::vector<Acc> partial(static_cast<size_t>(batches * ranges * shape.entries()),
                           std::numeric_limits<Acc>::quiet_NaN());
  const SmallSums<Acc> sums{shape, {gram.data(), gram_size, columns + 2, 1}, partial.data(), batches, ranges};
  const SmallProblem<Acc, Features> problem{sums,          x,      weighted ? weight.data() : nullptr,
                                            weight_stride, tokens, range};
  emulated::launch({static_cast<unsigned>(batches * ranges), 1}, kSmallThreads,
                   [&] { small_gram_kernel<Acc, Features>(problem); });
  if (ranges > 1) {
    const auto blocks = (batches * shape.entries() + kAddSmallThreads - 1) / kAddSmallThreads;
    emulated::launch({static_cast<unsigned>(blocks), 1}, kAddSmallThreads, [&] { add_small_kernel<Acc>(sums); });
  }
  for (int64_t b = 0; b < batches; ++b) {
    for (int i = 0; i < columns; ++i) {
      for (int j = 0; j <= i; ++j) {
        double sum = 0;
        for (int64_t t = 0; t < tokens; ++t) {
          sum += (weighted ? static_cast<double>(weight[b * weight_stride + t]) : 1.0) * at(b, t, i) * at(b, t, j);
        }
        expected[b * gram_size + i * (columns + 2) + j] += static_cast<Acc>(sum);
      }
    }
  }
  CHECK(gram == expected, batches, tokens, columns);
}

template <class Acc, class T>
void check_matrices() {
  for (const int columns : {1, 9, 64}) {
    for (const bool tokens_contiguous : {false, true}) {
      const int64_t batches = 2, tokens = columns == 64 ? 70 : 300;
      const auto data = integers<T>(batches * tokens * (columns + 1), 6);
      const Strided<const T> x = tokens_contiguous
                                     ? Strided<const T>{data.data(), tokens * (columns + 1), 1, tokens}
                                     : Strided<const T>{data.data(), tokens * (columns + 1), columns + 1, 1};
      const auto at = [&](int64_t b, int64_t t, int64_t c) { return static_cast<double>(widen(x.at(b, t, c))); };
      check_small<Acc>(x, batches, tokens, columns, at, tokens_contiguous, columns == 9 ? 1 : 3);
    }
  }
}

}  // namespace

DEVICE_TEST(cuda_small_grams_of_matrices) {
  check_matrices<float, f16>();
  check_matrices<double, float>();
}

DEVICE_TEST(cuda_small_grams_of_patches) {
  for_convolutions<bf16>([](const Convolution<bf16>& c) {
    if (c.columns > kSmall) return;
    const auto at = [&](int64_t g, int64_t t, int64_t j) { return c.at(g, t, j); };
    const int columns = static_cast<int>(c.columns);
    check_small<float>(c.patches, c.groups, c.tokens, columns, at, c.channels > 1, c.channels > 1 ? 1 : 2);
  });
}

DEVICE_TEST(cuda_patches_become_matrices) {
  for_convolutions<float>([](const Convolution<float>& c) {
    const int64_t pitch = c.columns + 3;
    for (const int64_t first : {int64_t{0}, c.tokens / 3}) {
      const int64_t tokens = c.tokens - first - (first > 0);  // up to the end, and not quite
      std::vector<float> out(static_cast<size_t>(c.groups * tokens * pitch), 99.0f);
      const auto squares = [](int64_t size) { return static_cast<unsigned>((size + kUnfoldEdge - 1) / kUnfoldEdge); };
      emulated::launch({static_cast<unsigned>(c.groups) * squares(tokens), squares(c.columns)}, kUnfoldThreads,
                       [&] { unfold_kernel<float>(c.patches, first, tokens, c.columns, pitch, out.data()); });
      for (int64_t g = 0; g < c.groups; ++g) {
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t j = 0; j < pitch; ++j) {
            const double expected = j < c.columns ? c.at(g, first + t, j) : 99.0;
            CHECK(static_cast<double>(out[(g * tokens + t) * pitch + j]) == expected, g, t, j);
          }
        }
      }
    }
  });
}
