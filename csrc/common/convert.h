// Floating-point storage types as bit patterns, without torch: conversions that a compiler vectorises.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

// For helpers that are to be compiled into every instruction set's own kernels.
#define STATSMERGE_INLINE inline __attribute__((always_inline))

namespace statsmerge {

enum class Storage { f64, f32, bf16, f16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

STATSMERGE_INLINE double widen(double x) { return x; }
STATSMERGE_INLINE float widen(float x) { return x; }
STATSMERGE_INLINE float widen(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// The multiplication by 2^112 moves the exponent's bias from 15 to 127 and normalises denormals on the way.
STATSMERGE_INLINE float widen(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const float scaled = std::bit_cast<float>(static_cast<uint32_t>(x.bits & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

template <class T>
T narrow(double x);

template <>
STATSMERGE_INLINE double narrow<double>(double x) {
  return x;
}

template <>
STATSMERGE_INLINE float narrow<float>(double x) {
  return static_cast<float>(x);
}

// Round to nearest even; NaN stays NaN.
template <>
STATSMERGE_INLINE bf16 narrow<bf16>(double x) {
  const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(x));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded)};
}

// Round to nearest even, denormals and overflow included; NaN stays NaN.
template <>
STATSMERGE_INLINE f16 narrow<f16>(double x) {
  const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(x));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // denormal: let the addition of 0.5 do the rounding at 2^-24
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(half | sign)};
}

// Calls f with a null pointer of the element type that `storage` stands for.
template <class F>
STATSMERGE_INLINE auto dispatch_storage(Storage storage, const F& f) {
  switch (storage) {
    case Storage::f64:
      return f(static_cast<const double*>(nullptr));
    case Storage::f32:
      return f(static_cast<const float*>(nullptr));
    case Storage::bf16:
      return f(static_cast<const bf16*>(nullptr));
    default:
      return f(static_cast<const f16*>(nullptr));
  }
}

constexpr int64_t bytes_of(Storage storage) { return storage == Storage::f64 ? 8 : storage == Storage::f32 ? 4 : 2; }

}  // namespace statsmerge
