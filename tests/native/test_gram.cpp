#include <algorithm>

#include <limits>

#include "check.h"
#include "cpu/kernels/gram.h"
#include "cpu/kernels/mirror.h"

using namespace statsmerge;

namespace {

Patches convolution(const std::vector<float>& x, int64_t images, int64_t groups, int64_t channels,
                    std::vector<int64_t> size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                    bool channels_last) {
  Patches p{};
  p.data = reinterpret_cast<const char*>(x.data());
  p.storage = Storage::f32;
  p.images = images;
  p.groups = groups;
  p.channels = channels;
  const int64_t area = size[0] * size[1] * size[2], all = groups * channels;
  p.image_stride = all * area;
  p.channel_stride = channels_last ? 1 : area;
  p.group_stride = p.channel_stride * channels;
  int64_t step = channels_last ? all : 1;
  for (int d = 2; d >= 0; --d) {
    const bool used = size[d] > 1;
    p.size[d] = size[d];
    p.element_stride[d] = step;
    step *= size[d];
    p.kernel[d] = used ? kernel : 1;
    p.stride[d] = used ? stride : 1;
    p.padding[d] = used ? padding : 0;
    p.dilation[d] = used ? dilation : 1;
    p.out[d] = (size[d] + 2 * p.padding[d] - p.dilation[d] * (p.kernel[d] - 1) - 1) / p.stride[d] + 1;
  }
  return p;
}

// The element of a patch, or 0 outside of the input.
double element(const Patches& p, const std::vector<float>& x, int64_t group, int64_t row, int64_t column) {
  int64_t offset = group * p.group_stride;
  for (int d = 2; d >= 0; --d) {
    const int64_t place = row % p.out[d] * p.stride[d] - p.padding[d] + column % p.kernel[d] * p.dilation[d];
    if (place < 0 || place >= p.size[d]) return 0;
    offset += place * p.element_stride[d];
    row /= p.out[d];
    column /= p.kernel[d];
  }
  return x[static_cast<size_t>(offset + row * p.image_stride + column * p.channel_stride)];
}

// Grams, or with `others` above 0 cross Grams with as many columns.
template <class Acc>
void check_patches(int64_t images, int64_t groups, int64_t channels, std::vector<int64_t> size, int64_t kernel,
                   int64_t stride, int64_t padding, int64_t dilation, bool channels_last, bool weighted,
                   int64_t others) {
  const int64_t elements = images * groups * channels * size[0] * size[1] * size[2];
  const std::vector<float> x = cast<float>(normal(elements, 1));
  const Patches p = convolution(x, images, groups, channels, size, kernel, stride, padding, dilation, channels_last);
  const int64_t rows = p.rows(), columns = p.columns(), pitch = others ? others : columns;
  const std::vector<Acc> weights = cast<Acc>(normal(rows, 2));
  const std::vector<double> y = normal(rows * groups * others, 3);
  const int64_t other_strides[3] = {channels_last ? others : others * rows, channels_last ? groups * others : 1,
                                    channels_last ? 1 : rows};  // of groups, rows and columns
  const MatrixView other{reinterpret_cast<const char*>(y.data()), Storage::f64, rows, others, other_strides[1],
                         other_strides[2]};
  std::vector<Acc> grams[2];
  for (int threads : {1, 3}) {
    set_threads(threads);
    std::vector<Acc>& out = grams[threads == 3];
    out.assign(static_cast<size_t>(groups * columns * pitch), Acc{1});
    const Acc* factors = weighted ? weights.data() : nullptr;
    const Grams<Acc> to{out.data(), columns * pitch, pitch, 1};
    if (others) {
      accumulate_patch_cross_grams<Acc>(p, other, other_strides[0], factors, to);
    } else {
      accumulate_patch_grams<Acc>(p, factors, to);
    }
  }
  const double tolerance = (4 + std::sqrt(rows)) * std::numeric_limits<Acc>::epsilon() / 2;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t j = 0; j < (others ? others : i + 1); ++j) {
        double expected = 1, magnitude = 1;
        for (int64_t t = 0; t < rows; ++t) {
          const int64_t place = g * other_strides[0] + t * other_strides[1] + j * other_strides[2];
          const double second = others ? y[static_cast<size_t>(place)] : element(p, x, g, t, j);
          const double term = element(p, x, g, t, i) * second * (weighted ? weights[t] : 1.0);
          expected += term;
          magnitude += std::abs(term);
        }
        const size_t at = static_cast<size_t>((g * columns + i) * pitch + j);
        CHECK(grams[0][at] == grams[1][at], "threads", g, i, j);
        CHECK(std::abs(grams[0][at] - expected) <= tolerance * magnitude, g, i, j, grams[0][at], expected);
      }
    }
  }
}

