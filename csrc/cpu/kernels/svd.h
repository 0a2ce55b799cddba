// The two decompositions behind topk_svd and weight_statistics.
#pragma once

#include "cpu/kernels/operand.h"

namespace statsmerge {

struct Svd {
  std::vector<double> s, bound;  // [k] singular values, largest first, and how far each may be from a true one
  Rows u, v;                     // [k] left and right vectors, if asked for
  int64_t passes = 0;            // how often the matrix was read
};

struct SvdSettings {
  int64_t k;           // between 1 and the matrix's smaller dimension
  double tol;          // relative accuracy of the singular values
  int64_t max_passes;  // after which they are returned as they are
  bool vectors;
  uint64_t seed;
};

// Both throw NotFinite where a value of the matrix isn't, and give its moments too if a place for them is given.

// All singular values of a thin matrix, of which k are returned: exact in double.
Svd dense_svd(Operand a, const SvdSettings& settings, Moments* moments = nullptr);

// The k leading singular values to the accuracy asked for.
Svd lanczos_svd(Operand a, const SvdSettings& settings, Moments* moments = nullptr);

}  // namespace statsmerge
