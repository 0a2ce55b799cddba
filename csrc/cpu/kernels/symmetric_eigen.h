// Eigendecomposition of small symmetric matrices in double precision, without torch.
#pragma once

#include <cstdint>
#include <vector>

namespace statsmerge {

// Eigenvalues in descending order; row i of `vectors` (row-major) is the unit eigenvector of values[i], or its trailing
// components.
struct Eigen {
  std::vector<double> values;
  std::vector<double> vectors;
};

// `a` is n × n, row-major and symmetric; both triangles are read. Vectors are given from component `first` on: few
// components cost much less than all. Throws std::runtime_error if it does not converge, which only happens when an
// entry is not finite.
Eigen symmetric_eigen(const std::vector<double>& a, int64_t n, int64_t first = 0);

}  // namespace statsmerge
