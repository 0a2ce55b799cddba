// Thread blocks and warps as the kernels of topk_svd see them: phases that all threads run side by side, each closed by
// a barrier, and sums in a fixed order. Nothing lives in a thread from one phase to the next, so a host can run the
// same phases thread by thread: that is how the kernels are tested without a device.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/host_device.h"

namespace statsmerge::cuda::svd {

constexpr int kWarp = 32;

struct Warp {
  // out[i] = Σ over the lanes of what f(lane, share) adds to share[i]; every lane gets the sums.
  template <int N, class F>
  STATSMERGE_HD void sums(double (&out)[N], const F& f) const {
#ifdef __CUDA_ARCH__
    for (double& x : out) x = 0;
    f(static_cast<int>(threadIdx.x % kWarp), out);
    for (double& x : out) {
      for (int half = kWarp / 2; half > 0; half /= 2) x += __shfl_xor_sync(0xffffffffu, x, half);
    }
#else
    double lanes[kWarp][N] = {};
    for (int lane = 0; lane < kWarp; ++lane) f(lane, lanes[lane]);
    for (int half = kWarp / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) {
        for (int i = 0; i < N; ++i) lanes[lane][i] += lanes[lane + half][i];
      }
    }
    for (int i = 0; i < N; ++i) out[i] = lanes[0][i];
#endif
  }

  // f(lane, share) fills share[32]; g(lane, Σ over the lanes of share[lane]) is called once a lane. 31 exchanges in
  // all: at every step a lane hands over the half of its sums that the other one of its pair will keep.
  template <class Acc, class F, class G>
  STATSMERGE_HD void sum_each(const F& f, const G& g) const {
#ifdef __CUDA_ARCH__
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    Acc share[kWarp] = {};
    f(lane, share);
    fold<kWarp / 2>(lane, share);
    g(lane, share[0]);
#else
    Acc share[kWarp][kWarp] = {};
    for (int lane = 0; lane < kWarp; ++lane) f(lane, share[lane]);
    for (int half = kWarp / 2; half > 0; half /= 2) {
      Acc next[kWarp][kWarp] = {};
      for (int lane = 0; lane < kWarp; ++lane) {
        const int kept = (lane & half) != 0 ? half : 0;
        for (int i = 0; i < half; ++i) next[lane][i] = share[lane][i + kept] + share[lane ^ half][i + kept];
      }
      for (int lane = 0; lane < kWarp; ++lane) {
        for (int i = 0; i < half; ++i) share[lane][i] = next[lane][i];
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) g(lane, share[lane][0]);
#endif
  }

#ifdef __CUDACC__
  // share[0] = Σ over the lanes of share[i], i < 2 half, where i is made of the lane's lowest bits.
  template <int half, class Acc>
  __device__ static void fold(int lane, Acc (&share)[kWarp]) {
    const bool upper = (lane & half) != 0;
    STATSMERGE_UNROLL
    for (int i = 0; i < half; ++i) {
      const Acc send = upper ? share[i] : share[i + half];
      const Acc keep = upper ? share[i + half] : share[i];
      share[i] = keep + __shfl_xor_sync(0xffffffffu, send, half);
    }
    if constexpr (half > 1) fold<half / 2>(lane, share);
  }
#endif

  // Calls f(i) for i < count, spread over the lanes, and makes what they wrote visible to the warp.
  template <class F>
  STATSMERGE_HD void each(int count, const F& f) const {
#ifdef __CUDA_ARCH__
    for (int i = threadIdx.x % kWarp; i < count; i += kWarp) f(i);
    __syncwarp();
#else
    for (int i = 0; i < count; ++i) f(i);
#endif
  }
};

// All threads of a block call these together. Blocks are whole warps.
struct Block {
  // Calls f(i) for i < count, spread over the threads.
  template <class F>
  STATSMERGE_HD void each(int64_t count, const F& f) const {
#ifdef __CUDA_ARCH__
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) f(i);
    __syncthreads();
#else
    for (int64_t i = 0; i < count; ++i) f(i);
#endif
  }

  // Calls f(i, warp) for i < count, one warp each.
  template <class F>
  STATSMERGE_HD void each_warp(int count, const F& f) const {
#ifdef __CUDA_ARCH__
    for (int i = threadIdx.x / kWarp; i < count; i += blockDim.x / kWarp) f(i, Warp());
    __syncthreads();
#else
    for (int i = 0; i < count; ++i) f(i, Warp());
#endif
  }
};

}  // namespace statsmerge::cuda::svd
