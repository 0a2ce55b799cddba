#include "cpu/kernels/vector_ops.h"

namespace statsmerge {
namespace {

struct VectorOps {
  double (*dot)(const double*, const double*, int64_t);
  void (*axpy)(double, const double*, double*, int64_t);
  void (*multiply)(double, double*, int64_t);
  void (*rotate)(double*, double*, double, double, int64_t);
};

}  // namespace
}  // namespace statsmerge

#define STATSMERGE_KERNELS "cpu/kernels/vector_ops.inl"
#include "cpu/simd/every_target.h"

namespace statsmerge {

double dot(const double* x, const double* y, int64_t n) { return STATSMERGE_ACTIVE(kVectorOps).dot(x, y, n); }

void axpy(double factor, const double* x, double* y, int64_t n) {
  STATSMERGE_ACTIVE(kVectorOps).axpy(factor, x, y, n);
}

void multiply(double factor, double* x, int64_t n) { STATSMERGE_ACTIVE(kVectorOps).multiply(factor, x, n); }

void rotate(double* x, double* y, double c, double s, int64_t n) {
  STATSMERGE_ACTIVE(kVectorOps).rotate(x, y, c, s, n);
}

}  // namespace statsmerge
