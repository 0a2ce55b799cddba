// Eigendecomposition of small symmetric matrices in double precision, without torch.
#pragma once

#include <cstdint>
#include <vector>

namespace statsmerge {

// Eigenvalues in descending order; row i of `vectors` (n × n, row-major) is the unit eigenvector of values[i].
struct Eigen {
  std::vector<double> values;
  std::vector<double> vectors;
};

// `a` is n × n, row-major and symmetric; both triangles are read. Throws std::runtime_error if it does not converge,
// which only happens when an entry is not finite.
Eigen symmetric_eigen(std::vector<double> a, int64_t n);

}  // namespace statsmerge
