#include "cpu/kernels/lane_grams.h"

#include <algorithm>
#include <vector>

#include "cpu/kernels/aligned.h"
#include "cpu/kernels/tasks.h"

namespace statsmerge {
namespace {

constexpr int64_t kMostTaps = kSmall + 4;  // columns, filled up to whole blocks
constexpr int64_t kMostOutputs = 4;        // of a cross Gram: more are worth a matrix product
constexpr int64_t kTileBytes = 28 << 10;   // of padded input at a time, to stay in the first-level cache
constexpr int64_t kTileRows = 256;         // patches added before their sums go to memory: short sums round less
constexpr int64_t kTasks = 16;             // at least, where the shape allows it

// What the lanes read: neighbouring images of patches, or neighbouring groups of one image after the other.
struct LaneInput {
  const Patches* patches;  // null: nothing
  const char* data;        // of the first lane
  int64_t stride;          // from lane to lane
};

// Patches at outputs [y, y + rows) × [x, x + columns) of plane z of some images.
template <class Acc>
struct LaneTile {
  LaneInput input, other;  // `other` for cross Grams
  const Acc* weight;       // of the first patch of the first lane; null: ones
  int64_t weight_lane_stride, weight_image_stride;
  int64_t lanes, images;
  int64_t z = 0, y = 0, x = 0, rows = 0, columns = 0;
  int64_t block = 0;  // entries of a Gram in registers: block × block

  int64_t positions() const { return images * rows * columns; }
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

// Elements of the padded input of one image that rows × columns patches touch, in every lane.
constexpr int64_t elements_of(const Patches& p, int64_t rows, int64_t columns) {
  return p.kernel[0] * span(p, 1, rows) * span(p, 2, columns) * p.channels;
}

constexpr int64_t padded_taps(int64_t taps, int64_t block) { return (taps + block - 1) / block * block; }

}  // namespace
}  // namespace statsmerge

#define STATSMERGE_KERNELS "cpu/kernels/lane_grams.inl"
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

// The entries that are summed: the lower triangle of a Gram, or all of a cross Gram, outputs × taps.
struct Entries {
  int64_t rows, columns;
  bool lower;

  Entries(int64_t taps, const Patches* other)
      : rows(other ? other->channels : taps), columns(taps), lower(other == nullptr) {}
  int64_t count() const { return rows * columns; }
  int64_t end(int64_t row) const { return lower ? row + 1 : columns; }
};

// Sums over a set of patches with one image or one group in every lane.
template <class Acc>
class LaneSums {
 public:
  LaneSums(const LaneKernels<Acc>& kernels, const Entries& entries)
      : kernels_(kernels),
        entries_(entries),
        block_(best_block(entries.columns, kernels.largest_block)),
        pitch_(padded_taps(entries.columns, block_)) {
    const int64_t count = (entries.lower ? pitch_ : entries.rows) * pitch_ * kernels.lanes;
    sums_ = aligned_array<Acc>(count);
    std::fill_n(sums_.get(), count, Acc{0});
  }

  // Adds all patches of some images, or of as many as there are lanes in each. Of `all`, only what is said before the
  // tile's place and size counts.
  void add(LaneTile<Acc> all) {
    const Patches& p = *all.input.patches;
    const int64_t lane_bytes = kernels_.lanes * static_cast<int64_t>(sizeof(Acc));
    const int64_t beside = (all.weight ? 1 : 0) + (all.other.patches ? all.other.patches->channels : 0);
    const auto elements = [&](int64_t rows, int64_t columns) {
      return elements_of(p, rows, columns) + beside * rows * columns;
    };
    const auto too_much = [&](int64_t rows, int64_t columns) {
      return rows * columns > kTileRows || elements(rows, columns) * lane_bytes > kTileBytes;
    };
    int64_t rows = p.out[1], columns = p.out[2];
    while (columns > 1 && too_much(1, columns)) columns = (columns + 1) / 2;
    while (rows > 1 && too_much(rows, columns)) rows = (rows + 1) / 2;
    const int64_t room = std::min(kTileRows / (rows * columns), kTileBytes / (elements(rows, columns) * lane_bytes));
    const int64_t together = std::clamp<int64_t>(room, 1, all.images);
    const AlignedArray<Acc> scratch = aligned_array<Acc>(together * elements(rows, columns) * kernels_.lanes);
    LaneTile<Acc> tile = all;
    tile.block = block_;
    for (int64_t image = 0; image < all.images; image += together) {
      tile.images = std::min(together, all.images - image);
      tile.input.data = moved(all.input, image);
      if (all.other.patches) tile.other.data = moved(all.other, image);
      for (tile.z = 0; tile.z < p.out[0]; ++tile.z) {
        for (tile.y = 0; tile.y < p.out[1]; tile.y += rows) {
          for (tile.x = 0; tile.x < p.out[2]; tile.x += columns) {
            tile.rows = std::min(rows, p.out[1] - tile.y);
            tile.columns = std::min(columns, p.out[2] - tile.x);
            const int64_t place = (tile.z * p.out[1] + tile.y) * p.out[2] + tile.x;
            if (all.weight) tile.weight = all.weight + image * all.weight_image_stride + place;
            kernels_.accumulate(tile, scratch.get(), sums_.get());
          }
        }
      }
    }
  }

