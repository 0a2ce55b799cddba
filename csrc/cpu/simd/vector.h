// Vectors of as many elements as a register of the target holds, on the compiler's own vector types: arithmetic is
// written with operators, and a multiplication followed by an addition becomes one fused instruction where the target
// has it. Included by every_target.h only, once for every target.

constexpr int kVectorBytes = STATSMERGE_VECTOR_BYTES;
constexpr int kRegisters = STATSMERGE_REGISTERS;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int N>
struct VectorType {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N = kLanes<T>>
using Vector = typename VectorType<T, N>::type;

// Unaligned.
template <class T, int N = kLanes<T>>
STATSMERGE_INLINE Vector<T, N> load(const T* from) {
  Vector<T, N> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T, class V>
STATSMERGE_INLINE void store(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// Past the caches, where the target has such a store; `to` must be aligned to the vector's size. Other threads see it
// for certain after finish_streamed().
template <class T, class V>
STATSMERGE_INLINE void store_streamed(T* to, V v) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), std::bit_cast<__m512i>(v));
  } else if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), std::bit_cast<__m256i>(v));
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), std::bit_cast<__m128i>(v));
  }
#else
  store(to, v);
#endif
}

STATSMERGE_INLINE void finish_streamed() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class T>
STATSMERGE_INLINE Vector<T> broadcast(T x) {
  return x - Vector<T>{};
}

// The first `count` elements, zeros behind them.
template <class T>
STATSMERGE_INLINE Vector<T> load_part(const T* from, int64_t count) {
  Vector<T> v{};
  std::memcpy(&v, from, static_cast<size_t>(count) * sizeof(T));
  return v;
}

template <class T>
STATSMERGE_INLINE void store_part(T* to, Vector<T> v, int64_t count) {
  std::memcpy(to, &v, static_cast<size_t>(count) * sizeof(T));
}

// Conversions that the compiler's own form would take apart on x86: to twice the width or more in one instruction. (Of
// the intrinsics the masked forms are used, as the others make GCC warn of their own undefined operands.)

// N unsigned integers of 8 or 16 bits as N of 32 bits.
template <int N, class T>
STATSMERGE_INLINE Vector<uint32_t, N> load_extended(const T* from) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes >= 32 && N >= 4) {
    __m128i low{};
    std::memcpy(&low, from, N * sizeof(T) < 16 ? N * sizeof(T) : 16);
    if constexpr (sizeof(T) == 1 && N == 16 && kVectorBytes == 64) {
      return std::bit_cast<Vector<uint32_t, N>>(_mm512_maskz_cvtepu8_epi32(0xffff, low));
    } else if constexpr (sizeof(T) == 1 && N == 8) {
      return std::bit_cast<Vector<uint32_t, N>>(_mm256_cvtepu8_epi32(low));
    } else if constexpr (sizeof(T) == 1 && N == 4) {
      return std::bit_cast<Vector<uint32_t, N>>(_mm_cvtepu8_epi32(low));
    } else if constexpr (sizeof(T) == 2 && N == 16 && kVectorBytes == 64) {
      return std::bit_cast<Vector<uint32_t, N>>(_mm512_maskz_cvtepu16_epi32(0xffff, std::bit_cast<__m256i>(load<T, N>(from))));
    } else if constexpr (sizeof(T) == 2 && N == 8) {
      return std::bit_cast<Vector<uint32_t, N>>(_mm256_cvtepu16_epi32(low));
    } else if constexpr (sizeof(T) == 2 && N == 4) {
      return std::bit_cast<Vector<uint32_t, N>>(_mm_cvtepu16_epi32(low));
    }
  }
#endif
  return __builtin_convertvector((load<T, N>(from)), Vector<uint32_t, N>);
}

// Floats as floats or doubles.
template <class Acc, int N>
STATSMERGE_INLINE Vector<Acc, N> from_float(Vector<float, N> v) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<Acc, double> && N == 8 && kVectorBytes == 64) {
    return std::bit_cast<Vector<Acc, N>>(_mm512_maskz_cvtps_pd(0xff, std::bit_cast<__m256>(v)));
  } else if constexpr (std::is_same_v<Acc, double> && N == 4 && kVectorBytes >= 32) {
    return std::bit_cast<Vector<Acc, N>>(_mm256_cvtps_pd(std::bit_cast<__m128>(v)));
  }
#endif
  return __builtin_convertvector(v, Vector<Acc, N>);
}

// N elements of any storage type as N of type Acc (float or double).
template <class Acc, int N, class T>
STATSMERGE_INLINE Vector<Acc, N> load_widened(const T* from) {
  if constexpr (std::is_same_v<T, bf16>) {
    return from_float<Acc, N>(std::bit_cast<Vector<float, N>>(load_extended<N>(&from->bits) << 16));
  } else if constexpr (std::is_same_v<T, f16>) {
    // As the scalar `widen`: the product moves the exponent's bias and normalises denormals on the way.
    const auto half = load_extended<N>(&from->bits);
    const auto scaled = std::bit_cast<Vector<float, N>>((half & 0x7fffu) << 13) * 0x1p112f;
    const auto special = std::bit_cast<Vector<uint32_t, N>>((half & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    const auto bits = std::bit_cast<Vector<uint32_t, N>>(scaled) | special | ((half & 0x8000u) << 16);
    return from_float<Acc, N>(std::bit_cast<Vector<float, N>>(bits));
  } else if constexpr (std::is_same_v<T, float>) {
    return from_float<Acc, N>(load<T, N>(from));
  } else {
    return __builtin_convertvector((load<T, N>(from)), Vector<Acc, N>);
  }
}

// The sum of all elements, halves added to halves: the same for every call.
template <class T, int N>
STATSMERGE_INLINE T sum_lanes(const T* lanes) {
  if constexpr (N == 1) {
    return lanes[0];
  } else {
    return sum_lanes<T, N / 2>(lanes) + sum_lanes<T, N / 2>(lanes + N / 2);
  }
}

template <class T>
STATSMERGE_INLINE T sum(Vector<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  return sum_lanes<T, kLanes<T>>(lanes);
}

// Elements of a and b in turn: of their lower halves, or of their upper ones.
template <bool kUpper, class V, int... I>
STATSMERGE_INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I), start = kUpper ? n / 2 : 0;
  return __builtin_shufflevector(a, b, (start + I / 2 + (I % 2 ? n : 0))...);
}

// Transposes N vectors of N elements: log2(N) perfect shuffles.
template <class T, int N>
STATSMERGE_INLINE void transpose(Vector<T, N> (&rows)[N]) {
  constexpr auto indices = std::make_integer_sequence<int, N>{};
#pragma GCC unroll 4
  for (int stage = 1; stage < N; stage *= 2) {
    Vector<T, N> shuffled[N];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      shuffled[2 * i] = interleave<false>(rows[i], rows[i + N / 2], indices);
      shuffled[2 * i + 1] = interleave<true>(rows[i], rows[i + N / 2], indices);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) rows[i] = shuffled[i];
  }
}
