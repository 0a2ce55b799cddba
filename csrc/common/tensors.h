// Between torch tensors and the kernels: element types, and pointers to contiguous data.
#pragma once

#include "common/convert.h"
#include "common/torch_api.h"

namespace statsmerge {

inline Storage storage_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return Storage::f64;
    case ScalarType::Float:
      return Storage::f32;
    case ScalarType::BFloat16:
      return Storage::bf16;
    case ScalarType::Half:
      return Storage::f16;
    default:
      check(false, name, ": expected float64, float32, bfloat16 or float16");
      return Storage::f32;
  }
}

inline Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline const char* bytes(const Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); }

}  // namespace statsmerge
