// The tile kernel for every architecture from sm_80 on: mma.sync, with the operands brought by cp.async a few steps
// ahead. A block of 8 warps computes a 128 × 128 tile, a warp 64 × 32 of it.
//
// Every step's products are summed in fresh accumulators, which are then added to the sums in ordinary float additions:
// tensor cores round their sums towards zero, and over thousands of steps that would add up.
//
// Floor for bf16, in = 4096, 32768 tokens: 0.57 TFLOP in 528 tiles; on an A100 (312 TFLOP/s) 1.8 ms, expected at two
// thirds of the rate; on an H200 mma.sync reaches about 60 % of wgmma's rate, so 0.57 / 470 = 1.2 ms.
#pragma once

#include "cuda/gram_tile.cuh"

namespace statsmerge::cuda::gram {

__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void load_transposed(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

template <bool kHalf>
__device__ __forceinline__ void mma(float (&sum)[4], const uint32_t (&left)[4], uint32_t right0, uint32_t right1) {
  if constexpr (kHalf) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right0), "r"(right1));
  }
}

// Starts copying a step of one operand, tokens and columns from the given ones on; what lies outside of the matrix
// becomes zero.
template <int kParts>
__device__ __forceinline__ void start_copy(const Operand& operand, int64_t tokens, int64_t columns, int64_t token,
                                           int64_t column, uint32_t to) {
  using Shape = MmaTile<kParts>;
#pragma unroll 2
  for (int i = threadIdx.x; i < Shape::kOperandBytes / 16; i += Shape::kThreads) {
    const Chunk c = chunk_of<kParts>(i);
    const Source from = source_of(operand, tokens, columns, c.part, token + c.token, column + c.column);
    copy_async(to + c.part * Shape::kPartBytes + operand_offset(Shape::kTokens, c.token, c.column),
               operand.data + from.at, from.bytes);
  }
}

template <int kParts, bool kHalf>
__global__ void __launch_bounds__(MmaTile<kParts>::kThreads)
    gram_mma_kernel(const __grid_constant__ Operand left, const __grid_constant__ Operand right, int64_t tokens,
                    const __grid_constant__ TileProblem p) {
  using Shape = MmaTile<kParts>;
  constexpr int kStages = Shape::kStages;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = Shape::row_of_warp(warp), warp_column = Shape::column_of_warp(warp);
  const int steps = p.step_count();

  for (int index = blockIdx.x; index < p.schedule.units(); index += gridDim.x) {
    const Unit unit = p.schedule.unit(index, steps);
    const int64_t row0 = static_cast<int64_t>(unit.tile.row) * kTileRows;
    const int64_t column0 = static_cast<int64_t>(unit.tile.column) * Shape::kWidth;
    const bool shares = p.one_operand && p.schedule.triangle.on_diagonal(unit.tile);
    if (unit.slot < 0 && unit.first == unit.last) continue;

    const auto start_step = [&](int i) {
      if (i < unit.last) {
        const int64_t token = static_cast<int64_t>(p.step(i)) * Shape::kTokens;
        const uint32_t to = base + (i - unit.first) % kStages * 2 * Shape::kOperandBytes;
        start_copy<kParts>(right, tokens, p.columns, token, column0, to + Shape::kOperandBytes);
        if (!shares) start_copy<kParts>(left, tokens, p.columns, token, row0, to);
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
    };

    float sum[4][4][4] = {};
    for (int i = 0; i < kStages - 1; ++i) start_step(unit.first + i);
    for (int i = unit.first; i < unit.last; ++i) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
      __syncthreads();  // step i has arrived for all threads, and all are done with step i − 1, whose place is next
      start_step(i + kStages - 1);
      const uint32_t right_at = base + (i - unit.first) % kStages * 2 * Shape::kOperandBytes + Shape::kOperandBytes;
      const uint32_t left_at = shares ? right_at : right_at - Shape::kOperandBytes;

      float step_sum[4][4][4] = {};
#pragma unroll 1
      for (int product = 0; product < Parts<kParts>::kProducts; ++product) {
        const uint32_t left_part = left_at + Parts<kParts>::product(product).left * Shape::kPartBytes;
        const uint32_t right_part = right_at + Parts<kParts>::product(product).right * Shape::kPartBytes;
#pragma unroll
        for (int k = 0; k < Shape::kTokens; k += 16) {
          uint32_t a[4][4], b[2][4];
          const LaneAddress to_left = left_lane(lane), to_right = right_lane(lane);
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            load_transposed(a[m], left_part + operand_offset(Shape::kTokens, k + to_left.token,
                                                             warp_row + 16 * m + to_left.column));
          }
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            load_transposed(b[n], right_part + operand_offset(Shape::kTokens, k + to_right.token,
                                                              warp_column + 16 * n + to_right.column));
          }
#pragma unroll
          for (int m = 0; m < 4; ++m) {
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              mma<kHalf>(step_sum[m][n], a[m], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
            }
          }
        }
      }
#pragma unroll
      for (int e = 0; e < 64; ++e) sum[e / 16][e / 4 % 4][e % 4] += step_sum[e / 16][e / 4 % 4][e % 4];
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();  // the next unit's copies go where this one's last step was read

#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        store_sums<Shape::kWidth, 4>(
            p, unit, warp_row + 16 * m + 8 * half + sum_row(lane), warp_column + sum_column(lane),
            [&](int n) { return Pair{sum[m][n][2 * half], sum[m][n][2 * half + 1]}; });
      }
    }
  }
}

}  // namespace statsmerge::cuda::gram
