// Gram–Schmidt, twice ("twice is enough": Giraud, Langou and Rozložník 2005).
#include "cpu/orthonormalize.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels/vector_ops.h"

namespace statsmerge {

double orthonormalize(const Rows& basis, int64_t count, double negligible, Random& random, double* x,
                      double* components) {
  const int64_t n = basis.length;
  const auto project = [&] {
    for (int64_t i = 0; i < count; ++i) {
      const double along = dot(basis[i], x, n);
      axpy(-along, basis[i], x, n);
      if (components) components[i] += along;
    }
  };
  project();
  project();
  double norm = std::sqrt(dot(x, x, n));
  const double length = norm > negligible ? norm : 0;
  components = nullptr;
  while (!(norm > negligible)) {
    negligible = 1e-8;
    for (int64_t j = 0; j < n; ++j) x[j] = random();
    multiply(1 / std::sqrt(dot(x, x, n)), x, n);
    project();
    project();
    norm = std::sqrt(dot(x, x, n));
  }
  multiply(1 / norm, x, n);
  if (length == 0) {  // a random direction can lose much of its length to the basis: clean it once more
    project();
    multiply(1 / std::sqrt(dot(x, x, n)), x, n);
  }
  return length;
}

}  // namespace statsmerge
