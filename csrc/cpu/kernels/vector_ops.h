// Double-precision vector operations that the kernels share.
#pragma once

#include <cstdint>

namespace statsmerge {

double dot(const double* x, const double* y, int64_t n);
void axpy(double factor, const double* x, double* y, int64_t n);  // y += factor · x
void multiply(double factor, double* x, int64_t n);               // x *= factor
void rotate(double* x, double* y, double c, double s, int64_t n);  // (x, y) <- (c x − s y, s x + c y)

}  // namespace statsmerge
