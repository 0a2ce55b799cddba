// gram_accumulate_ on CUDA. Three ways, chosen by shape:
// - small Grams: a kernel for whole batches of them (gram_small.cuh);
// - large float Grams of x alone: tensor cores on the tiles of one triangle, half the work of a matrix product
//   (gram_wgmma.cuh on Hopper, gram_mma.cuh elsewhere); 16-bit x as it is, float and double x, and weights other than
//   0 and 1, through three bfloat16 parts at float's accuracy;
// - everything else (cross Grams, double Grams, sizes between): aten's products, those of float at the precision that
//   torch is set to (torch.set_float32_matmul_precision).
// Everything runs on torch's stream, without waiting for the device.
#include <cuda.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <algorithm>
#include <limits>

#include "common/tensors.h"
#include "cuda/gram_mma.cuh"
#include "cuda/gram_small.cuh"
#include "cuda/gram_wgmma.cuh"
#include "cuda/launch.h"

namespace statsmerge {
namespace {

using namespace cuda::gram;

constexpr bool kUseWgmma = true;                  // false: mma.sync on Hopper too
constexpr int64_t kWorkspaceBytes = 256 << 20;    // of prepared operands at a time
constexpr int64_t kMostTokens = int64_t{1} << 30;  // of one launch: tokens are counted in 32 bits
constexpr int64_t kPanel = 1024;                  // columns of a double Gram per product

// Number of columns from which on the tile kernels are taken rather than cuBLAS: for 16-bit x without weights, and for
// float x. With weights, 16-bit x takes them at any size: cuBLAS would need it in float. Where cuBLAS has faster
// instructions than these kernels (tcgen05) half the work is no gain, and where tensor cores are not at least six times
// as fast as float arithmetic, neither are six products.
struct Gates {
  int64_t half, single;
};
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

Gates gates_of(int capability) {
  switch (capability) {
    case 80:
      return {2048, 1024};
    case 90:
      return {1024, 1024};
    case 100:
    case 103:
      return {kNever, 1024};
    default:
      return {2048, kNever};
  }
}

int device_attribute(cudaDeviceAttr attribute, const Tensor& x) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, x.get_device_index()));
  return value;
}

int capability_of(const Tensor& x) {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, x) +
         device_attribute(cudaDevAttrComputeCapabilityMinor, x);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f with a null pointer of x's element type.
template <class F>
void dispatch(const Tensor& x, const char* name, const F& f) {
  switch (storage_of(x, name)) {
    case Storage::f64:
      return f(static_cast<const double*>(nullptr));
    case Storage::f32:
      return f(static_cast<const float*>(nullptr));
    case Storage::bf16:
      return f(static_cast<const __nv_bfloat16*>(nullptr));
    case Storage::f16:
      return f(static_cast<const __half*>(nullptr));
  }
}

template <class T>
T* data(const Tensor& x) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(x.const_data_ptr());
  } else {
    return static_cast<T*>(x.mutable_data_ptr());
  }
}

template <class T>
Strided<T> strided(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1), x.stride(2)};
}

// A matrix of a batch.
Tensor matrix_of(const Tensor& batch, int64_t index) {
  return call_aten<1>("aten::select", "int", batch, int64_t{0}, index)[0];
}

// ---- small Grams

