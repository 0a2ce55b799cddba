#include "cpu/kernels/gram.h"

#include <algorithm>
#include <vector>

#include "cpu/kernels/aligned.h"
#include "cpu/kernels/tasks.h"

namespace statsmerge {
namespace {

constexpr int64_t kSmall = 32;                // Grams up to this size are summed side by side in the lanes of vectors
constexpr int64_t kMostTaps = kSmall + 4;     // their columns, filled up to whole blocks
constexpr int64_t kTileBytes = 28 << 10;      // of padded input at a time, to stay in the first-level cache
constexpr int64_t kTileRows = 256;            // patches added before their sums go to memory: short sums round less
constexpr int64_t kTasks = 16;                // at least, where the shape allows it
constexpr int64_t kSmallGram = 512;           // Grams up to this size are parallel over the batch

// Patches at outputs [y, y + rows) × [x, x + columns) of plane z, of as many images or groups as there are lanes; and,
// one after the other, of several images.
template <class Acc>
struct LaneTile {
  const Patches* patches;
  const char* data;  // of the first lane
  int64_t lanes, lane_stride, images, image_stride;
  const Acc* weight;  // of the first patch of the first lane; null: ones
  int64_t weight_lane_stride, weight_image_stride;
  int64_t z, y, x, rows, columns;
  int64_t block;  // entries of a Gram in registers: block × block
};

template <class Acc>
struct LaneKernels {
  int64_t lanes, largest_block;
  void (*accumulate)(const LaneTile<Acc>&, Acc* scratch, Acc* sums);
};

// Elements of the padded input that `outputs` neighbours touch along a dimension.
constexpr int64_t span(const Patches& p, int dimension, int64_t outputs) {
  return (outputs - 1) * p.stride[dimension] + (p.kernel[dimension] - 1) * p.dilation[dimension] + 1;
}

// Elements of the padded input of one image that a tile's patches touch, in every lane.
template <class Acc>
int64_t elements_of(const LaneTile<Acc>& tile) {
  const Patches& p = *tile.patches;
  return p.kernel[0] * span(p, 1, tile.rows) * span(p, 2, tile.columns) * p.channels;
}

constexpr int64_t padded_taps(int64_t taps, int64_t block) { return (taps + block - 1) / block * block; }

}  // namespace
}  // namespace statsmerge

#define STATSMERGE_KERNELS "cpu/kernels/gram.inl"
#include "cpu/simd/every_target.h"

namespace statsmerge {
namespace {

// The block size that sums least in vain.
int64_t best_block(int64_t taps, int64_t largest) {
  int64_t best = largest;
  for (int64_t block = largest; block >= 3; --block) {
    if (padded_taps(taps, block) < padded_taps(taps, best)) best = block;
  }
  return best;
}

// Sums over a set of patches with one image or one group in every lane.
template <class Acc>
class LaneGrams {
 public:
  LaneGrams(const LaneKernels<Acc>& kernels, int64_t taps)
      : kernels_(kernels), block_(best_block(taps, kernels.largest_block)), pitch_(padded_taps(taps, block_)) {
    const int64_t count = pitch_ * pitch_ * kernels.lanes;
    sums_ = aligned_array<Acc>(count);
    std::fill_n(sums_.get(), count, Acc{0});
  }