template <class Acc>
void check_convolutions(const std::vector<int64_t>& others) {
  for (bool last : {false, true}) {
    for (bool weighted : {false, true}) {
      for (int64_t n : others) {
        check_patches<Acc>(3, 37, 1, {1, 9, 7}, 3, 1, 1, 1, last, weighted, n);   // depthwise, a group in every lane
        check_patches<Acc>(2, 16, 1, {1, 8, 11}, 5, 2, 2, 1, last, weighted, n);  // by 5 × 5 with stride
        check_patches<Acc>(19, 1, 3, {1, 6, 5}, 3, 2, 1, 1, last, weighted, n);   // an image in every lane
        check_patches<Acc>(1, 2, 9, {1, 7, 9}, 3, 1, 2, 2, last, weighted, n);    // panels of patches
        check_patches<Acc>(2, 8, 1, {4, 3, 5}, 2, 1, 1, 2, last, weighted, n);    // three dimensions
        check_patches<Acc>(2, 1, 50, {1, 1, 70}, 1, 3, 0, 1, last, weighted, n);  // points
        check_patches<Acc>(2, 1, 20, {1, 12, 5}, 1, 1, 0, 1, last, weighted, n);
        check_patches<Acc>(1, 9, 1, {1, 40, 90}, 3, 1, 1, 1, last, weighted, n);  // several tiles
      }
    }
  }
}

}  // namespace

NATIVE_TEST(patch_grams_in_single_precision) { check_convolutions<float>({0}); }
NATIVE_TEST(patch_grams_in_double_precision) { check_convolutions<double>({0}); }
NATIVE_TEST(patch_cross_grams_in_single_precision) { check_convolutions<float>({1, 3, 7}); }
NATIVE_TEST(patch_cross_grams_in_double_precision) { check_convolutions<double>({1, 3, 7}); }

NATIVE_TEST(small_grams) {
  for (int64_t columns : {1, 9, 25, 32}) {
    for (int64_t rows : {1, 15, 16, 333, 3000}) {
      const int64_t batches = 3, pitch = columns + (columns & 1);
      const std::vector<double> x = normal(batches * rows * pitch, 1);
      const std::vector<float> weights = cast<float>(normal(batches * rows, 2));
      const MatrixView view{reinterpret_cast<const char*>(x.data()), Storage::f64, rows, columns, pitch, 1};
      std::vector<float> grams[2];
      for (int threads : {1, 2}) {
        set_threads(threads);
        grams[threads - 1].assign(static_cast<size_t>(batches * columns * columns), 0.f);
        accumulate_grams<float>(view, batches, rows * pitch, weights.data(),
                                {grams[threads - 1].data(), columns * columns, 1, columns});
      }
      CHECK(grams[0] == grams[1]);
      for (int64_t b = 0; b < batches; ++b) {
        for (int64_t i = 0; i < columns; ++i) {
          for (int64_t j = 0; j <= i; ++j) {
            double expected = 0, magnitude = 0;
            for (int64_t t = 0; t < rows; ++t) {
              const double* row = x.data() + (b * rows + t) * pitch;
              expected += row[i] * row[j] * weights[b * rows + t];
              magnitude += std::abs(row[i] * row[j] * weights[b * rows + t]);
            }
            const float got = grams[0][b * columns * columns + j * columns + i];
            CHECK(std::abs(got - expected) <= (4 + std::sqrt(rows)) * 6e-8 * magnitude, rows, columns, i, j);
          }
        }
      }
    }
  }
}

NATIVE_TEST(mirrored_matrices_are_symmetric) {
  for (const int64_t n : {1, 5, 32, 33, 100}) {
    for (const int64_t batches : {1, 3, 40}) {
      const int64_t rows = n + 2, stride = n * rows + 1;  // with gaps, which are left alone
      const std::vector<double> before = normal(batches * stride, 5);
      std::vector<double> lower = before, upper = before;
      mirror_lower(lower.data(), batches, stride, n, rows, 1);
      mirror_lower(upper.data(), batches, stride, n, 1, rows);
      for (int64_t place = 0; place < batches * stride; ++place) {
        const int64_t in_matrix = place % stride, i = in_matrix / rows, j = in_matrix % rows;
        const bool entry = i < n && j < n;
        const int64_t mirrored = place - in_matrix + j * rows + i;
        CHECK(lower[place] == before[entry && j > i ? mirrored : place], n, batches, place);
        CHECK(upper[place] == before[entry && j < i ? mirrored : place], n, batches, place);
      }
    }
  }
}
