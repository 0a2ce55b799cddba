// The launches of the tile kernels: large float Grams of x alone, on the tiles of one triangle.
#pragma once

#include <cuda.h>

#include <algorithm>

#include "cuda/gram_mma.cuh"
#include "cuda/gram_prepare.cuh"
#include "cuda/gram_wgmma.cuh"
#include "cuda/launch.h"

namespace statsmerge::cuda::gram {

constexpr bool kUseWgmma = true;                   // false: mma.sync on Hopper too
constexpr int64_t kWorkspaceBytes = 256 << 20;     // of prepared operands or patches at a time
constexpr int64_t kMostTokens = int64_t{1} << 30;  // of one launch: tokens are counted in 32 bits

inline int device_attribute(cudaDeviceAttr attribute, const Tensor& x) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, x.get_device_index()));
  return value;
}

inline int capability_of(const Tensor& x) {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, x) +
         device_attribute(cudaDevAttrComputeCapabilityMinor, x);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
T* data(const Tensor& x) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(x.const_data_ptr());
  } else {
    return static_cast<T*>(x.mutable_data_ptr());
  }
}

// The steps of an operand that are to be taken: null for all of them.
struct Steps {
  const int* list = nullptr;
  const int* count = nullptr;
};

// Whether the kernel was compiled for sm_90a: without its body it needs no registers to speak of.
template <int kParts, bool kHalf>
bool has_wgmma(int capability) {
  if (!kUseWgmma || capability != 90) return false;
  cudaFuncAttributes attributes;
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, gram_wgmma_kernel<kParts, kHalf>));
  return attributes.numRegs >= 128;
}

