// Sums over a warp, in a fixed order and the same in every lane.
#pragma once

namespace statsmerge::cuda {

__device__ inline double warp_sum(double x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

}  // namespace statsmerge::cuda
