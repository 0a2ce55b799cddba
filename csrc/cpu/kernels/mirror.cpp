#include "cpu/kernels/mirror.h"

#include <algorithm>

#include "cpu/kernels/tasks.h"

namespace statsmerge {
namespace {

constexpr int64_t kBlock = 32;       // rows and columns that stay in the cache while they are transposed
constexpr int64_t kElements = 4096;  // of small matrices that a thread takes at a time

}  // namespace

template <class T>
void mirror_lower(T* data, int64_t batches, int64_t stride, int64_t n, int64_t row_stride, int64_t column_stride) {
  const int64_t blocks = divide_up(n, kBlock), together = std::max<int64_t>(1, kElements / std::max<int64_t>(1, n * n));
  parallel_tasks(divide_up(batches, together) * blocks, [&](int64_t task) {
    const int64_t row = task % blocks * kBlock, batch = task / blocks * together;
    const int64_t rows = std::min(row + kBlock, n);
    for (int64_t b = batch; b < std::min(batch + together, batches); ++b) {
      T* matrix = data + b * stride;
      for (int64_t column = 0; column <= row; column += kBlock) {
        for (int64_t j = column; j < std::min(column + kBlock, rows); ++j) {
          for (int64_t i = std::max(row, j + 1); i < rows; ++i) {
            matrix[j * row_stride + i * column_stride] = matrix[i * row_stride + j * column_stride];
          }
        }
      }
    }
  });
}

template void mirror_lower(float*, int64_t, int64_t, int64_t, int64_t, int64_t);
template void mirror_lower(double*, int64_t, int64_t, int64_t, int64_t, int64_t);

}  // namespace statsmerge
