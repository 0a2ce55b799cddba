// The matrices of topk_svd and weight_statistics: a matrix in its own element type, possibly minus another one, and its
// products with vectors. It is cut into parts by its shape alone, so results don't depend on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "common/tensors.h"

namespace statsmerge {

constexpr int64_t kShared = 1 << 18;  // elements from which on the threads share one matrix

// Rows of doubles.
struct Rows {
  Rows() = default;
  Rows(int64_t count, int64_t length) : length(length), values(static_cast<size_t>(count * length), 0.0) {}
  double* operator[](int64_t i) { return values.data() + i * length; }
  const double* operator[](int64_t i) const { return values.data() + i * length; }

  int64_t length = 0;
  std::vector<double> values;
};

// Rows run along the contiguous dimension: a column-major tensor is seen as its transpose.
class Operand {
 public:
  Operand(const Tensor& mat, const Tensor* minus);

  bool transposed() const { return transposed_; }

  // Reads everything once. Throws where a value is not finite, naming matrix `index`, and brings extreme float64 values
  // within range of their squares.
  void inspect(int64_t index);

  // What values are multiplied by as they are loaded.
  double scale() const { return scale_; }

  void load_row(int64_t row, double* out) const;

  // Calls f(part, first row, last row) for every part of the rows, in parallel.
  template <class F>
  void for_parts(const F& f) const {
    parallel_for(0, parts(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) f(p, p * rows / parts(), (p + 1) * rows / parts());
    });
  }
  int64_t parts() const { return std::clamp<int64_t>(rows * columns / kShared, 1, std::min<int64_t>(16, rows)); }

  int64_t rows, columns;

 private:
  bool transposed_;
  Tensor mat_;
  std::optional<Tensor> minus_;
  Storage storage_, minus_storage_ = Storage::f32;
  int64_t row_stride_, minus_stride_;
  double scale_ = 1;
};

// w[c] = Aᵀ(A v[c]) for `count` vectors: one pass over A.
void normal_product(const Operand& a, const double* v, int64_t count, double* w);

// y[c] = A v[c] for `count` vectors: one pass over A.
Rows product(const Operand& a, const Rows& v, int64_t count);

}  // namespace statsmerge
