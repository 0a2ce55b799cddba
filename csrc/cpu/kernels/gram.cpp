#include "cpu/kernels/gram.h"

#include <algorithm>

#include "cpu/kernels/lane_grams.h"
#include "cpu/kernels/tasks.h"

namespace statsmerge {
namespace {

constexpr int64_t kSmallGram = 512;  // Grams up to this size are parallel over the batch

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

// One row for every output as patches of one element.
Patches patches_of(const MatrixView& x, int64_t group_stride, const Patches& p) {
  Patches out{x.data,       x.storage,       p.images,  p.groups, x.columns, 0,
              group_stride, x.column_stride, {}, {}, {1, 1, 1}, {1, 1, 1},
              {0, 0, 0},    {1, 1, 1},       {}};
  out.image_stride = x.row_stride;
  for (int d = 2; d >= 0; --d) {
    out.size[d] = out.out[d] = p.out[d];
    out.element_stride[d] = out.image_stride;
    out.image_stride *= p.out[d];
  }
  return out;
}

// Grams of patches, or, where `other` is given, their cross Grams.
template <class Acc>
void accumulate_patches(const Patches& patches, const MatrixView* other, int64_t other_stride, const Acc* weight,
                        const Grams<Acc>& grams) {
  if (patches.rows() == 0 || patches.columns() == 0 || patches.groups == 0) return;
  const Patches p = simplified(patches);
  const int64_t grid = p.size[2];
  if (is_grid(p, 0) && is_grid(p, 1) && is_grid(p, 2) && p.out[0] == 1 && p.out[1] == 1 && p.groups == 1 &&
      (p.images == 1 || p.image_stride == grid * p.element_stride[2])) {
    const MatrixView x{p.data, p.storage, p.images * grid, p.channels, p.element_stride[2], p.channel_stride};
    return other ? accumulate_cross_grams(x, 0, *other, other_stride, 1, weight, grams)
                 : accumulate_grams(x, 1, 0, weight, grams);
  }
  const Patches second = other ? patches_of(*other, other_stride, p) : p;
  if (accumulate_in_lanes(p, other ? &second : nullptr, weight, grams)) return;
  for_each_gram(p.groups, std::max(p.columns(), second.columns()), [&](int64_t group) {
    accumulate_patches_product(p, second, group, weight, grams.data + group * grams.stride, grams.row_stride,
                               grams.column_stride, !other);
  });
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
  accumulate_patches(patches, nullptr, 0, weight, grams);
}

template <class Acc>
void accumulate_patch_cross_grams(const Patches& patches, const MatrixView& other, int64_t other_stride,
                                  const Acc* weight, const Grams<Acc>& grams) {
  accumulate_patches(patches, &other, other_stride, weight, grams);
}

#define STATSMERGE_INSTANTIATE(Acc)                                                                             \
  template void accumulate_grams(const MatrixView&, int64_t, int64_t, const Acc*, const Grams<Acc>&); \
  template void accumulate_cross_grams(const MatrixView&, int64_t, const MatrixView&, int64_t, int64_t, const Acc*,     \
                                       const Grams<Acc>&);                                                             \
  template void accumulate_patch_grams(const Patches&, const Acc*, const Grams<Acc>&); \
  template void accumulate_patch_cross_grams(const Patches&, const MatrixView&, int64_t, const Acc*, const Grams<Acc>&);
STATSMERGE_INSTANTIATE(float)
STATSMERGE_INSTANTIATE(double)
#undef STATSMERGE_INSTANTIATE

}  // namespace statsmerge
