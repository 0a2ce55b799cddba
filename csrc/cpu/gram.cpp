// gram_accumulate_ on the CPU. Features are widened to the Gram's type and weighted tile by tile, never as a whole.
// Large Grams take panels of columns through aten's matrix product, each from its diagonal down: half the work of xᵀ x.
// Small ones, as of the groups of a depthwise convolution, are batched over the processor's threads by a kernel of
// their own.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "common/tensors.h"

namespace statsmerge {
namespace {

constexpr int64_t kTile = 4096;  // rows of features widened at a time
constexpr int64_t kPanel = 128;  // columns of a large Gram per product
constexpr int64_t kSmall = 32;   // Grams up to this size take the small kernel
constexpr int64_t kBlock = 256;  // rows the small kernel transposes at a time

template <class Acc, class T>
STATSMERGE_CLONES void widen_row(const T* x, int64_t stride, double factor, Acc* out, int64_t n) {
  if (stride == 1) {
    for (int64_t j = 0; j < n; ++j) out[j] = static_cast<Acc>(factor) * static_cast<Acc>(widen(x[j]));
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = static_cast<Acc>(factor) * static_cast<Acc>(widen(x[j * stride]));
  }
}

// A matrix of any strides and element type.
struct Matrix {
  Matrix(const Tensor& x, const char* name)
      : data(bytes(x)),
        storage(storage_of(x, name)),
        row_stride(x.stride(0)),
        column_stride(x.stride(1)),
        columns(x.sizes()[1]) {}

  // Rows [first, first + n) times their weights (null: ones) as a dense tile.
  template <class Acc>
  void load(int64_t first, int64_t n, const Acc* weight, Acc* out) const {
    dispatch_storage(storage, [&](auto* type) {
      const auto* start = reinterpret_cast<decltype(type)>(data) + first * row_stride;
      if (!weight && column_stride == 1 && row_stride == columns)
        return widen_row<Acc>(start, 1, 1.0, out, n * columns);
      for (int64_t i = 0; i < n; ++i) {
        const auto* row = start + i * row_stride;
        widen_row<Acc>(row, column_stride, weight ? static_cast<double>(weight[first + i]) : 1.0, out + i * columns,
                       columns);
      }
    });
  }

  const char* data;
  Storage storage;
  int64_t row_stride, column_stride, columns;
};

template <class Acc>
STATSMERGE_CLONES Acc dot(const Acc* x, const Acc* y, int64_t n) {
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// gram (lower triangle, or all of it for a second operand) += Σ rows, for matrices of at most kSmall columns. A block
// of rows is transposed, so that every entry is a dot product over the block.
template <class Acc>
void accumulate_small(const Matrix& x, const Matrix* other, const Acc* weight, int64_t rows, Acc* gram,
                      int64_t gram_row, int64_t gram_column) {
  Acc tile[kBlock * kSmall], left[kSmall * kBlock], right[kSmall * kBlock];
  const auto transposed = [&](const Matrix& m, int64_t first, int64_t n, const Acc* w, Acc* out) {
    m.load<Acc>(first, n, nullptr, tile);
    for (int64_t i = 0; i < n; ++i) {
      const Acc factor = w ? w[first + i] : Acc{1};
      for (int64_t j = 0; j < m.columns; ++j) out[j * kBlock + i] = factor * tile[i * m.columns + j];
    }
  };
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int64_t n = std::min(kBlock, rows - first);
    transposed(x, first, n, weight, left);
    transposed(other ? *other : x, first, n, nullptr, right);
    for (int64_t i = 0; i < x.columns; ++i) {
      const int64_t end = other ? other->columns : i + 1;
      for (int64_t j = 0; j < end; ++j) {
        gram[i * gram_row + j * gram_column] += dot(left + i * kBlock, right + j * kBlock, n);
      }
    }
  }
}

// out = out + a · b in place, for matrices of any strides.
void addmm_(Tensor& out, const Tensor& a, const Tensor& b) {
  const auto error = aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0);
  if (error != TORCH_SUCCESS) throw std::runtime_error("aten::addmm failed");
}

// The same for matrices of any size: x [rows, in], other [rows, in2]; `gram` is one matrix.
template <class Acc>
void accumulate_large(Tensor gram, const Tensor& x, const Tensor* other, const Acc* weight) {
  const int64_t rows = x.sizes()[0], columns = x.sizes()[1];
  // Rows [first, first + n) of m, times their weights if w is given: m itself where it has the Gram's type already.
  const auto tile_of = [&](const Tensor& m, int64_t first, int64_t n, const Acc* w) {
    Tensor rows_of_m = slice(m, 0, first, n);
    if (m.scalar_type() == gram.scalar_type() && !w) return rows_of_m;
    Tensor tile = new_empty(gram, {n, m.sizes()[1]}, gram.scalar_type());
    const Matrix matrix(rows_of_m, "x");
    parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
      matrix.load<Acc>(begin, end - begin, w ? w + first : nullptr,
                       static_cast<Acc*>(tile.mutable_data_ptr()) + begin * matrix.columns);
    });
    return tile;
  };
  for (int64_t first = 0; first < rows; first += kTile) {
    const int64_t n = std::min(kTile, rows - first);
    Tensor right = tile_of(other ? *other : x, first, n, nullptr);
    Tensor left = aten::transpose(other || weight ? tile_of(x, first, n, weight) : right);
    if (other) {
      addmm_(gram, left, right);
      continue;
    }
    for (int64_t c = 0; c < columns; c += kPanel) {
      const int64_t width = std::min(kPanel, columns - c);
      Tensor below = slice(gram, 0, c, columns - c);
      Tensor panel = slice(below, 1, c, width);
      addmm_(panel, slice(left, 0, c, columns - c), slice(right, 1, c, width));
    }
  }
}

