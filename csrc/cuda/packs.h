// How the merge kernels read and write a tensor: in packs of eight elements, of which a thread loads several before it
// uses the first. Eight elements are one or more 16-byte vectors of a floating-point type, and `bits` bytes of codes.
// Compiled for the device and, to be tested, for the host.
#pragma once

#include "common/quantized.h"
#include "cuda/elements.h"

namespace statsmerge::cuda {

constexpr int kPack = 8;  // elements

// The bits of one pack. Memory that is read or written once is marked to leave the caches first.
template <int Bytes>
struct Raw {
  static constexpr int kWords = (Bytes + 3) / 4;
  uint32_t words[kWords];

  // `at` is aligned to the pack, or to 16 bytes where the pack is larger.
  STATSMERGE_HD void load(const char* at) {
#ifdef __CUDA_ARCH__
    if constexpr (Bytes % 16 == 0) {
      STATSMERGE_UNROLL
      for (int i = 0; i < Bytes / 16; ++i) {
        const uint4 v = __ldcs(reinterpret_cast<const uint4*>(at) + i);
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
      }
    } else if constexpr (Bytes == 8) {
      const uint2 v = __ldcs(reinterpret_cast<const uint2*>(at));
      words[0] = v.x, words[1] = v.y;
    } else if constexpr (Bytes == 4) {
      words[0] = __ldcs(reinterpret_cast<const unsigned*>(at));
    } else if constexpr (Bytes == 2) {
      words[0] = __ldcs(reinterpret_cast<const unsigned short*>(at));
    } else {
      words[0] = 0;
      STATSMERGE_UNROLL
      for (int i = 0; i < Bytes; ++i) words[0] |= static_cast<uint32_t>(static_cast<unsigned char>(at[i])) << (8 * i);
    }
#else
    words[kWords - 1] = 0;
    std::memcpy(words, at, Bytes);
#endif
  }

  STATSMERGE_HD void store(char* at) const {
#ifdef __CUDA_ARCH__
    static_assert(Bytes % 16 == 0);
    STATSMERGE_UNROLL
    for (int i = 0; i < Bytes / 16; ++i) {
      __stcs(reinterpret_cast<uint4*>(at) + i,
             make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]));
    }
#else
    std::memcpy(at, words, Bytes);
#endif
  }
};

// What the packed words of a pointer must be aligned to for the loads above.
constexpr int64_t alignment_of(int bits) { return bits == 0 ? 16 : bits == 3 ? 1 : bits; }

// The scale and the zero point of a group; of floating-point task vectors nothing.
struct Group {
  float scale, zero_point;
};

// The groups of one task vector, found without a division where their size is a power of two or the whole tensor.
struct Groups {
  STATSMERGE_HD Groups(const TaskVector& t, int64_t numel) : task_vector(t), shift(-1) {
    if (t.group_size >= numel) {
      shift = 63;
    } else if ((t.group_size & (t.group_size - 1)) == 0) {
#ifdef __CUDA_ARCH__
      shift = __ffsll(t.group_size) - 1;
#else
      shift = std::countr_zero(static_cast<uint64_t>(t.group_size));
#endif
    }
  }
  STATSMERGE_HD Group operator()(int64_t element) const {
    const int64_t group = shift >= 0 ? element >> shift : element / task_vector.group_size;
    return {task_vector.scale[group], static_cast<float>(task_vector.zero_point[group])};
  }

  const TaskVector& task_vector;
  int shift;
};

// Floating-point elements: value = scale() · values[i] with a scale of 1.
template <Storage S>
struct Floating {
  static constexpr bool kGrouped = false;
  static constexpr int kBytes = static_cast<int>(bytes_of(S)) * kPack;

  template <class Acc>
  STATSMERGE_HD static Acc decode(const Raw<kBytes>& raw, const Group&, Acc (&values)[kPack]) {
    STATSMERGE_UNROLL
    for (int i = 0; i < kPack; ++i) {
      if constexpr (S == Storage::f64) {
        const uint64_t low = raw.words[2 * i], high = raw.words[2 * i + 1];
        values[i] = static_cast<Acc>(std::bit_cast<double>(high << 32 | low));
      } else if constexpr (S == Storage::f32) {
        values[i] = float_of(raw.words[i]);
      } else if constexpr (S == Storage::bf16) {
        values[i] = float_of(i % 2 ? raw.words[i / 2] & 0xffff0000u : raw.words[i / 2] << 16);
      } else {
        values[i] = half_to_float(raw.words[i / 2] >> (i % 2 * 16) & 0xffffu);
      }
    }
    return 1;
  }

