// Sums of outer products of features: c += xᵀ diag(weight) x for many matrices, or for the patches of a convolution.
#pragma once

#include <cstdint>

#include "cpu/kernels/patches.h"
#include "cpu/kernels/product.h"

namespace statsmerge {

// Matrices of one shape at one distance, in elements; only their lower triangles are meant.
template <class Acc>
struct Grams {
  Acc* data;
  int64_t stride, row_stride, column_stride;
};

// Batch b has the features x shifted by b · x_stride elements and the weights [batches, x.rows]; null weights are ones.
template <class Acc>
void accumulate_grams(const MatrixView& x, int64_t batches, int64_t x_stride, const Acc* weight, const Grams<Acc>& grams);

// The same for a second factor of its own: xᵀ diag(weight) other, all of it.
template <class Acc>
void accumulate_cross_grams(const MatrixView& x, int64_t x_stride, const MatrixView& other, int64_t other_stride,
                            int64_t batches, const Acc* weight, const Grams<Acc>& grams);

// A Gram for every group of a convolution; all of them share the weights [images, outputs].
template <class Acc>
void accumulate_patch_grams(const Patches& patches, const Acc* weight, const Grams<Acc>& grams);

// The same for a second factor of its own, patchesᵀ diag(weight) other, all of it: one row for each patch, group g's
// shifted by g · other_stride elements.
template <class Acc>
void accumulate_patch_cross_grams(const Patches& patches, const MatrixView& other, int64_t other_stride,
                                  const Acc* weight, const Grams<Acc>& grams);

}  // namespace statsmerge