  // Adds the entries of one lane to a matrix.
  void add_lane(int64_t lane, Acc* to, int64_t row_stride, int64_t column_stride) const {
    for (int64_t i = 0; i < entries_.rows; ++i) {
      for (int64_t j = 0; j < entries_.end(i); ++j) to[i * row_stride + j * column_stride] += sum(i, j, lane);
    }
  }

  // Stores the sums of all lanes as a dense matrix.
  void store_total(Acc* to) const {
    for (int64_t i = 0; i < entries_.rows; ++i) {
      for (int64_t j = 0; j < entries_.end(i); ++j) {
        Acc total = 0;
        for (int64_t lane = 0; lane < kernels_.lanes; ++lane) total += sum(i, j, lane);
        to[i * entries_.columns + j] = total;
      }
    }
  }

 private:
  static const char* moved(const LaneInput& input, int64_t images) {
    return input.data + images * input.patches->image_stride * bytes_of(input.patches->storage);
  }
  Acc sum(int64_t i, int64_t j, int64_t lane) const { return sums_[(i * pitch_ + j) * kernels_.lanes + lane]; }

  const LaneKernels<Acc>& kernels_;
  Entries entries_;
  int64_t block_, pitch_;
  AlignedArray<Acc> sums_;
};

// How a large number of rows is divided among tasks: by the shape alone.
int64_t slices_of(int64_t units, int64_t tasks) { return std::clamp<int64_t>(kTasks / tasks, 1, units); }

// grams[index] += each of the `results` [slices, grams, rows, columns], slice by slice.
template <class Acc>
void add_results(const std::vector<Acc>& results, int64_t count, int64_t slices, const Entries& entries,
                 const Grams<Acc>& grams) {
  parallel_tasks(count, [&](int64_t index) {
    for (int64_t s = 0; s < slices; ++s) {
      const Acc* from = results.data() + (s * count + index) * entries.count();
      for (int64_t i = 0; i < entries.rows; ++i) {
        for (int64_t j = 0; j < entries.end(i); ++j) {
          grams.data[index * grams.stride + i * grams.row_stride + j * grams.column_stride] +=
              from[i * entries.columns + j];
        }
      }
    }
  });
}

LaneInput input_at(const Patches* p, int64_t image, int64_t group, bool groups_in_lanes) {
  if (!p) return {};
  const int64_t place = image * p->image_stride + group * p->group_stride;
  return {p, p->data + place * bytes_of(p->storage), groups_in_lanes ? p->group_stride : p->image_stride};
}

// A group in every lane.
template <class Acc>
void accumulate_groups(const Patches& p, const Patches* other, const Acc* weight, const Grams<Acc>& grams) {
  const auto& kernels = STATSMERGE_ACTIVE(kLaneGrams<Acc>);
  const Entries entries(p.columns(), other);
  const int64_t blocks = divide_up(p.groups, kernels.lanes), slices = slices_of(p.images, blocks);
  const int64_t outputs = p.out[0] * p.out[1] * p.out[2];
  std::vector<Acc> results(slices > 1 ? static_cast<size_t>(slices * p.groups * entries.count()) : 0);
  parallel_tasks(blocks * slices, [&](int64_t task) {
    const int64_t group = task % blocks * kernels.lanes, slice = task / blocks;
    const int64_t count = std::min(kernels.lanes, p.groups - group), first = slice * p.images / slices;
    LaneSums<Acc> sums(kernels, entries);
    sums.add({input_at(&p, first, group, true), input_at(other, first, group, true),
              weight ? weight + first * outputs : nullptr, 0, outputs, count, (slice + 1) * p.images / slices - first});
    Acc* own = results.data() + slice * p.groups * entries.count();
    const Grams<Acc> to = slices > 1 ? Grams<Acc>{own, entries.count(), entries.columns, 1} : grams;
    for (int64_t lane = 0; lane < count; ++lane) {
      sums.add_lane(lane, to.data + (group + lane) * to.stride, to.row_stride, to.column_stride);
    }
  });
  if (slices > 1) add_results(results, p.groups, slices, entries, grams);
}

// An image in every lane.
template <class Acc>
void accumulate_images(const Patches& p, const Patches* other, const Acc* weight, const Grams<Acc>& grams) {
  const auto& kernels = STATSMERGE_ACTIVE(kLaneGrams<Acc>);
  const Entries entries(p.columns(), other);
  const int64_t blocks = divide_up(p.images, kernels.lanes), slices = slices_of(blocks, p.groups);
  const int64_t outputs = p.out[0] * p.out[1] * p.out[2];
  std::vector<Acc> results(static_cast<size_t>(slices * p.groups * entries.count()));
  parallel_tasks(p.groups * slices, [&](int64_t task) {
    const int64_t group = task % p.groups, slice = task / p.groups;
    LaneSums<Acc> sums(kernels, entries);
    for (int64_t block = slice * blocks / slices; block < (slice + 1) * blocks / slices; ++block) {
      const int64_t image = block * kernels.lanes;
      sums.add({input_at(&p, image, group, false), input_at(other, image, group, false),
                weight ? weight + image * outputs : nullptr, outputs, 0, std::min(kernels.lanes, p.images - image), 1});
    }
    sums.store_total(results.data() + (slice * p.groups + group) * entries.count());
  });
  add_results(results, p.groups, slices, entries, grams);
}

}  // namespace

