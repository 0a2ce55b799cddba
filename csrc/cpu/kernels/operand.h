// The matrices of topk_svd and weight_statistics: a matrix in its own element type, possibly minus another one, and its
// products with vectors. It is cut into parts by its shape alone, so results don't depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>

#include "cpu/kernels/block_products.h"

namespace statsmerge {

// Padded rows of doubles (block_products.h), rounded up to whole blocks of them.
class Rows {
 public:
  Rows() = default;
  Rows(int64_t count, int64_t length)
      : length(length),
        stride(padded(length)),
        values_(static_cast<size_t>((count + kBlock - 1) / kBlock * kBlock * stride), 0.0) {}
  double* operator[](int64_t i) { return values_.data() + i * stride; }
  const double* operator[](int64_t i) const { return values_.data() + i * stride; }

  int64_t length = 0, stride = 0;

 private:
  AlignedVector<double> values_;
};

// Rows of contiguous elements.
struct Operand {
  int64_t rows, columns;
  const char* data;
  Storage storage;
  int64_t row_stride;           // in elements
  const char* minus = nullptr;  // subtracted where it is given
  Storage minus_storage = Storage::f32;
  int64_t minus_stride = 0;
  double scale = 1;  // a power of two that the values are multiplied by

  bool is_double() const { return storage == Storage::f64 || (minus && minus_storage == Storage::f64); }
};

// Forms the differences in `out`, a matrix of float, and has the operand refer to it. For an operand with something to
// subtract that is not float64.
void form_difference(Operand& a, AlignedVector<float>& out);

struct NotFinite {};

// Reads everything once. Throws NotFinite where a value isn't, and chooses a scale that brings extreme values within
// range of their squares.
void inspect(Operand& a);

// Calls f(r, row r as doubles, scaled) for the rows from first to last − 1.
void read_rows(const Operand& a, int64_t first, int64_t last, const std::function<void(int64_t, const double*)>& f);

// Sums over all elements, scaled: of their deviations from an origin near the mean (and equal to all of them where they
// are equal), of the deviations' squares and of the elements' squares.
struct Moments {
  double scale = 1, count = 0, origin = 0, deviations = 0, squares = 0, norms = 0;

  double mean() const { return (origin + deviations / count) / scale; }
  double variance() const {  // biased
    const double shift = deviations / count;
    return std::max(0.0, squares / count - shift * shift) / scale / scale;
  }
  double norm() const { return std::sqrt(norms) / scale; }
};
Moments moments(const Operand& a);

// Products with blocks of vectors, computed in Real: float (not for float64 operands) or double.
template <class Real>
class Products {
 public:
  explicit Products(const Operand& a) : a_(a) {}

  // w[c] = Aᵀ(A v[c]) for `count` padded vectors: one pass over A. Takes the moments along where they
  // are asked for.
  void normal(const double* v, int64_t count, Rows& w, Moments* moments = nullptr);

 private:
  const Operand& a_;
  AlignedVector<Real> buffer_;
};

// y[c] = A v[c] for all vectors of v: one pass over A.
Rows product(const Operand& a, const Rows& v, int64_t count);

}  // namespace statsmerge