  template <class Acc>
  STATSMERGE_HD static Raw<kBytes> encode(const Acc (&values)[kPack]) {
    Raw<kBytes> raw;
    STATSMERGE_UNROLL
    for (int i = 0; i < kPack; ++i) {
      if constexpr (S == Storage::f64) {
        const uint64_t bits = std::bit_cast<uint64_t>(static_cast<double>(values[i]));
        raw.words[2 * i] = static_cast<uint32_t>(bits), raw.words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
      } else if constexpr (S == Storage::f32) {
        raw.words[i] = std::bit_cast<uint32_t>(static_cast<float>(values[i]));
      } else {
        const float value = static_cast<float>(values[i]);
        const uint32_t bits = S == Storage::bf16 ? float_to_bfloat16(value) : float_to_half(value);
        raw.words[i / 2] = i % 2 ? raw.words[i / 2] | bits << 16 : bits;
      }
    }
    return raw;
  }
};

// Codes: value = scale · (code − zero point), rounded to float32 as QuantizedTensor.dequantize does. In float32 the scale
// is left to the caller, who has a factor to fold it into.
template <int Bits>
struct Codes {
  static constexpr bool kGrouped = true;
  static constexpr int kBytes = Bits;

  template <class Acc>
  STATSMERGE_HD static Acc decode(const Raw<kBytes>& raw, const Group& group, Acc (&values)[kPack]) {
    constexpr uint32_t mask = (1u << Bits) - 1;
    STATSMERGE_UNROLL
    for (int i = 0; i < kPack; ++i) {
      const int at = i * Bits;
      const uint32_t code = raw.words[at / 32] >> (at % 32) & mask;
      // 2^23 + code has the code in its last bits: cheaper than a conversion, and exact
      const float shifted = (float_of(0x4b000000u | code) - 0x1p23f) - group.zero_point;
      if constexpr (sizeof(Acc) == sizeof(float)) {
        values[i] = shifted;
      } else {
        values[i] = static_cast<Acc>(group.scale * shifted);
      }
    }
    return sizeof(Acc) == sizeof(float) ? static_cast<Acc>(group.scale) : static_cast<Acc>(1);
  }
};

// Calls f with the format of floating-point data that is computed with in Acc: what is computed in float32 has no float64.
template <class Acc, class F>
STATSMERGE_HD void with_floating(Storage storage, const F& f) {
  switch (storage) {
    case Storage::f64:
      if constexpr (sizeof(Acc) == sizeof(double)) f(Floating<Storage::f64>());
      return;
    case Storage::f32:
      return f(Floating<Storage::f32>());
    case Storage::bf16:
      return f(Floating<Storage::bf16>());
    default:
      return f(Floating<Storage::f16>());
  }
}

// Calls f with the format of a task vector.
template <class Acc, class F>
STATSMERGE_HD void with_format(const TaskVector& t, const F& f) {
  switch (t.bits) {
    case 0:
      return with_floating<Acc>(t.storage, f);
    case 2:
      return f(Codes<2>());
    case 3:
      return f(Codes<3>());
    case 4:
      return f(Codes<4>());
    default:
      return f(Codes<8>());
  }
}

// One element of a task vector, wherever it is: the plain route, for what no pack holds.
template <class Acc>
STATSMERGE_HD Acc element(const char* data, Storage storage, int64_t i) {
  switch (storage) {
    case Storage::f64:
      return static_cast<Acc>(reinterpret_cast<const double*>(data)[i]);
    case Storage::f32:
      return reinterpret_cast<const float*>(data)[i];
    case Storage::bf16:
      return float_of(static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(data)[i]) << 16);
    default:
      return half_to_float(reinterpret_cast<const uint16_t*>(data)[i]);
  }
}

template <class Acc>
STATSMERGE_HD Acc element(const TaskVector& t, int64_t i) {
  if (t.bits == 0) return element<Acc>(t.data, t.storage, i);
  const auto* codes = reinterpret_cast<const unsigned char*>(t.data) + i / kPack * t.bits;
  const int at = static_cast<int>(i % kPack) * t.bits;
  uint32_t word = codes[at / 8];
  if (at % 8 + t.bits > 8) word |= static_cast<uint32_t>(codes[at / 8 + 1]) << 8;
  const uint32_t code = word >> (at % 8) & ((1u << t.bits) - 1);
  const int64_t group = i / t.group_size;
  const float shifted = static_cast<float>(code) - static_cast<float>(t.zero_point[group]);
  return static_cast<Acc>(t.scale[group] * shifted);
}

template <class Acc>
STATSMERGE_HD void set_element(char* data, Storage storage, int64_t i, Acc value) {
  switch (storage) {
    case Storage::f64:
      reinterpret_cast<double*>(data)[i] = static_cast<double>(value);
      break;
    case Storage::f32:
      reinterpret_cast<float*>(data)[i] = static_cast<float>(value);
      break;
    case Storage::bf16:
      reinterpret_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(float_to_bfloat16(static_cast<float>(value)));
      break;
    default:
      reinterpret_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(float_to_half(static_cast<float>(value)));
  }
}

}  // namespace statsmerge::cuda
