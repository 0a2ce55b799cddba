#include "cpu/kernels/product.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "common/parallel.h"

namespace statsmerge {
namespace {

template <class Acc>
struct ProductKernels {
  int64_t panel;  // columns of a packed panel
  void (*pack)(const MatrixView&, int64_t first, int64_t rows, int64_t column, int64_t columns, const Acc* weight,
               Acc* panel);
  void (*multiply)(const Acc* a, const Acc* b, int64_t depth, Acc alpha, Acc* c, int64_t row_stride,
                   int64_t column_stride, int64_t rows, int64_t columns);
};

}  // namespace
}  // namespace statsmerge

#define STATSMERGE_KERNELS "cpu/kernels/product.inl"
#include "cpu/simd/every_target.h"

namespace statsmerge {
namespace {

constexpr int64_t kDepth = 192;              // rows multiplied at a time: a panel of them stays in the first-level cache
constexpr int64_t kPackedBytes = 6 << 20;    // packed at a time, to stay in the last-level cache
constexpr int64_t kFewTasks = 16;            // fewer than this leave threads idle: rows are divided instead
constexpr int64_t kSliceRows = 1024;         // the least rows of a slice
constexpr int64_t kSlices = 16;              // the most slices

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

struct AlignedDelete {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};

template <class T>
std::unique_ptr<T[], AlignedDelete> aligned_array(int64_t count) {
  return std::unique_ptr<T[], AlignedDelete>(
      static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64})));
}

// Calls f(task) for every task in [0, count), each thread taking the next one that is left.
template <class F>
void parallel_tasks(int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(task);
  });
}

// A square block of c, in panels.
struct Block {
  int64_t row, column;
};

template <class Acc>
class Product {
 public:
  Product(Acc alpha, const MatrixView& a, const MatrixView& b, const Acc* weight, bool lower)
      : kernels_(STATSMERGE_ACTIVE(kProduct<Acc>)), alpha_(alpha), a_(a), b_(b), weight_(weight), lower_(lower) {
    row_panels_ = divide_up(a.columns, kernels_.panel);
    column_panels_ = divide_up(b.columns, kernels_.panel);
    block_ = std::clamp<int64_t>(std::min(row_panels_, column_panels_) / 8, 1, 4);
    for (int64_t i = 0; i < row_panels_; i += block_) {
      for (int64_t j = 0; j < (lower ? i + 1 : column_panels_); j += block_) blocks_.push_back({i, j});
    }
  }

  int64_t tasks() const { return static_cast<int64_t>(blocks_.size()); }

  // c += the product over rows [first, last).
  void accumulate(int64_t first, int64_t last, Acc* c, int64_t row_stride, int64_t column_stride) const {
    const bool one = lower_ && !weight_;
    const int64_t panels = one ? row_panels_ : row_panels_ + column_panels_;
    const int64_t row_bytes = panels * kernels_.panel * static_cast<int64_t>(sizeof(Acc));
    const int64_t chunk = std::min(std::max(kPackedBytes / row_bytes / kDepth, int64_t{1}) * kDepth, last - first);
    const auto packed = aligned_array<Acc>(panels * chunk * kernels_.panel);
    const auto panel = [&](int64_t index, int64_t row) { return packed.get() + (index * chunk + row) * kernels_.panel; };
    const int64_t right = one ? 0 : row_panels_;  // the first panel of b
    for (; first < last; first += chunk) {
      const int64_t rows = std::min(chunk, last - first), depths = divide_up(rows, kDepth);
      parallel_tasks(panels * depths, [&](int64_t task) {
        const int64_t index = task % panels, row = task / panels * kDepth, depth = std::min(kDepth, rows - row);
        const bool left = index < row_panels_;
        const MatrixView& m = left ? a_ : b_;
        const int64_t column = (left ? index : index - row_panels_) * kernels_.panel;
        kernels_.pack(m, first + row, depth, column, std::min(kernels_.panel, m.columns - column),
                      left ? weight_ : nullptr, panel(index, row));
      });
      parallel_tasks(tasks(), [&](int64_t task) {
        const Block block = blocks_[static_cast<size_t>(task)];
        const int64_t row_end = std::min(block.row + block_, row_panels_);
        const int64_t column_end = std::min(block.column + block_, column_panels_);
        for (int64_t row = 0; row < rows; row += kDepth) {
          const int64_t depth = std::min(kDepth, rows - row);
          for (int64_t j = block.column; j < column_end; ++j) {
            for (int64_t i = lower_ ? std::max(block.row, j) : block.row; i < row_end; ++i) {
              const int64_t c_row = i * kernels_.panel, c_column = j * kernels_.panel;
              kernels_.multiply(panel(i, row), panel(right + j, row), depth, alpha_,
                                c + c_row * row_stride + c_column * column_stride, row_stride, column_stride,
                                std::min(kernels_.panel, a_.columns - c_row),
                                std::min(kernels_.panel, b_.columns - c_column));
            }
          }
        }
      });
    }
  }

 private:
  const ProductKernels<Acc>& kernels_;
  Acc alpha_;
  const MatrixView &a_, &b_;
  const Acc* weight_;
  bool lower_;
  int64_t row_panels_, column_panels_, block_;
  std::vector<Block> blocks_;
};

}  // namespace

template <class Acc>
void accumulate_product(Acc alpha, const MatrixView& a, const MatrixView& b, const Acc* weight, Acc* c,
                        int64_t c_row_stride, int64_t c_column_stride, bool lower) {
  if (a.rows == 0 || a.columns == 0 || b.columns == 0) return;
  const Product<Acc> product(alpha, a, b, weight, lower);
  const int64_t slices = std::min(a.rows / kSliceRows, kSlices);
  if (product.tasks() >= kFewTasks || slices < 2) return product.accumulate(0, a.rows, c, c_row_stride, c_column_stride);
  // A small c of many rows: slices of rows side by side, each with a c of its own, added up in order.
  const int64_t size = a.columns * b.columns;
  std::vector<Acc> sums(static_cast<size_t>(slices * size));
  parallel_tasks(slices, [&](int64_t s) {
    product.accumulate(s * a.rows / slices, (s + 1) * a.rows / slices, sums.data() + s * size, b.columns, 1);
  });
  for (int64_t s = 0; s < slices; ++s) {
    for (int64_t i = 0; i < a.columns; ++i) {
      for (int64_t j = 0; j < (lower ? i + 1 : b.columns); ++j) {
        c[i * c_row_stride + j * c_column_stride] += sums[static_cast<size_t>(s * size + i * b.columns + j)];
      }
    }
  }
}

template void accumulate_product(float, const MatrixView&, const MatrixView&, const float*, float*, int64_t, int64_t,
                                 bool);
template void accumulate_product(double, const MatrixView&, const MatrixView&, const double*, double*, int64_t,
                                 int64_t, bool);

}  // namespace statsmerge
