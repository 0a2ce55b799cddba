// Cholesky factorisations and triangular solves in double precision, without torch.
#pragma once

#include <cstdint>
#include <vector>

namespace statsmerge {

// A square matrix in memory, its rows `stride` apart.
struct SquareView {
  double* data;
  int64_t n, stride;
  double* row(int64_t i) const { return data + i * stride; }
};

// The upper triangle of a symmetric C becomes U with C = UᵀU. False where C is not positive definite to working
// precision, or a pivot, the square of U's diagonal entry, is not above `least`; a leading block of that kind is noticed
// without work on what follows it. What is below the diagonal may be overwritten.
bool cholesky(const SquareView& c, double least = 0);

// Completes U by its transpose below the diagonal, as cholesky_solve wants it.
void mirror_upper(const SquareView& u);

// x [n, columns] <- C⁻¹ x, row after row `stride` apart, given U and its transpose. On the calling thread alone.
void cholesky_solve(const SquareView& u, double* x, int64_t stride, int64_t columns);

// Cholesky factorisation with complete pivoting of a symmetric positive semidefinite C, of which the upper triangle is
// given: C ≈ LLᵀ, rows and columns in the order of `order`, with L in the first `rank` columns and zeros above its
// diagonal. It ends where no diagonal entry of what is left exceeds `tolerance`, or with rank = `most`.
int64_t pivoted_cholesky(const SquareView& c, double tolerance, int64_t most, std::vector<int64_t>& order);

}  // namespace statsmerge
