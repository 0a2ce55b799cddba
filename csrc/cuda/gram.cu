// gram_accumulate_ and gram_accumulate_patches_ on CUDA. Three ways, chosen by shape:
// - small Grams: a kernel for whole batches of them (gram_small.cuh);
// - large float Grams of x alone: tensor cores on the tiles of one triangle, half the work of a matrix product
//   (gram_wgmma.cuh on Hopper, gram_mma.cuh elsewhere); 16-bit x as it is, float and double x, and weights other than
//   0 and 1, through three bfloat16 parts at float's accuracy;
// - everything else (cross Grams, double Grams, sizes between): aten's products, those of float at the precision that
//   torch is set to (torch.set_float32_matmul_precision).
// Patches of a convolution exist in shared memory alone where their Grams are small; else some of them at a time are
// written to memory in their own type, and their Gram goes the ways above.
// Everything runs on torch's stream, without waiting for the device.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <limits>

#include "common/tensors.h"
#include "cuda/gram_small.cuh"
#include "cuda/gram_tiles.h"

namespace statsmerge {
namespace {

using namespace cuda::gram;

constexpr int64_t kPanel = 1024;  // columns of a double Gram per product

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

// Calls f with a null pointer of x's element type.
template <class F>
void dispatch(const Tensor& x, const char* name, const F& f) {
  switch (storage_of(x, name)) {
    case Storage::f64:
      return f(static_cast<const double*>(nullptr));
    case Storage::f32:
      return f(static_cast<const float*>(nullptr));
    case Storage::bf16:
      return f(static_cast<const bf16*>(nullptr));
    case Storage::f16:
      return f(static_cast<const f16*>(nullptr));
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

// Weights [batches, tokens] with contiguous tokens, as the kernels see them.
template <class Acc>
struct Weights {
  explicit Weights(const std::optional<Tensor>& weight) {
    if (!weight) return;
    data = static_cast<const Acc*>(weight->const_data_ptr());
    batch_stride = weight->stride(0);
  }
  const Acc* of(int64_t batch) const { return data ? data + batch * batch_stride : nullptr; }

  const Acc* data = nullptr;
  int64_t batch_stride = 0;
};

// ---- small Grams

template <class Acc, class Features>
void accumulate_small(const Tensor& gram, const Features& x, int64_t tokens, const Weights<Acc>& weights) {
  const SmallShape shape{static_cast<int>(gram.sizes()[1])};
  const int64_t batches = gram.sizes()[0];
  // Eight blocks a multiprocessor, as long as each has a few tiles to read.
  const int64_t blocks = 8 * device_attribute(cudaDevAttrMultiProcessorCount, gram);
  const int64_t wanted = std::min(ceil_div(blocks, batches), ceil_div(tokens, 4 * shape.tokens()));
  const int64_t range = ceil_div(ceil_div(tokens, wanted), shape.tokens()) * shape.tokens();
  const int ranges = static_cast<int>(ceil_div(tokens, range));
  Tensor partial = new_empty(gram, {ranges > 1 ? batches * ranges * shape.entries() : 0}, gram.scalar_type());
  const SmallSums<Acc> sums{shape, strided<Acc>(gram), data<Acc>(partial), batches, ranges};
  const SmallProblem<Acc, Features> p{sums, x, weights.data, weights.batch_stride, tokens, range};
  const cudaStream_t stream = current_stream(gram);
  small_gram_kernel<Acc, Features><<<grid(batches * ranges), kSmallThreads, 0, stream>>>(p);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (ranges == 1) return;
  const int64_t add_blocks = ceil_div(batches * shape.entries(), kAddSmallThreads);
  add_small_kernel<Acc><<<grid(add_blocks), kAddSmallThreads, 0, stream>>>(sums);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
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
Tensor converted_tokens(const Tensor& gram, const Tensor& x, const Weights<Acc>& weights, int64_t first, int64_t n) {
  const Tensor rows = slice(x, 1, first, n);
  if (x.scalar_type() == gram.scalar_type() && !weights.data) return rows;
  const int64_t batches = x.sizes()[0], columns = x.sizes()[2];
  Tensor out = new_empty(gram, {batches, n, columns}, gram.scalar_type());
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    const Acc* factors = weights.data ? weights.data + first : nullptr;
    convert_kernel<Acc, T><<<grid(ceil_div(batches * n, kRowsOfBlock)), kRowThreads, 0, current_stream(gram)>>>(
        strided<const T>(rows), factors, weights.batch_stride, batches, n, columns, data<Acc>(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

template <class Acc>
void accumulate_products(const Tensor& gram, const Tensor& x, const Weights<Acc>& weights,
                         const std::optional<Tensor>& other) {
  const Tensor& second = other ? *other : x;
  const int64_t batches = x.sizes()[0], tokens = x.sizes()[1], rows = gram.sizes()[1], columns = gram.sizes()[2];
  const bool converts =
      weights.data || x.scalar_type() != gram.scalar_type() || second.scalar_type() != gram.scalar_type();
  const bool half = x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
  if constexpr (std::is_same_v<Acc, float>) {
    if (half && !weights.data && second.scalar_type() == x.scalar_type()) {
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
    const Tensor right = converted_tokens<Acc>(gram, second, Weights<Acc>(std::nullopt), first, n);
    const Tensor left = other || weights.data ? converted_tokens<Acc>(gram, x, weights, first, n) : right;
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

// ---- the operators

// The weights in the Gram's type, with contiguous tokens.
std::optional<Tensor> weights_of(const Tensor& gram, const std::optional<Tensor>& weight) {
  if (!weight) return weight;
  const Tensor converted = to_dtype(*weight, gram.scalar_type());
  return converted.stride(1) == 1 ? converted : dense(converted);
}

template <class Acc>
void accumulate(const Tensor& gram, const Tensor& x, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& other) {
  const int64_t batches = x.sizes()[0], tokens = x.sizes()[1], columns = x.sizes()[2];
  const std::optional<Tensor> kept = weights_of(gram, weight);
  const Weights<Acc> weights(kept);
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    if (!other && columns <= kSmall) return accumulate_small<Acc>(gram, strided<const T>(x), tokens, weights);
    if constexpr (std::is_same_v<Acc, float>) {
      const Gates gates = gates_of(capability_of(x));
      const int64_t least = sizeof(T) > 2 ? gates.single : weight ? 0 : gates.half;
      if (!other && columns >= least) {
        for (int64_t b = 0; b < batches; ++b) {
          accumulate_triangle<T>(matrix_of(gram, b), matrix_of(x, b), weights.of(b));
        }
        return;
      }
    }
    accumulate_products<Acc>(gram, x, weights, other);
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

// Grams of patches, `tokens` for every group; weight [groups, tokens], other [groups, tokens, in2].
template <class Acc, class T>
void accumulate_patches(const Tensor& gram, const Patches<T>& patches, int64_t tokens, ScalarType type,
                        const std::optional<Tensor>& weight, const std::optional<Tensor>& other) {
  const int64_t groups = gram.sizes()[0], columns = gram.sizes()[1], pitch = ceil_div(columns, 8) * 8;
  if (!other && columns <= kSmall) return accumulate_small<Acc>(gram, patches, tokens, Weights<Acc>(weight));
  const int64_t fitting = kWorkspaceBytes / (groups * pitch * static_cast<int64_t>(sizeof(T)));
  const int64_t most = std::min(tokens, std::max<int64_t>(fitting / kUnfoldEdge, 1) * kUnfoldEdge);
  const Tensor workspace = new_empty(gram, {groups * most * pitch}, type);
  for (int64_t first = 0; first < tokens; first += most) {
    const int64_t n = std::min(most, tokens - first);
    const dim3 blocks(grid(groups * ceil_div(n, kUnfoldEdge)), grid(ceil_div(columns, kUnfoldEdge)));
    unfold_kernel<T><<<blocks, kUnfoldThreads, 0, current_stream(gram)>>>(patches, first, n, columns, pitch,
                                                                          data<T>(workspace));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const Tensor rows = reshape(slice(workspace, 0, 0, groups * n * pitch), {groups, n, pitch});
    const std::optional<Tensor> factors = weight ? std::optional(slice(*weight, 1, first, n)) : std::nullopt;
    const std::optional<Tensor> second = other ? std::optional(slice(*other, 1, first, n)) : std::nullopt;
    accumulate<Acc>(gram, slice(rows, 2, 0, columns), factors, second);
  }
}

// gram [groups, in, in2], x [N, C, three spatial dimensions], weight [N, outputs], other [groups, N · outputs, in2];
// `padding` is two numbers a dimension, in front and behind. Shapes are checked by the Python wrapper.
void gram_accumulate_patches_(Tensor gram, Tensor x, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                              std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                              std::optional<Tensor> weight, std::optional<Tensor> other) {
  if (x.numel() == 0 || gram.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(gram.get_device_index());
  int64_t tokens = x.sizes()[0];
  PatchShape shape{};
  for (int d = 0; d < 3; ++d) {
    const int64_t size = x.sizes()[2 + d], room = size + padding[2 * d] + padding[2 * d + 1];
    const int64_t out = (room - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
    check(room < 1 << 30, "x: expected fewer than 2^30 positions along a padded dimension, got ", room);
    shape.element_stride[d] = x.stride(2 + d);
    shape.size[d] = static_cast<int>(size);
    shape.kernel[d] = static_cast<int>(kernel[d]);
    // A single output is never moved, so that no stride is too large.
    shape.stride[d] = out > 1 ? static_cast<int>(stride[d]) : 1;
    shape.padding[d] = static_cast<int>(padding[2 * d]);
    shape.dilation[d] = kernel[d] > 1 ? static_cast<int>(dilation[d]) : 1;
    shape.out[d] = static_cast<int>(out);
    tokens *= out;
  }
  shape.channel_stride = x.stride(1);
  shape.group_stride = x.stride(1) * (x.sizes()[1] / groups);
  shape.image_stride = x.stride(0);
  std::optional<Tensor> weights, every;
  if (weight) {
    weights = dense(to_dtype(*weight, gram.scalar_type()));
    every = torch::stable::from_blob(weights->mutable_data_ptr(), {groups, tokens}, {0, 1}, weights->device(),
                                     weights->scalar_type());  // the same for every group
  }
  dispatch(x, "x", [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    const Patches<T> patches{data<const T>(x), shape};
    if (gram.scalar_type() == ScalarType::Double) {
      accumulate_patches<double>(gram, patches, tokens, x.scalar_type(), every, other);
    } else {
      accumulate_patches<float>(gram, patches, tokens, x.scalar_type(), every, other);
    }
  });
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CUDA, m) {
  m.impl("gram_accumulate_", TORCH_BOX(&statsmerge::gram_accumulate_));
  m.impl("gram_accumulate_patches_", TORCH_BOX(&statsmerge::gram_accumulate_patches_));
}
