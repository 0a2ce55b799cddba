// Conversions of tensors' elements, with the device's own instructions where it has some. Compiled for the device and,
// to be tested, for the host.
#pragma once

#include <bit>

#include "common/convert.h"
#include "cuda/host_device.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace statsmerge::cuda {

STATSMERGE_HD float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

STATSMERGE_HD float half_to_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
#else
  return widen(f16{static_cast<uint16_t>(bits)});
#endif
}

// Round to nearest even.
STATSMERGE_HD uint32_t float_to_half(float x) {
#ifdef __CUDA_ARCH__
  return __half_as_ushort(__float2half_rn(x));
#else
  return narrow<f16>(x).bits;
#endif
}

STATSMERGE_HD uint32_t float_to_bfloat16(float x) {
#ifdef __CUDA_ARCH__
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  return narrow<bf16>(x).bits;
#endif
}

// An element in the type that it is computed with.
STATSMERGE_HD double to_acc(double x) { return x; }
STATSMERGE_HD float to_acc(float x) { return x; }
STATSMERGE_HD float to_acc(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
STATSMERGE_HD float to_acc(f16 x) { return half_to_float(x.bits); }

}  // namespace statsmerge::cuda
