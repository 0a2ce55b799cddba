// Symmetric matrices of which one triangle is known.
#pragma once

#include <cstdint>

namespace statsmerge {

// Copies what is below the diagonals of `batches` matrices [n, n], `stride` elements apart, to above them. With the
// strides of rows and columns exchanged it is the other way round.
template <class T>
void mirror_lower(T* data, int64_t batches, int64_t stride, int64_t n, int64_t row_stride, int64_t column_stride);

}  // namespace statsmerge