template <class Acc, class T>
void accumulate_small(const Tensor& gram, const Tensor& x, const std::optional<Tensor>& weight) {
  SmallProblem<Acc, T> p{};
  p.shape = {static_cast<int>(x.sizes()[2])};
  p.x = strided<const T>(x);
  p.gram = strided<Acc>(gram);
  p.weight = weight ? data<const Acc>(*weight) : nullptr;
  p.batches = x.sizes()[0];
  p.tokens = x.sizes()[1];
  p.tokens_contiguous = x.stride(1) < x.stride(2);
  // Eight blocks a multiprocessor, as long as each has a few tiles to read.
  const int64_t blocks = 8 * device_attribute(cudaDevAttrMultiProcessorCount, x);
  const int64_t wanted = std::min(ceil_div(blocks, p.batches), ceil_div(p.tokens, 4 * p.shape.tokens()));
  p.range = ceil_div(ceil_div(p.tokens, wanted), p.shape.tokens()) * p.shape.tokens();
  p.ranges = static_cast<int>(ceil_div(p.tokens, p.range));
  Tensor partial = new_empty(gram, {p.ranges > 1 ? p.batches * p.ranges * p.shape.entries() : 0}, gram.scalar_type());
  p.partial = data<Acc>(partial);
  const cudaStream_t stream = current_stream(gram);
  small_gram_kernel<Acc, T><<<grid(p.batches * p.ranges), kSmallThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (p.ranges == 1) return;
  const int64_t add_blocks = ceil_div(p.batches * p.shape.entries(), kAddSmallThreads);
  add_small_kernel<Acc, T><<<grid(add_blocks), kAddSmallThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// ---- large float Grams: tiles

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
decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  STD_CUDA_CHECK(
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// An operand's parts [tokens, columns], from which panels of kPanelColumns columns and `step` tokens are copied.
CUtensorMap tensor_map(const Operand& operand, bool half, int parts, int64_t tokens, int64_t columns, int step) {
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
    if (rows.stride(1) != 1) rows = dense(rows);
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
bool is_operand(const Tensor& x) {
  return x.stride(1) == 1 && x.stride(0) % 8 == 0 && x.stride(0) >= x.sizes()[1] &&
         reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

// One float Gram of features x [tokens, columns].
template <class T>
void accumulate_triangle(const Tensor& gram, const Tensor& x, const float* weight) {
  if constexpr (sizeof(T) > 2) {
    add_prepared<3, false, T>(gram, x, weight, weight ? Kept::nonzero : Kept::all);
  } else {
    constexpr bool kHalf = std::is_same_v<T, __half>;
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

// ---- everything else: aten's products

// out += aᵀ b for batches of matrices of any strides.
void add_product(const Tensor& out, const Tensor& a, const Tensor& b) {
  const Tensor left = aten::transpose(a);
  const auto error = aoti_torch_cuda_baddbmm_out(out.get(), out.get(), left.get(), b.get(), 1.0, 1.0);
  if (error != TORCH_SUCCESS) throw std::runtime_error("aten::baddbmm failed");
}

// Tokens [first, first + n) of x in the Gram's type, times their weights if there are any: x itself where it is that.
template <class Acc>
Tensor converted_tokens(const Tensor& gram, const Tensor& x, const std::optional<Tensor>& weight, int64_t first,
                        int64_t n) {
  const Tensor rows = slice(x, 1, first, n);
  if (x.scalar_type() == gram.scalar_type() && !weight) return rows;
  const int64_t batches = x.sizes()[0], columns = x.sizes()[2];
  Tensor out = new_empty(gram, {batches, n, columns}, gram.scalar_type());
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    const Acc* factors = weight ? data<const Acc>(*weight) + first : nullptr;
    convert_kernel<Acc, T><<<grid(ceil_div(batches * n, kRowsOfBlock)), kRowThreads, 0, current_stream(gram)>>>(
        strided<const T>(rows), factors, x.sizes()[1], batches, n, columns, data<Acc>(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

template <class Acc>
void accumulate_products(const Tensor& gram, const Tensor& x, const std::optional<Tensor>& weight,
                         const std::optional<Tensor>& other) {
  const Tensor& second = other ? *other : x;
  const int64_t batches = x.sizes()[0], tokens = x.sizes()[1], rows = gram.sizes()[1], columns = gram.sizes()[2];
  const bool converts = weight || x.scalar_type() != gram.scalar_type() || second.scalar_type() != gram.scalar_type();
  const bool half = x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
  if constexpr (std::is_same_v<Acc, float>) {
    if (half && !weight && second.scalar_type() == x.scalar_type()) {
      const Tensor product = call_aten<1>("aten::bmm", "dtype", aten::transpose(x), second, ScalarType::Float)[0];
      add_product_kernel<<<grid(ceil_div(batches * rows, kRowsOfBlock)), kRowThreads, 0, current_stream(gram)>>>(
          strided<float>(gram), data<const float>(product), batches, rows, columns);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      return;
    }
  }
  const int64_t fitting = kWorkspaceBytes / static_cast<int64_t>(sizeof(Acc)) / (batches * (rows + columns));
  const int64_t most = converts ? std::min(tokens, std::max<int64_t>(fitting, 1)) : tokens;
  for (int64_t first = 0; first < tokens; first += most) {
    const int64_t n = std::min(most, tokens - first);
    const Tensor right = converted_tokens<Acc>(gram, second, std::nullopt, first, n);
    const Tensor left = other || weight ? converted_tokens<Acc>(gram, x, weight, first, n) : right;
    if (other) {
      add_product(gram, left, right);
      continue;
    }
    for (int64_t c = 0; c < columns; c += kPanel) {  // panels of columns, each from its diagonal down
      const int64_t width = std::min(kPanel, columns - c);
      const Tensor below = slice(gram, 1, c, columns - c);
      add_product(slice(below, 2, c, width), slice(left, 2, c, columns - c), slice(right, 2, c, width));
    }
  }
}

// ---- the operator

template <class Acc>
void accumulate(const Tensor& gram, const Tensor& x, std::optional<Tensor> weight, const std::optional<Tensor>& other) {
  const int64_t batches = x.sizes()[0], tokens = x.sizes()[1], columns = x.sizes()[2];
  if (weight) weight = dense(to_dtype(*weight, gram.scalar_type()));
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    if (!other && columns <= kSmall) return accumulate_small<Acc, T>(gram, x, weight);
    if constexpr (std::is_same_v<Acc, float>) {
      const Gates gates = gates_of(capability_of(x));
      const int64_t least = sizeof(T) > 2 ? gates.single : weight ? 0 : gates.half;
      if (!other && columns >= least) {
        for (int64_t b = 0; b < batches; ++b) {
          const float* factors = weight ? data<const float>(*weight) + b * tokens : nullptr;
          accumulate_triangle<T>(matrix_of(gram, b), matrix_of(x, b), factors);
        }
        return;
      }
    }
    accumulate_products<Acc>(gram, x, weight, other);
  });
}

// gram [B, in, in2], x [B, n, in], weight [B, n], other [B, n, in2]; shapes are checked by the Python wrapper.
void gram_accumulate_(Tensor gram, Tensor x, std::optional<Tensor> weight, std::optional<Tensor> other) {
  if (x.numel() == 0 || gram.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(gram.get_device_index());
  if (gram.scalar_type() == ScalarType::Double) {
    accumulate<double>(gram, x, weight, other);
  } else {
    accumulate<float>(gram, x, weight, other);
  }
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CUDA, m) { m.impl("gram_accumulate_", TORCH_BOX(&statsmerge::gram_accumulate_)); }
