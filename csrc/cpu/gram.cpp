// gram_accumulate_, gram_accumulate_patches_ and symmetrize_ on the CPU: the operators' tensors as what the kernels see
// of them. Shapes are checked by the Python wrappers.
#include "common/tensors.h"
#include "cpu/kernels/gram.h"
#include "cpu/kernels/mirror.h"

namespace statsmerge {
namespace {

template <class Acc>
Grams<Acc> grams_of(const Tensor& gram) {
  return {static_cast<Acc*>(gram.mutable_data_ptr()), gram.stride(0), gram.stride(1), gram.stride(2)};
}

// Weights in the Gram's type, dense.
std::optional<Tensor> weights_of(const Tensor& gram, const std::optional<Tensor>& weight) {
  if (!weight) return std::nullopt;
  return dense(to_dtype(*weight, gram.scalar_type()));
}

template <class Acc>
const Acc* data_of(const std::optional<Tensor>& weights) {
  return weights ? reinterpret_cast<const Acc*>(bytes(*weights)) : nullptr;
}

MatrixView view_of(const Tensor& x, const char* name) {
  return {bytes(x), storage_of(x, name), x.sizes()[1], x.sizes()[2], x.stride(1), x.stride(2)};
}

template <class Acc>
void accumulate(const Tensor& gram, const Tensor& x, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& other) {
  const std::optional<Tensor> weights = weights_of(gram, weight);
  const Acc* weight_data = data_of<Acc>(weights);
  const int64_t batches = x.sizes()[0];
  const MatrixView features = view_of(x, "x");
  const Grams<Acc> grams = grams_of<Acc>(gram);
  if (!other) return accumulate_grams<Acc>(features, batches, x.stride(0), weight_data, grams);
  const MatrixView second = view_of(*other, "other");
  accumulate_cross_grams<Acc>(features, x.stride(0), second, other->stride(0), batches, weight_data, grams);
}

// gram [B, in, in2], x [B, n, in], weight [B, n], other [B, n, in2].
void gram_accumulate_(Tensor gram, Tensor x, std::optional<Tensor> weight, std::optional<Tensor> other) {
  if (x.numel() == 0 || gram.numel() == 0) return;
  if (gram.scalar_type() == ScalarType::Double) {
    accumulate<double>(gram, x, weight, other);
  } else {
    accumulate<float>(gram, x, weight, other);
  }
}

template <class Acc>
void accumulate_patches(const Tensor& gram, const Patches& patches, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& other) {
  const std::optional<Tensor> weights = weights_of(gram, weight);
  const Grams<Acc> grams = grams_of<Acc>(gram);
  if (!other) return accumulate_patch_grams<Acc>(patches, data_of<Acc>(weights), grams);
  const MatrixView second = view_of(*other, "other");
  accumulate_patch_cross_grams<Acc>(patches, second, other->stride(0), data_of<Acc>(weights), grams);
}

// gram [groups, in, in2], x [N, C, three spatial dimensions], weight [N, outputs], other [groups, N · outputs, in2];
// `padding` is two numbers a dimension, in front and behind.
void gram_accumulate_patches_(Tensor gram, Tensor x, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                              std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                              std::optional<Tensor> weight, std::optional<Tensor> other) {
  if (x.numel() == 0 || gram.numel() == 0) return;
  const int64_t channels = x.sizes()[1] / groups;
  Patches patches{bytes(x),    storage_of(x, "x"),       x.sizes()[0], groups, channels,
                  x.stride(0), x.stride(1) * channels, x.stride(1),  {},     {}, {}, {}, {}, {}, {}};
  for (size_t d = 0; d < 3; ++d) {
    patches.size[d] = x.sizes()[2 + d];
    patches.element_stride[d] = x.stride(2 + static_cast<int64_t>(d));
    patches.kernel[d] = kernel[d];
    patches.stride[d] = stride[d];
    patches.padding[d] = padding[2 * d];
    patches.dilation[d] = dilation[d];
    patches.out[d] =
        (patches.size[d] + padding[2 * d] + padding[2 * d + 1] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  }
  if (gram.scalar_type() == ScalarType::Double) {
    accumulate_patches<double>(gram, patches, weight, other);
  } else {
    accumulate_patches<float>(gram, patches, weight, other);
  }
}

template <class Acc>
void mirror(const Grams<Acc>& grams, const Tensor& gram) {
  mirror_lower(grams.data, gram.sizes()[0], grams.stride, gram.sizes()[1], grams.row_stride, grams.column_stride);
}

// gram [B, in, in].
void symmetrize_(Tensor gram) {
  if (gram.scalar_type() == ScalarType::Double) {
    mirror(grams_of<double>(gram), gram);
  } else {
    mirror(grams_of<float>(gram), gram);
  }
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CPU, m) {
  m.impl("gram_accumulate_", TORCH_BOX(&statsmerge::gram_accumulate_));
  m.impl("gram_accumulate_patches_", TORCH_BOX(&statsmerge::gram_accumulate_patches_));
  m.impl("symmetrize_", TORCH_BOX(&statsmerge::symmetrize_));
}
