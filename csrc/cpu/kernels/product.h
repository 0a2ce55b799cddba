// The matrix product of every kernel that needs one: operands of any element type and strides are packed into panels,
// converted and weighted on the way, and multiplied by a register-blocked kernel of the processor's instruction set.
#pragma once

#include <cstdint>

#include "common/convert.h"
#include "cpu/kernels/patches.h"

namespace statsmerge {

// A matrix in memory; strides are counted in elements and may be anything, 0 and negative included.
struct MatrixView {
  const char* data;
  Storage storage;
  int64_t rows, columns, row_stride, column_stride;
};

// c += alpha · aᵀ diag(weight) b for a [n, p], b [n, q] and c [p, q]; a null weight is all ones. Where `lower`, a and b
// are the same matrix, and only what is on and below the diagonal is meant: some entries above it are written too.
// Sums are taken over blocks of rows, in an order that depends on the shapes and the instruction set alone.
template <class Acc>
void accumulate_product(Acc alpha, const MatrixView& a, const MatrixView& b, const Acc* weight, Acc* c,
                        int64_t c_row_stride, int64_t c_column_stride, bool lower);

// The same for patches of one group as a [n, p] and b [n, q]. They are formed panel by panel, never as matrices.
template <class Acc>
void accumulate_patches_product(const Patches& a, const Patches& b, int64_t group, const Acc* weight, Acc* c,
                                int64_t c_row_stride, int64_t c_column_stride, bool lower);

}  // namespace statsmerge