  // Adds all patches of `lanes` neighbouring images, or of `lanes` neighbouring groups in each of some images.
  void add(const Patches& p, const char* data, int64_t lanes, int64_t lane_stride, const Acc* weight,
           int64_t weight_lane_stride, int64_t images = 1, int64_t weight_image_stride = 0) {
    const int64_t lane_bytes = kernels_.lanes * static_cast<int64_t>(sizeof(Acc));
    const auto elements = [&](int64_t rows, int64_t columns) {
      return p.kernel[0] * span(p, 1, rows) * span(p, 2, columns) * p.channels + (weight ? rows * columns : 0);
    };
    const auto too_much = [&](int64_t rows, int64_t columns) {
      return rows * columns > kTileRows || elements(rows, columns) * lane_bytes > kTileBytes;
    };
    int64_t rows = p.out[1], columns = p.out[2];
    while (columns > 1 && too_much(1, columns)) columns = (columns + 1) / 2;
    while (rows > 1 && too_much(rows, columns)) rows = (rows + 1) / 2;
    const int64_t room = std::min(kTileRows / (rows * columns), kTileBytes / (elements(rows, columns) * lane_bytes));
    const int64_t together = std::clamp<int64_t>(room, 1, images);
    const AlignedArray<Acc> scratch = aligned_array<Acc>(together * elements(rows, columns) * kernels_.lanes);
    for (int64_t image = 0; image < images; image += together) {
      const char* from = data + image * p.image_stride * bytes_of(p.storage);
      const Acc* weights = weight ? weight + image * weight_image_stride : nullptr;
      for (int64_t z = 0; z < p.out[0]; ++z) {
        for (int64_t y = 0; y < p.out[1]; y += rows) {
          for (int64_t x = 0; x < p.out[2]; x += columns) {
            kernels_.accumulate({&p, from, lanes, lane_stride, std::min(together, images - image), p.image_stride,
                                 weights ? weights + (z * p.out[1] + y) * p.out[2] + x : nullptr, weight_lane_stride,
                                 weight_image_stride, z, y, x, std::min(rows, p.out[1] - y),
                                 std::min(columns, p.out[2] - x), block_},
                                scratch.get(), sums_.get());
          }
        }
      }
    }
  }

  Acc sum(int64_t i, int64_t j, int64_t lane) const {
    return sums_[(i * pitch_ + j) * kernels_.lanes + lane];
  }

  Acc sum_of_lanes(int64_t i, int64_t j) const {
    Acc total = 0;
    for (int64_t lane = 0; lane < kernels_.lanes; ++lane) total += sum(i, j, lane);
    return total;
  }

 private:
  const LaneKernels<Acc>& kernels_;
  int64_t block_, pitch_;
  AlignedArray<Acc> sums_;
};

// How a large number of rows is divided among tasks: by the shape alone.
int64_t slices_of(int64_t units, int64_t tasks) { return std::clamp<int64_t>(kTasks / tasks, 1, units); }

// grams[index] += the lower triangle of each of the `results` [slices, grams, size, size], slice by slice.
template <class Acc>
void add_results(const std::vector<Acc>& results, int64_t count, int64_t slices, int64_t size, const Grams<Acc>& grams) {
  parallel_tasks(count, [&](int64_t index) {
    for (int64_t s = 0; s < slices; ++s) {
      const Acc* from = results.data() + (s * count + index) * size * size;
      for (int64_t i = 0; i < size; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
          grams.data[index * grams.stride + i * grams.row_stride + j * grams.column_stride] += from[i * size + j];
        }
      }
    }
  });
}

// One small Gram per batch: its rows are cut into as many images as there are lanes, and a rest of single rows.
template <class Acc>
void accumulate_small(const MatrixView& x, int64_t batches, int64_t x_stride, const Acc* weight,
                      const Grams<Acc>& grams) {
  const auto& kernels = STATSMERGE_ACTIVE(kLaneGrams<Acc>);
  const int64_t size = x.columns, slices = slices_of(std::max<int64_t>(x.rows / 1024, 1), batches);
  std::vector<Acc> results(static_cast<size_t>(slices * batches * size * size));
  parallel_tasks(batches * slices, [&](int64_t task) {
    const int64_t batch = task % batches, slice = task / batches;
    const int64_t first = slice * x.rows / slices, last = (slice + 1) * x.rows / slices;
    LaneGrams<Acc> lanes(kernels, size);
    const auto add = [&](int64_t begin, int64_t images, int64_t rows) {
      if (images == 0 || rows == 0) return;
      const Patches p{x.data,      x.storage, images,    1,         size,         rows * x.row_stride,
                      0,           x.column_stride, {1, 1, rows}, {0, 0, x.row_stride}, {1, 1, 1}, {1, 1, 1},
                      {0, 0, 0},   {1, 1, 1}, {1, 1, rows}};
      lanes.add(p, x.data + (batch * x_stride + begin * x.row_stride) * bytes_of(x.storage), images,
                rows * x.row_stride, weight ? weight + batch * x.rows + begin : nullptr, rows);
    };
    const int64_t rows = (last - first) / kernels.lanes, rest = (last - first) % kernels.lanes;
    add(first, kernels.lanes, rows);
    add(last - rest, rest, 1);
    Acc* result = results.data() + (slice * batches + batch) * size * size;
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j <= i; ++j) result[i * size + j] = lanes.sum_of_lanes(i, j);
    }
  });
  add_results(results, batches, slices, size, grams);
}

