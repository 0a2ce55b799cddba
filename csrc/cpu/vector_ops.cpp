// The shared vector operations, compiled once for every instruction set.
#include "cpu/vector_ops.h"

namespace statsmerge {

STATSMERGE_CLONES double dot(const double* x, const double* y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

STATSMERGE_CLONES void axpy(double factor, const double* x, double* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

STATSMERGE_CLONES void multiply(double factor, double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

}  // namespace statsmerge
