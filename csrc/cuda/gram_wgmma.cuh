// The tile kernel for Hopper (sm_90a): wgmma on operands that the tensor copy engine brings ahead of time. One thread
// block a multiprocessor, which takes unit after unit. Its first warpgroup keeps kStages steps of operands under way;
// the other two compute the upper and the lower 64 rows of a 128-row tile. Both operands are read with their columns
// contiguous, as x has them (wgmma's transposed form, which exists for 16-bit types only: hence three bfloat16 parts
// rather than TF32 for float operands).
//
// One part: tiles of 128 × 256, all sums in the tensor cores' accumulators, as cuBLAS has them. Three parts: tiles of
// 128 × 128; a step's six products are summed in fresh accumulators, which are then added to the sums in ordinary float
// additions, since tensor cores round towards zero and thousands of steps of that would exceed float's accuracy.
//
// Floor on an H200 (790 TFLOP/s in bf16, 4.3 TB/s), 32768 tokens in bf16; `torch.mm` does twice the triangle's work:
//   in 4096: 272 tiles of the triangle, 0.58 TFLOP, 0.74 ms, on 132 multiprocessors 2.06 rounds: two rounds of whole
//            tiles, then 8 tiles of 16 parts; 0.27 GB of x from memory at least, 2.0 GB with the tiles' re-reading
//            (0.5 ms, overlapped). Expected at 88 % of cuBLAS's rate: 0.87 ms against 1.39 ms, 1.6 times as fast.
//   in 8192: 1056 tiles, 8 rounds, 2.27 TFLOP, 2.87 ms; expected 3.25 ms against 5.57 ms, 1.7 times as fast.
// float, in 4096, 32768 tokens: 528 tiles, six products, 3.4 TFLOP, 4.3 ms; expected 5.5 ms, and some 22 ms for a
// float product (50 TFLOP/s): 4 times as fast.
#pragma once

#include <cuda.h>

#include "cuda/gram_tile.cuh"

namespace statsmerge::cuda::gram {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes the phase wait for that many bytes to be copied too.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of that parity is complete.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.b32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// Copies a panel: 64 columns of kTokens tokens of one part; what lies outside of the matrix becomes zero.
__device__ __forceinline__ void copy_panel(const CUtensorMap& map, uint32_t to, uint32_t barrier, int column, int token,
                                           int part) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(token), "r"(part), "r"(barrier)
      : "memory");
}

#define STATSMERGE_SUMS16(i)                                                                                           \
  "+f"(sum[i + 0]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]),                                              \
  "+f"(sum[i + 4]), "+f"(sum[i + 5]), "+f"(sum[i + 6]), "+f"(sum[i + 7]),                                              \
  "+f"(sum[i + 8]), "+f"(sum[i + 9]), "+f"(sum[i + 10]), "+f"(sum[i + 11]),                                            \
  "+f"(sum[i + 12]), "+f"(sum[i + 13]), "+f"(sum[i + 14]), "+f"(sum[i + 15])

#define STATSMERGE_WGMMA_N128(TYPE)                                                                                    \
  asm volatile(                                                                                                        \
      "{\n"                                                                                                            \
      ".reg .pred p;\n"                                                                                                \
      "setp.ne.b32 p, %66, 0;\n"                                                                                       \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"                                                \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                         \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                               \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                               \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                                 \
      "}, %64, %65, p, 1, 1, 1, 1;\n"                                                                                  \
      "}\n"                                                                                                            \
      : STATSMERGE_SUMS16(0), STATSMERGE_SUMS16(16), STATSMERGE_SUMS16(32), STATSMERGE_SUMS16(48)                      \
      : "l"(left), "l"(right), "r"(accumulate))

