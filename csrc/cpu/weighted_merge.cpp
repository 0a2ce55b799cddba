// weighted_merge and its gradient on the CPU: every tensor of a model in one parallel loop over chunks that fit the
// first cache level, each element of base and task vectors read once and each result written once.
#include <algorithm>
#include <type_traits>

#include "common/merge_operands.h"

namespace statsmerge {
namespace {

constexpr int64_t kChunk = 4096;  // elements; a multiple of 8, so that packed codes start at a byte

template <class Acc, class T>
STATSMERGE_CLONES void copy_in(const T* x, Acc* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(x[i]);
}

template <class Acc, class T>
STATSMERGE_CLONES void copy_out(const Acc* x, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = narrow<T>(x[i]);
}

template <class Acc, class T>
STATSMERGE_CLONES void add_scaled(const T* x, Acc factor, Acc* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] += factor * static_cast<Acc>(widen(x[i]));
}

// Sums in double: the result does not depend on how the processor orders the additions to any digit that matters.
template <class T, class U>
STATSMERGE_CLONES double dot(const T* x, const U* y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(widen(x[i])) * static_cast<double>(widen(y[i]));
  return sum;
}

template <int Bits>
STATSMERGE_CLONES void unpack(const char* data, int64_t first, int64_t n, float* out) {
  using Word = std::conditional_t<(Bits <= 4), uint32_t, uint64_t>;  // holds 8 codes
  constexpr Word mask = (1u << Bits) - 1;
  const char* in = data + first / 8 * Bits;
  for (int64_t i = 0; i < n; i += 8, in += Bits) {
    Word word = 0;
    std::memcpy(&word, in, Bits);
    for (int j = 0; j < 8; ++j) out[i + j] = static_cast<float>((word >> (Bits * j)) & mask);
  }
}

STATSMERGE_CLONES void scale_codes(float* x, int64_t n, float zero_point, float scale) {
  for (int64_t i = 0; i < n; ++i) x[i] = scale * (x[i] - zero_point);
}

// Elements first .. first + n of a quantised task vector as floats; `first` is a multiple of kChunk. Codes and `out`
// are padded to a multiple of 8 elements.
void dequantize(const TaskVector& t, int64_t first, int64_t n, float* out) {
  switch (t.bits) {
    case 2:
      unpack<2>(t.data, first, n, out);
      break;
    case 3:
      unpack<3>(t.data, first, n, out);
      break;
    case 4:
      unpack<4>(t.data, first, n, out);
      break;
    default:
      unpack<8>(t.data, first, n, out);
  }
  for (int64_t i = first; i < first + n;) {
    const int64_t group = i / t.group_size;
    const int64_t end = std::min((group + 1) * t.group_size, first + n);
    scale_codes(out + (i - first), end - i, static_cast<float>(t.zero_point[group]), t.scale[group]);
    i = end;
  }
}

// Calls f(pointer to n elements) for elements first .. first + n of `t`, dequantised into `buffer` where they are
// codes.
template <class F>
void with_elements(const TaskVector& t, int64_t first, int64_t n, float* buffer, const F& f) {
  if (t.bits != 0) {
    dequantize(t, first, n, buffer);
    f(static_cast<const float*>(buffer));
  } else {
    dispatch_storage(t.storage, [&](auto* type) { f(reinterpret_cast<decltype(type)>(t.data) + first); });
  }
}

template <class Acc>
void merge_chunk(const Tensor& base, const Tensor& out, const TaskVector* task_vectors, size_t stride, int64_t tasks,
                 const double* coefficients, int64_t first, int64_t n) {
  Acc acc[kChunk];
  float buffer[kChunk];
  dispatch_storage(storage_of(base, "base"), [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    copy_in<Acc, T>(reinterpret_cast<const T*>(bytes(base)) + first, acc, n);
    for (int64_t k = 0; k < tasks; ++k) {
      with_elements(task_vectors[k * stride], first, n, buffer,
                    [&](auto* x) { add_scaled<Acc>(x, static_cast<Acc>(coefficients[k]), acc, n); });
    }
    copy_out<Acc, T>(acc, static_cast<T*>(out.mutable_data_ptr()) + first, n);
  });
}

TensorList weighted_merge(TensorList base, TensorList task_vectors, TensorList scales, TensorList zero_points,
                          std::vector<int64_t> bits, std::vector<int64_t> group_sizes, Tensor coefficients) {
  const size_t layers = base.size();
  const int64_t tasks = coefficients.sizes()[1];
  const Tensor lambda = dense(to_dtype(coefficients, ScalarType::Double));
  const double* lambda_data = reinterpret_cast<const double*>(bytes(lambda));
  const TaskVectors taus(task_vectors, scales, zero_points, bits, group_sizes);
  TensorList out;
  for (Tensor& b : base) {
    b = dense(b);
    out.push_back(torch::stable::empty_like(b));
  }
  const Chunks chunks(base, kChunk);
  parallel_for(0, chunks.count(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t l = chunks.layer_of(c);
      const int64_t first = (c - chunks.start[l]) * kChunk;
      const int64_t n = std::min(kChunk, chunks.numel[l] - first);
      const auto merge = base[l].scalar_type() == ScalarType::Double ? merge_chunk<double> : merge_chunk<float>;
      merge(base[l], out[l], taus.views.data() + l, layers, tasks, lambda_data + l * tasks, first, n);
    }
  });
  return out;
}