// Rows are cut into as many images as there are lanes, and a rest of single rows.
template <class Acc>
void accumulate_small(const MatrixView& x, int64_t batches, int64_t x_stride, const Acc* weight,
                      const Grams<Acc>& grams) {
  const auto& kernels = STATSMERGE_ACTIVE(kLaneGrams<Acc>);
  const Entries entries(x.columns, nullptr);
  const int64_t slices = slices_of(std::max<int64_t>(x.rows / 1024, 1), batches);
  std::vector<Acc> results(static_cast<size_t>(slices * batches * entries.count()));
  parallel_tasks(batches * slices, [&](int64_t task) {
    const int64_t batch = task % batches, slice = task / batches;
    const int64_t first = slice * x.rows / slices, last = (slice + 1) * x.rows / slices;
    LaneSums<Acc> sums(kernels, entries);
    const auto add = [&](int64_t begin, int64_t images, int64_t rows) {
      if (images == 0 || rows == 0) return;
      const Patches p{x.data,      x.storage, images,    1,         x.columns,    rows * x.row_stride,
                      0,           x.column_stride, {1, 1, rows}, {0, 0, x.row_stride}, {1, 1, 1}, {1, 1, 1},
                      {0, 0, 0},   {1, 1, 1}, {1, 1, rows}};
      const char* data = x.data + (batch * x_stride + begin * x.row_stride) * bytes_of(x.storage);
      const Acc* factors = weight ? weight + batch * x.rows + begin : nullptr;
      sums.add({{&p, data, p.image_stride}, {}, factors, rows, 0, images, 1});
    };
    const int64_t rows = (last - first) / kernels.lanes, rest = (last - first) % kernels.lanes;
    add(first, kernels.lanes, rows);
    add(last - rest, rest, 1);
    sums.store_total(results.data() + (slice * batches + batch) * entries.count());
  });
  add_results(results, batches, slices, entries, grams);
}

template <class Acc>
bool accumulate_in_lanes(const Patches& p, const Patches* other, const Acc* weight, const Grams<Acc>& grams) {
  if (p.columns() > kSmall || (other && other->channels > kMostOutputs)) return false;
  const int64_t lanes = STATSMERGE_ACTIVE(kLaneGrams<Acc>).lanes;
  const auto used = [&](int64_t count) { return static_cast<double>(count) / (divide_up(count, lanes) * lanes); };
  if (std::max(used(p.groups), used(p.images)) < 0.5) return false;
  // The entries of a cross Gram are outputs × taps here.
  const Grams<Acc> to = other ? Grams<Acc>{grams.data, grams.stride, grams.column_stride, grams.row_stride} : grams;
  used(p.groups) >= used(p.images) ? accumulate_groups(p, other, weight, to) : accumulate_images(p, other, weight, to);
  return true;
}

#define STATSMERGE_INSTANTIATE(Acc)                                                                           \
  template void accumulate_small(const MatrixView&, int64_t, int64_t, const Acc*, const Grams<Acc>&); \
  template bool accumulate_in_lanes(const Patches&, const Patches*, const Acc*, const Grams<Acc>&);
STATSMERGE_INSTANTIATE(float)
STATSMERGE_INSTANTIATE(double)
#undef STATSMERGE_INSTANTIATE

}  // namespace statsmerge
