// (C + ridge·I)^† for symmetric positive semidefinite C, in double precision and without torch, with eigenvalues up to
// a relative cut-off counted as zeros.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "common/convert.h"
#include "cpu/kernels/symmetric_eigen.h"

namespace statsmerge {

// Rank and condition number (largest over smallest eigenvalue kept; 1 where none is) of what was inverted.
struct Spectrum {
  int64_t rank;
  double condition;
};

// Matrices x [n, columns] have their rows `stride` apart. What is applied may be applied on several threads at once.
class PseudoInverse {
 public:
  virtual ~PseudoInverse() = default;
  virtual void apply(double* x, int64_t stride, int64_t columns) const = 0;  // x <- C^† x
  virtual void drop(double* x, int64_t stride, int64_t columns) const = 0;   // x <- (I − C C^†) x
  Spectrum spectrum{0, 1.0};
};

// A square matrix of any element type, its rows n apart; only its lower triangle is read.
struct LowerTriangle {
  const char* data;
  Storage storage;  // f64 or f32
  int64_t n;
};

using EigenSolver = std::function<Eigen(std::vector<double> matrix, int64_t n)>;

// Eigenvalues above max(rcond, n·eps) times the largest are kept. Larger matrices for which a factorisation does not do
// are left to `eigen`, or nothing is returned where there is none. Throws std::invalid_argument, which says `name`,
// where C is not finite.
std::unique_ptr<PseudoInverse> pseudo_inverse(const LowerTriangle& c, double ridge, double rcond,
                                              const EigenSolver& eigen, const std::string& name);

}  // namespace statsmerge