// The same patches with a group in every lane.
template <class Acc>
void accumulate_groups(const Patches& p, const Acc* weight, const Grams<Acc>& grams) {
  const auto& kernels = STATSMERGE_ACTIVE(kLaneGrams<Acc>);
  const int64_t size = p.columns(), blocks = divide_up(p.groups, kernels.lanes), slices = slices_of(p.images, blocks);
  const int64_t outputs = p.out[0] * p.out[1] * p.out[2];
  std::vector<Acc> results(slices > 1 ? static_cast<size_t>(slices * p.groups * size * size) : 0);
  parallel_tasks(blocks * slices, [&](int64_t task) {
    const int64_t group = task % blocks * kernels.lanes, slice = task / blocks;
    const int64_t count = std::min(kernels.lanes, p.groups - group), first = slice * p.images / slices;
    LaneGrams<Acc> lanes(kernels, size);
    lanes.add(p, p.data + (first * p.image_stride + group * p.group_stride) * bytes_of(p.storage), count,
              p.group_stride, weight ? weight + first * outputs : nullptr, 0, (slice + 1) * p.images / slices - first,
              outputs);
    const Grams<Acc> to = slices > 1 ? Grams<Acc>{results.data() + slice * p.groups * size * size, size * size, size, 1}
                                     : grams;
    for (int64_t lane = 0; lane < count; ++lane) {
      for (int64_t i = 0; i < size; ++i) {
        Acc* row = to.data + (group + lane) * to.stride + i * to.row_stride;
        for (int64_t j = 0; j <= i; ++j) row[j * to.column_stride] += lanes.sum(i, j, lane);
      }
    }
  });
  if (slices > 1) add_results(results, p.groups, slices, size, grams);
}

// The same patches with an image in every lane.
template <class Acc>
void accumulate_images(const Patches& p, const Acc* weight, const Grams<Acc>& grams) {
  const auto& kernels = STATSMERGE_ACTIVE(kLaneGrams<Acc>);
  const int64_t size = p.columns(), blocks = divide_up(p.images, kernels.lanes), slices = slices_of(blocks, p.groups);
  const int64_t outputs = p.out[0] * p.out[1] * p.out[2];
  std::vector<Acc> results(static_cast<size_t>(slices * p.groups * size * size));
  parallel_tasks(p.groups * slices, [&](int64_t task) {
    const int64_t group = task % p.groups, slice = task / p.groups;
    LaneGrams<Acc> lanes(kernels, size);
    for (int64_t block = slice * blocks / slices; block < (slice + 1) * blocks / slices; ++block) {
      const int64_t image = block * kernels.lanes;
      lanes.add(p, p.data + (image * p.image_stride + group * p.group_stride) * bytes_of(p.storage),
                std::min(kernels.lanes, p.images - image), p.image_stride,
                weight ? weight + image * outputs : nullptr, outputs);
    }
    Acc* result = results.data() + (slice * p.groups + group) * size * size;
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j <= i; ++j) result[i * size + j] = lanes.sum_of_lanes(i, j);
    }
  });
  add_results(results, p.groups, slices, size, grams);
}

// Whether each element of dimension d is the patch of its own place.
bool is_grid(const Patches& p, int d) { return p.kernel[d] == 1 && p.padding[d] == 0 && p.size[d] == p.out[d]; }

// A kernel of one element without padding reads a grid of points, whatever its stride: the same without stride, and with
// neighbouring dimensions merged into one where their elements follow each other.
Patches simplified(Patches p) {
  for (int d = 0; d < 3; ++d) {
    if (p.kernel[d] == 1 && p.padding[d] == 0 && (p.out[d] - 1) * p.stride[d] < p.size[d]) {
      p.size[d] = p.out[d];
      p.element_stride[d] *= p.stride[d];
      p.stride[d] = 1;
    }
  }
  for (int d : {1, 0}) {
    if (is_grid(p, d) && is_grid(p, 2) && (p.size[d] == 1 || p.element_stride[d] == p.size[2] * p.element_stride[2]) &&
        (d == 1 || p.size[1] == 1)) {
      p.size[2] = p.out[2] = p.size[d] * p.size[2];
      p.size[d] = p.out[d] = 1;
    }
  }
  return p;
}

