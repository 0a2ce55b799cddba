// The two decompositions behind topk_svd and weight_statistics.
#pragma once

#include "cpu/operand.h"

namespace statsmerge {

struct Svd {
  std::vector<double> s, bound;  // [k] singular values, largest first, and how far each may be from a true one
  Rows u, v;                     // [k] left and right vectors, if asked for
  int64_t passes = 0;
};

// All singular values of a thin matrix, of which k are returned: exact in double.
Svd dense_svd(const Operand& a, int64_t k, bool vectors, uint64_t seed);

// The k leading singular values to relative accuracy `tol`, or what `max_passes` passes over the matrix give.
Svd lanczos_svd(const Operand& a, int64_t k, double tol, int64_t max_passes, bool vectors, uint64_t seed);

}  // namespace statsmerge