// [L, K] inner products <grad_l, task vector k of l>, float64. Every chunk's sum is kept and added in the order of the
// chunks, so the result is the same for any number of threads.
Tensor weighted_merge_grad(TensorList grads, TensorList task_vectors, TensorList scales, TensorList zero_points,
                           std::vector<int64_t> bits, std::vector<int64_t> group_sizes) {
  const int64_t layers = static_cast<int64_t>(grads.size());
  const int64_t tasks = static_cast<int64_t>(task_vectors.size()) / layers;
  const TaskVectors taus(task_vectors, scales, zero_points, bits, group_sizes);
  for (Tensor& g : grads) g = dense(g);
  const Chunks chunks(grads, kChunk);
  std::vector<double> partial(static_cast<size_t>(chunks.count() * tasks));
  parallel_for(0, chunks.count(), 4, [&](int64_t begin, int64_t end) {
    float buffer[kChunk];
    for (int64_t c = begin; c < end; ++c) {
      const int64_t l = chunks.layer_of(c);
      const int64_t first = (c - chunks.start[l]) * kChunk;
      const int64_t n = std::min(kChunk, chunks.numel[l] - first);
      dispatch_storage(storage_of(grads[l], "grads"), [&](auto* type) {
        const auto* g = reinterpret_cast<decltype(type)>(bytes(grads[l])) + first;
        for (int64_t k = 0; k < tasks; ++k) {
          with_elements(taus.views[k * layers + l], first, n, buffer,
                        [&](auto* x) { partial[c * tasks + k] = dot(g, x, n); });
        }
      });
    }
  });
  Tensor out = new_empty(grads[0], {layers, tasks}, ScalarType::Double);
  double* result = static_cast<double*>(out.mutable_data_ptr());
  std::fill(result, result + layers * tasks, 0.0);
  for (int64_t l = 0; l < layers; ++l) {
    for (int64_t c = chunks.start[l]; c < chunks.start[l + 1]; ++c) {
      for (int64_t k = 0; k < tasks; ++k) result[l * tasks + k] += partial[c * tasks + k];
    }
  }
  return out;
}

}  // namespace
}  // namespace statsmerge

STABLE_TORCH_LIBRARY_IMPL(statsmerge, CPU, m) {
  m.impl("weighted_merge", TORCH_BOX(&statsmerge::weighted_merge));
  m.impl("weighted_merge_grad", TORCH_BOX(&statsmerge::weighted_merge_grad));
}
