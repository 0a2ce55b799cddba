#include "cpu/kernels/product.h"

#include <algorithm>
#include <vector>

#include "cpu/kernels/aligned.h"
#include "cpu/kernels/tasks.h"

namespace statsmerge {
namespace {

// Panels are packed as float, double, or pairs of bfloat16: two rows of a column in one element, for the processors
// that multiply those. Their products are exact and added in single precision.
using bf16_pair = uint32_t;

template <class P>
using Accumulator = std::conditional_t<std::is_same_v<P, bf16_pair>, float, P>;
template <class P>
constexpr int64_t kRowsOf = std::is_same_v<P, bf16_pair> ? 2 : 1;  // rows of the matrix in a packed row

constexpr int64_t kStage = 64;  // patches staged at a time

template <class P>
struct ProductKernels {
  int64_t panel;  // columns of a packed panel
  void (*pack)(const MatrixView&, int64_t first, int64_t rows, int64_t column, int64_t columns,
               const Accumulator<P>* weight, P* panel);
  void (*pack_patches)(const Patches&, int64_t group, int64_t first, int64_t rows, int64_t column, int64_t columns,
                       const Accumulator<P>* weight, P* panel);
  void (*multiply)(const P* a, const P* b, int64_t depth, Accumulator<P> alpha, Accumulator<P>* c, int64_t row_stride,
                   int64_t column_stride, int64_t rows, int64_t columns);
};

}  // namespace
}  // namespace statsmerge

#define STATSMERGE_KERNELS "cpu/kernels/product.inl"
#include "cpu/simd/every_target.h"

namespace statsmerge {
namespace {

// Packed rows multiplied at a time: a panel of them stays in near caches. Pairs are added with a rounding of the
// processor's own, which shows in longer sums.
template <class P>
constexpr int64_t kDepth = std::is_same_v<P, bf16_pair> ? 128 : 256;
constexpr int64_t kPackedBytes = 6 << 20;  // packed at a time, to stay in the last-level cache
constexpr int64_t kFewTasks = 16;          // fewer than this leave threads idle: rows are divided instead
constexpr int64_t kSliceRows = 1024;       // the least rows of a slice
constexpr int64_t kSlices = 16;            // the most slices

// The operands of a product, as they are packed.
struct PatchesOfGroup {
  const Patches& patches;
  int64_t group, rows, columns;
};

template <class P>
void pack(const ProductKernels<P>& kernels, const MatrixView& m, int64_t first, int64_t rows, int64_t column,
          int64_t columns, const Accumulator<P>* weight, P* panel) {
  kernels.pack(m, first, rows, column, columns, weight, panel);
}

template <class P>
void pack(const ProductKernels<P>& kernels, const PatchesOfGroup& m, int64_t first, int64_t rows, int64_t column,
          int64_t columns, const Accumulator<P>* weight, P* panel) {
  kernels.pack_patches(m.patches, m.group, first, rows, column, columns, weight, panel);
}

template <class Acc>
bool only_zeros_and_ones(const Acc* weight, int64_t count) {
  return std::all_of(weight, weight + count, [](Acc w) { return w == 0 || w == 1; });
}

template <class P, class Operand>
class Product {
 public:
  using Acc = Accumulator<P>;

  Product(Acc alpha, const Operand& a, const Operand& b, const Acc* weight, bool lower)
      : kernels_(STATSMERGE_ACTIVE(kProduct<P>)), alpha_(alpha), a_(a), b_(b), weight_(weight), lower_(lower) {
    // Both sides of a symmetric product are one packed copy, if its weights may be applied twice.
    one_copy_ = lower && (!weight || only_zeros_and_ones(weight, a.rows));
    row_panels_ = divide_up(a.columns, kernels_.panel);
    column_panels_ = divide_up(b.columns, kernels_.panel);
    block_ = std::clamp<int64_t>(std::min(row_panels_, column_panels_) / 8, 1, 4);
    for (int64_t i = 0; i < row_panels_; i += block_) {
      for (int64_t j = 0; j < (lower ? i + 1 : column_panels_); j += block_) blocks_.push_back({i, j});
    }
  }

  // c += the product.
  void accumulate(Acc* c, int64_t row_stride, int64_t column_stride) const {
    const int64_t slices = std::min(a_.rows / kSliceRows, kSlices);
    if (static_cast<int64_t>(blocks_.size()) >= kFewTasks || slices < 2) {
      return accumulate_rows(0, a_.rows, c, row_stride, column_stride);
    }
    // A small c of many rows: slices of rows side by side, each with a c of its own, added up in order.
    const int64_t size = a_.columns * b_.columns;
    std::vector<Acc> sums(static_cast<size_t>(slices * size));
    parallel_tasks(slices, [&](int64_t s) {
      accumulate_rows(s * a_.rows / slices, (s + 1) * a_.rows / slices, sums.data() + s * size, b_.columns, 1);
    });
    for (int64_t s = 0; s < slices; ++s) {
      for (int64_t i = 0; i < a_.columns; ++i) {
        for (int64_t j = 0; j < (lower_ ? i + 1 : b_.columns); ++j) {
          c[i * row_stride + j * column_stride] += sums[static_cast<size_t>(s * size + i * b_.columns + j)];
        }
      }
    }
  }