MatrixView shifted(MatrixView x, int64_t elements) {
  x.data += elements * bytes_of(x.storage);
  return x;
}

// Calls one(index) for every Gram: small ones side by side, large ones one after the other with all threads inside.
template <class F>
void for_each_gram(int64_t count, int64_t size, const F& one) {
  if (size <= kSmallGram && count > 1) return parallel_tasks(count, one);
  for (int64_t index = 0; index < count; ++index) one(index);
}

}  // namespace

template <class Acc>
void accumulate_grams(const MatrixView& x, int64_t batches, int64_t x_stride, const Acc* weight,
                      const Grams<Acc>& grams) {
  if (x.rows == 0 || x.columns == 0 || batches == 0) return;
  if (x.columns <= kSmall) return accumulate_small(x, batches, x_stride, weight, grams);
  for_each_gram(batches, x.columns, [&](int64_t batch) {
    const MatrixView features = shifted(x, batch * x_stride);
    accumulate_product<Acc>(1, features, features, weight ? weight + batch * x.rows : nullptr,
                            grams.data + batch * grams.stride, grams.row_stride, grams.column_stride, true);
  });
}

template <class Acc>
void accumulate_cross_grams(const MatrixView& x, int64_t x_stride, const MatrixView& other, int64_t other_stride,
                            int64_t batches, const Acc* weight, const Grams<Acc>& grams) {
  for_each_gram(batches, std::max(x.columns, other.columns), [&](int64_t batch) {
    accumulate_product<Acc>(1, shifted(x, batch * x_stride), shifted(other, batch * other_stride),
                            weight ? weight + batch * x.rows : nullptr, grams.data + batch * grams.stride,
                            grams.row_stride, grams.column_stride, false);
  });
}

template <class Acc>
void accumulate_patch_grams(const Patches& patches, const Acc* weight, const Grams<Acc>& grams) {
  if (patches.rows() == 0 || patches.columns() == 0 || patches.groups == 0) return;
  const Patches p = simplified(patches);
  const int64_t grid = p.size[2];
  if (is_grid(p, 0) && is_grid(p, 1) && is_grid(p, 2) && p.out[0] == 1 && p.out[1] == 1 && p.groups == 1 &&
      (p.images == 1 || p.image_stride == grid * p.element_stride[2])) {
    const MatrixView x{p.data, p.storage, p.images * grid, p.channels, p.element_stride[2], p.channel_stride};
    return accumulate_grams(x, 1, 0, weight, grams);
  }
  if (p.columns() <= kSmall) {
    const int64_t lanes = STATSMERGE_ACTIVE(kLaneGrams<Acc>).lanes;
    const auto used = [&](int64_t count) { return static_cast<double>(count) / (divide_up(count, lanes) * lanes); };
    if (std::max(used(p.groups), used(p.images)) >= 0.5) {
      return used(p.groups) >= used(p.images) ? accumulate_groups(p, weight, grams) : accumulate_images(p, weight, grams);
    }
  }
  for_each_gram(p.groups, p.columns(), [&](int64_t group) {
    accumulate_patches_product(p, group, weight, grams.data + group * grams.stride, grams.row_stride,
                               grams.column_stride);
  });
}

#define STATSMERGE_INSTANTIATE(Acc)                                                                             \
  template void accumulate_grams(const MatrixView&, int64_t, int64_t, const Acc*, const Grams<Acc>&); \
  template void accumulate_cross_grams(const MatrixView&, int64_t, const MatrixView&, int64_t, int64_t, const Acc*,     \
                                       const Grams<Acc>&);                                                             \
  template void accumulate_patch_grams(const Patches&, const Acc*, const Grams<Acc>&);
STATSMERGE_INSTANTIATE(float)
STATSMERGE_INSTANTIATE(double)
#undef STATSMERGE_INSTANTIATE

}  // namespace statsmerge
