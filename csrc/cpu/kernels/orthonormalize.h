// Orthonormal bases in double precision, and the random directions they start from.
#pragma once

#include "cpu/kernels/operand.h"

namespace statsmerge {

// Reproducible random numbers in [-1, 1) (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  double operator()() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return static_cast<double>(static_cast<int64_t>(z ^ (z >> 31))) * 0x1p-63;
  }

 private:
  uint64_t state_;
};

// Makes a block of kBlock vectors orthogonal to the first `count` rows of `basis`; what vector c had along row i is
// added to components[i * kBlock + c].
void project_out(const Rows& basis, int64_t count, double* block, double* components);

// Makes x orthogonal to the first `count` rows of `basis`, the first `clean` of which it is orthogonal to already, and
// of unit length; returns its length before that. Where nothing is left of x (length at most `negligible`), a random
// direction takes its place and 0 is returned. `count` must be smaller than the length of x. The components found along
// the basis are added to `components` if that is given.
double orthonormalize(const Rows& basis, int64_t clean, int64_t count, double negligible, Random& random, double* x,
                      double* components = nullptr);

}  // namespace statsmerge