#define STATSMERGE_WGMMA_N256(TYPE)                                                                                    \
  asm volatile(                                                                                                        \
      "{\n"                                                                                                            \
      ".reg .pred p;\n"                                                                                                \
      "setp.ne.b32 p, %130, 0;\n"                                                                                      \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {"                                                \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                         \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                               \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                               \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                               \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                               \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                               \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                   \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"                 \
      "}, %128, %129, p, 1, 1, 1, 1;\n"                                                                                \
      "}\n"                                                                                                            \
      : STATSMERGE_SUMS16(0), STATSMERGE_SUMS16(16), STATSMERGE_SUMS16(32), STATSMERGE_SUMS16(48),                     \
        STATSMERGE_SUMS16(64), STATSMERGE_SUMS16(80), STATSMERGE_SUMS16(96), STATSMERGE_SUMS16(112)                    \
      : "l"(left), "l"(right), "r"(accumulate))

// sum (64 × kWidth, over a warpgroup) = leftᵀ right over 16 tokens, plus sum if `accumulate`.
template <int kWidth, bool kHalf>
__device__ __forceinline__ void wgmma(float (&sum)[kWidth / 2], uint64_t left, uint64_t right, int accumulate) {
  if constexpr (kWidth == 256 && kHalf) {
    STATSMERGE_WGMMA_N256("f16");
  } else if constexpr (kWidth == 256) {
    STATSMERGE_WGMMA_N256("bf16");
  } else {
    static_assert(kWidth == 128 && !kHalf);
    STATSMERGE_WGMMA_N128("bf16");
  }
}

#undef STATSMERGE_SUMS16
#undef STATSMERGE_WGMMA_N128
#undef STATSMERGE_WGMMA_N256

// Waits until all committed steps are done. The compiler does not see that wgmma writes its sums only
// now: passing them through keeps every use of them behind the wait.
template <int kSums>
__device__ __forceinline__ void wait_for_sums(float (&sum)[kSums]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (float& x : sum) asm volatile("" : "+f"(x)::"memory");
}

// The place in the ring of stages, and the parity of its barriers' current phase.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

#endif

// Without sm_90a in the list of architectures that are compiled for, the kernel is empty and must not be launched; the
// host tells by its registers.
template <int kParts, bool kHalf>
__global__ void __launch_bounds__(WgmmaTile<kParts>::kThreads, 1)
    gram_wgmma_kernel(const __grid_constant__ CUtensorMap left, const __grid_constant__ CUtensorMap right,
                      const __grid_constant__ TileProblem p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Shape = WgmmaTile<kParts>;
  constexpr int kStages = Shape::kStages;
  extern __shared__ unsigned char shared[];
  __shared__ uint64_t barriers[2 * kStages];
  const uint32_t base = (static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + kAtomBytes - 1) & ~(kAtomBytes - 1u);
  const uint32_t full = static_cast<uint32_t>(__cvta_generic_to_shared(barriers)), empty = full + 8 * kStages;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full + 8 * stage, 1);   // the copying thread
      barrier_init(empty + 8 * stage, 8);  // the computing warps
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int steps = p.step_count();
  Ring ring;

  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      for (int index = blockIdx.x; index < p.schedule.units(); index += gridDim.x) {
        const Unit unit = p.schedule.unit(index, steps);
        const bool shares = p.one_operand && p.schedule.triangle.on_diagonal(unit.tile);
        const int row0 = unit.tile.row * kTileRows, column0 = unit.tile.column * Shape::kWidth;
        for (int i = unit.first; i < unit.last; ++i, ring.advance(kStages)) {
          const int token = p.step(i) * Shape::kTokens;
          const uint32_t barrier = full + 8 * ring.stage, left_at = base + ring.stage * Shape::kStageBytes;
          const uint32_t right_at = left_at + Shape::kLeftBytes;
          barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
          barrier_expect(barrier, Shape::kStageBytes - (shares ? Shape::kLeftBytes : 0));
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
#pragma unroll
            for (int panel = 0; panel < Shape::kRightPanels; ++panel) {
              copy_panel(right, right_at + (part * Shape::kRightPanels + panel) * Shape::kPanelBytes, barrier,
                         column0 + panel * kPanelColumns, token, part);
            }
#pragma unroll
            for (int panel = 0; panel < Shape::kLeftPanels; ++panel) {
              if (shares) continue;
              copy_panel(left, left_at + (part * Shape::kLeftPanels + panel) * Shape::kPanelBytes, barrier,
                         row0 + panel * kPanelColumns, token, part);
            }
          }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int half = static_cast<int>(threadIdx.x) / 128 - 1;  // of the tile's rows
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const auto release = [&](int stage) {
      if (lane == 0) barrier_arrive(empty + 8 * stage);
    };
    for (int index = blockIdx.x; index < p.schedule.units(); index += gridDim.x) {
      const Unit unit = p.schedule.unit(index, steps);
      if (unit.slot < 0 && unit.first == unit.last) continue;
      const bool shares = p.one_operand && p.schedule.triangle.on_diagonal(unit.tile);
      const int left_start = Shape::left_start(shares, unit.tile.row, half);
      float products[Shape::kSums];                     // the accumulators
      float sums[kParts == 1 ? 1 : Shape::kSums] = {};  // what is taken over from them with three parts
#pragma unroll
      for (float& x : products) x = 0;
      for (int i = unit.first; i < unit.last; ++i) {
        const uint32_t left_at = base + ring.stage * Shape::kStageBytes + left_start;
        const uint32_t right_at = base + ring.stage * Shape::kStageBytes + Shape::kLeftBytes;
        const uint64_t left_step = wgmma_descriptor(left_at, Shape::kTokens);
        const uint64_t right_step = wgmma_descriptor(right_at, Shape::kTokens);
        barrier_wait(full + 8 * ring.stage, ring.parity);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int product = 0; product < Parts<kParts>::kProducts; ++product) {
          // A descriptor's lowest bits are the address in units of 16 bytes; no address carries into the bits above.
          const uint64_t left_part =
              left_step + Parts<kParts>::product(product).left * Shape::left_part_bytes(shares) / 16;
          const uint64_t right_part =
              right_step + Parts<kParts>::product(product).right * Shape::kRightPartBytes / 16;
#pragma unroll
          for (int k = 0; k < Shape::kTokens; k += 16) {
            const bool accumulate = kParts == 1 || product > 0 || k > 0;
            wgmma<Shape::kWidth, kHalf>(products, left_part + k * kRowBytes / 16, right_part + k * kRowBytes / 16,
                                        accumulate);
          }
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if constexpr (kParts == 1) {
          // This step's products may still be under way; those of the step before are done, and its stage is free.
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
          if (i > unit.first) release((ring.stage + kStages - 1) % kStages);
        } else {
          wait_for_sums(products);
          release(ring.stage);
#pragma unroll
          for (int e = 0; e < Shape::kSums; ++e) sums[e] += products[e];
        }
        ring.advance(kStages);
      }
      if constexpr (kParts == 1) {
        wait_for_sums(products);
        if (unit.first < unit.last) release((ring.stage + kStages - 1) % kStages);
      }
      const auto& result = [&]() -> const auto& {
        if constexpr (kParts == 1) {
          return products;
        } else {
          return sums;
        }
      }();
      constexpr int kPairs = 8;  // at a time
      const int row = 64 * half + 16 * warp + sum_row(lane);
#pragma unroll
      for (int first = 0; first < Shape::kWidth / 8; first += kPairs) {
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          store_sums<Shape::kWidth, kPairs>(p, unit, row + 8 * below, 8 * first + sum_column(lane), [&](int i) {
            return Pair{result[4 * (first + i) + 2 * below], result[4 * (first + i) + 2 * below + 1]};
          });
        }
      }
    }
  }
#endif
}

}  // namespace statsmerge::cuda::gram