// The driver's function, found at run time so that libcuda is not linked.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  STD_CUDA_CHECK(
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// An operand's parts [tokens, columns], from which panels of kPanelColumns columns and `step` tokens are copied.
inline CUtensorMap tensor_map(const Operand& operand, bool half, int parts, int64_t tokens, int64_t columns, int step) {
  static const auto encode = tensor_map_encoder();
  const cuuint64_t size[3]{static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(tokens),
                           static_cast<cuuint64_t>(parts)};
  const cuuint64_t strides[2]{static_cast<cuuint64_t>(2 * operand.pitch),
                              static_cast<cuuint64_t>(2 * operand.part_stride)};
  const cuuint32_t box[3]{kPanelColumns, static_cast<cuuint32_t>(step), 1}, every[3]{1, 1, 1};
  CUtensorMap map;
  const CUresult result =
      encode(&map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
             const_cast<uint16_t*>(operand.data), size, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled failed");
  return map;
}

template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// gram (one matrix) += leftᵀ right over `tokens` tokens.
template <int kParts, bool kHalf>
void add_tiles(const Tensor& gram, const Operand& left, const Operand& right, int64_t tokens,
               const Steps& listed) {
  using Wgmma = WgmmaTile<kParts>;
  using Mma = MmaTile<kParts>;
  const bool wgmma = has_wgmma<kParts, kHalf>(capability_of(gram));
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount, gram);
  const int width = wgmma ? Wgmma::kWidth : Mma::kWidth;
  TileProblem p{};
  p.columns = gram.sizes()[0];
  p.most = static_cast<int>(ceil_div(tokens, Parts<kParts>::kTokens));
  p.schedule = plan(Triangle::of(p.columns, width / kTileRows), processors, p.most);
  p.gram = data<float>(gram);
  p.row_stride = gram.stride(0);
  p.column_stride = gram.stride(1);
  p.steps = listed.list;
  p.count = listed.count;
  p.one_operand = left.data == right.data;
  p.pairs = p.column_stride == 1 && p.row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(p.gram) % 8 == 0;
  const int slots = p.schedule.slots();
  Tensor partial = new_empty(gram, {slots, kTileRows, width}, ScalarType::Float);
  p.partial = data<float>(partial);
  const cudaStream_t stream = current_stream(gram);
  const unsigned blocks = grid(std::min(p.schedule.units(), processors));
  if (wgmma) {
    const auto kernel = gram_wgmma_kernel<kParts, kHalf>;
    const auto map = [&](const Operand& operand) {
      return tensor_map(operand, kHalf, kParts, tokens, p.columns, Wgmma::kTokens);
    };
    allow_shared_memory(kernel, Wgmma::kSharedBytes);
    kernel<<<blocks, Wgmma::kThreads, Wgmma::kSharedBytes, stream>>>(map(left), map(right), p);
  } else {
    const auto kernel = gram_mma_kernel<kParts, kHalf>;
    allow_shared_memory(kernel, Mma::kSharedBytes);
    kernel<<<blocks, Mma::kThreads, Mma::kSharedBytes, stream>>>(left, right, tokens, p);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (slots == 0) return;
  const unsigned add_blocks = grid(p.schedule.divided() * (kTileRows / kAddRows));
  if (width == 2 * kTileRows) {
    add_partial_kernel<2 * kTileRows><<<add_blocks, kAddThreads, 0, stream>>>(p);
  } else {
    add_partial_kernel<kTileRows><<<add_blocks, kAddThreads, 0, stream>>>(p);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// The same for features x [tokens, columns] of any strides and the tokens that are `kept`, through prepared operands of
// bounded size. Half precision is that of the prepared operand.
template <int kParts, bool kHalf, class T>
void add_prepared(const Tensor& gram, const Tensor& x, const float* weight, Kept kept) {
  constexpr int kTokens = Parts<kParts>::kTokens;
  const int64_t tokens = x.sizes()[0], columns = x.sizes()[1], pitch = ceil_div(columns, 8) * 8;
  const int operands = kParts == 1 || !weight ? 1 : 2;
  const int64_t fitting = kWorkspaceBytes / (2 * pitch * kParts * operands) / kTokens * kTokens;
  const int64_t most = std::min(tokens, std::max<int64_t>(fitting, kTokens));
  Tensor workspace = new_empty(gram, {operands * kParts * most * pitch}, ScalarType::BFloat16);
  Tensor listing = new_empty(gram, {2 * ceil_div(most, kTokens) + 1}, ScalarType::Int);
  int* const count = data<int>(listing);
  const cudaStream_t stream = current_stream(gram);
  for (int64_t first = 0; first < tokens; first += most) {
    const int64_t n = std::min(most, tokens - first), steps = ceil_div(n, kTokens), part_stride = n * pitch;
    Tensor rows = slice(x, 0, first, n);
    if (rows.stride(1) != 1) rows = torch::stable::contiguous(rows);
    int *const used = count + 1, *const list = used + steps;
    uint16_t* const left_out = data<uint16_t>(workspace);
    uint16_t* const right_out = left_out + (operands - 1) * kParts * part_stride;
    const Operand left{left_out, pitch, part_stride}, right{right_out, pitch, part_stride};
    const bool vectors = rows.stride(0) % 4 == 0 &&
                         reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % alignof(Four<T>) == 0;
    const Features<T> features{data<const T>(rows),           rows.stride(0), n,      columns,
                               weight ? weight + first : nullptr, kept,           vectors};
    const Prepared prepared{left_out, operands == 2 ? right_out : nullptr, pitch, part_stride, used};
    const dim3 blocks(grid(steps), grid(ceil_div(columns, kPrepareColumns)));
    prepare_kernel<kParts, T><<<blocks, kPrepareThreads, 0, stream>>>(features, prepared);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    if (kept == Kept::all) {
      add_tiles<kParts, kHalf>(gram, left, right, n, {});
    } else {
      list_steps_kernel<<<1, kListThreads, 0, stream>>>(used, static_cast<int>(steps), list, count);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      add_tiles<kParts, kHalf>(gram, left, right, n, {list, count});
    }
  }
}

// Whether the kernels can read rows of x as they lie in memory, 16 bytes at a time.
inline bool is_operand(const Tensor& x) {
  return x.stride(1) == 1 && x.stride(0) % 8 == 0 && x.stride(0) >= x.sizes()[1] &&
         reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

// One float Gram of features x [tokens, columns].
template <class T>
void accumulate_triangle(const Tensor& gram, const Tensor& x, const float* weight) {
  if constexpr (sizeof(T) > 2) {
    add_prepared<3, false, T>(gram, x, weight, weight ? Kept::nonzero : Kept::all);
  } else {
    constexpr bool kHalf = std::is_same_v<T, f16>;
    if (weight) {
      add_prepared<1, kHalf, T>(gram, x, weight, Kept::ones);
      add_prepared<3, false, T>(gram, x, weight, Kept::neither_zero_nor_one);
    } else if (!is_operand(x)) {
      add_prepared<1, kHalf, T>(gram, x, nullptr, Kept::all);
    } else {
      for (int64_t first = 0; first < x.sizes()[0]; first += kMostTokens) {
        const int64_t n = std::min(kMostTokens, x.sizes()[0] - first);
        const Operand operand{data<const uint16_t>(x) + first * x.stride(0), x.stride(0), n * x.stride(0)};
        add_tiles<1, kHalf>(gram, operand, operand, n, {});
      }
    }
  }
}

}  // namespace statsmerge::cuda::gram