Tensor matrix_of(const Tensor& batch, int64_t index) {
  return call_aten<1>("aten::select", "int", batch, int64_t{0}, index)[0];
}

template <class Acc>
void accumulate(const Tensor& gram, const Tensor& x, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& other) {
  const int64_t batches = x.sizes()[0], rows = x.sizes()[1], columns = x.sizes()[2];
  std::optional<Tensor> w;
  if (weight) w = dense(to_dtype(*weight, gram.scalar_type()));
  const auto weight_of = [&](int64_t b) {
    return w ? reinterpret_cast<const Acc*>(bytes(*w)) + b * rows : static_cast<const Acc*>(nullptr);
  };
  const bool small = columns <= kSmall && (!other || other->sizes()[2] <= kSmall);
  const auto one = [&](int64_t b) {
    Tensor matrix = matrix_of(gram, b);
    const Tensor features = matrix_of(x, b);
    std::optional<Tensor> second;
    if (other) second = matrix_of(*other, b);
    if (small) {
      std::optional<Matrix> right;
      if (second) right.emplace(*second, "other");
      accumulate_small<Acc>(Matrix(features, "x"), right ? &*right : nullptr, weight_of(b), rows,
                            static_cast<Acc*>(matrix.mutable_data_ptr()), matrix.stride(0), matrix.stride(1));
    } else {
      accumulate_large<Acc>(matrix, features, second ? &*second : nullptr, weight_of(b));
    }
  };
  if (small) {
    parallel_for(0, batches, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) one(b);
    });
  } else {
    for (int64_t b = 0; b < batches; ++b) one(b);
  }
}

// gram [B, in, in2], x [B, n, in], weight [B, n], other [B, n, in2]; shapes are checked by the Python wrapper.
void gram_accumulate_(Tensor gram, Tensor x, std::optional<Tensor> weight, std::optional<Tensor> other) {
  if (x.numel() == 0 || gram.numel() == 0) return;
  if (gram.scalar_type() == ScalarType::Double) {
    accumulate<double>(gram, x, weight, other);
  } else {
    accumulate<float>(gram, x, weight, other);
  }
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CPU, m) { m.impl("gram_accumulate_", TORCH_BOX(&statsmerge::gram_accumulate_)); }