 private:
  struct Block {  // a square block of c, in panels
    int64_t row, column;
  };

  // c += the product over rows [first, last).
  void accumulate_rows(int64_t first, int64_t last, Acc* c, int64_t row_stride, int64_t column_stride) const {
    constexpr int64_t step = kRowsOf<P>;
    const int64_t panels = one_copy_ ? row_panels_ : row_panels_ + column_panels_;
    const int64_t row_bytes = panels * kernels_.panel * static_cast<int64_t>(sizeof(P));
    const int64_t chunk = std::min(std::max(kPackedBytes / row_bytes / kDepth<P>, int64_t{1}) * kDepth<P>,
                                   divide_up(last - first, step));
    const auto packed = aligned_array<P>(panels * chunk * kernels_.panel);
    const auto panel = [&](int64_t index, int64_t row) { return packed.get() + (index * chunk + row) * kernels_.panel; };
    const int64_t right = one_copy_ ? 0 : row_panels_;  // the first panel of b
    for (; first < last; first += chunk * step) {
      const int64_t left_over = last - first, rows = std::min(chunk, divide_up(left_over, step));
      parallel_tasks(panels * divide_up(rows, kDepth<P>), [&](int64_t task) {
        const int64_t index = task % panels, row = task / panels * kDepth<P>;
        const bool left = index < row_panels_;
        const Operand& m = left ? a_ : b_;
        const int64_t column = (left ? index : index - row_panels_) * kernels_.panel;
        pack(kernels_, m, first + row * step, std::min(kDepth<P> * step, left_over - row * step), column,
             std::min(kernels_.panel, m.columns - column), left ? weight_ : nullptr, panel(index, row));
      });
      parallel_tasks(static_cast<int64_t>(blocks_.size()), [&](int64_t task) {
        const Block block = blocks_[static_cast<size_t>(task)];
        const int64_t row_end = std::min(block.row + block_, row_panels_);
        const int64_t column_end = std::min(block.column + block_, column_panels_);
        for (int64_t row = 0; row < rows; row += kDepth<P>) {
          const int64_t depth = std::min(kDepth<P>, rows - row);
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

  const ProductKernels<P>& kernels_;
  Acc alpha_;
  const Operand &a_, &b_;
  const Acc* weight_;
  bool lower_, one_copy_;
  int64_t row_panels_, column_panels_, block_;
  std::vector<Block> blocks_;
};

}  // namespace

template <class Acc>
void accumulate_product(Acc alpha, const MatrixView& a, const MatrixView& b, const Acc* weight, Acc* c,
                        int64_t c_row_stride, int64_t c_column_stride, bool lower) {
  if (a.rows == 0 || a.columns == 0 || b.columns == 0) return;
  if constexpr (std::is_same_v<Acc, float>) {
    const bool pairs = STATSMERGE_ACTIVE(kProduct<bf16_pair>).multiply && a.storage == Storage::bf16 &&
                       b.storage == Storage::bf16 && (!weight || only_zeros_and_ones(weight, a.rows));
    if (pairs) {
      return Product<bf16_pair, MatrixView>(alpha, a, b, weight, lower).accumulate(c, c_row_stride, c_column_stride);
    }
  }
  Product<Acc, MatrixView>(alpha, a, b, weight, lower).accumulate(c, c_row_stride, c_column_stride);
}

template <class Acc>
void accumulate_patches_product(const Patches& a, const Patches& b, int64_t group, const Acc* weight, Acc* c,
                                int64_t c_row_stride, int64_t c_column_stride, bool lower) {
  const PatchesOfGroup x{a, group, a.rows(), a.columns()}, y{b, group, b.rows(), b.columns()};
  if (x.rows == 0 || x.columns == 0 || y.columns == 0) return;
  Product<Acc, PatchesOfGroup>(1, x, y, weight, lower).accumulate(c, c_row_stride, c_column_stride);
}

#define STATSMERGE_INSTANTIATE(Acc)                                                                           \
  template void accumulate_product(Acc, const MatrixView&, const MatrixView&, const Acc*, Acc*, int64_t, int64_t, bool); \
  template void accumulate_patches_product(const Patches&, const Patches&, int64_t, const Acc*, Acc*, int64_t, \
                                           int64_t, bool);
STATSMERGE_INSTANTIATE(float)
STATSMERGE_INSTANTIATE(double)
#undef STATSMERGE_INSTANTIATE

}  // namespace statsmerge
