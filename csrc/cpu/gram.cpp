// gram_accumulate_ on the CPU: the operator's tensors as what the kernels see of them.
#include "common/tensors.h"
#include "cpu/kernels/product.h"

namespace statsmerge {
namespace {

MatrixView view_of(const Tensor& x, const char* name) {
  return {bytes(x), storage_of(x, name), x.sizes()[1], x.sizes()[2], x.stride(1), x.stride(2)};
}

MatrixView at(MatrixView first, int64_t offset) {
  first.data += offset * bytes_of(first.storage);
  return first;
}

template <class Acc>
void accumulate(Tensor& gram, const Tensor& x, const std::optional<Tensor>& weight,
                const std::optional<Tensor>& other) {
  std::optional<Tensor> w;
  if (weight) w = dense(to_dtype(*weight, gram.scalar_type()));
  const Tensor& second = other ? *other : x;
  const MatrixView a = view_of(x, "x"), b = view_of(second, "other");
  auto* c = static_cast<Acc*>(gram.mutable_data_ptr());
  for (int64_t i = 0; i < x.sizes()[0]; ++i) {
    accumulate_product<Acc>(1, at(a, i * x.stride(0)), at(b, i * second.stride(0)),
                            w ? reinterpret_cast<const Acc*>(bytes(*w)) + i * a.rows : nullptr, c + i * gram.stride(0),
                            gram.stride(1), gram.stride(2), !other);
  }
}

// gram [B, in, in2], x [B, n, in], weight [B, n], other [B, n, in2]; shapes are checked by the Python wrapper.
void gram_accumulate_(Tensor gram, Tensor x, std::optional<Tensor> weight, std::optional<Tensor> other) {
  if (x.numel() == 0 || gram.numel() == 0) return;
  if (gram.scalar_type() == ScalarType::Double) {
    accumulate<double>(gram, x, weight, other);
  } else {
    accumulate<float>(gram, x, weight, other);
  }
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CPU, m) { m.impl("gram_accumulate_", TORCH_BOX(&statsmerge::gram_accumulate_)); }
