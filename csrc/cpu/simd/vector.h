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

// N elements of any storage type as N of type Acc (float or double).
template <class Acc, int N, class T>
STATSMERGE_INLINE Vector<Acc, N> load_widened(const T* from) {
  if constexpr (std::is_same_v<T, bf16>) {
    const auto bits = __builtin_convertvector(load<uint16_t, N>(&from->bits), Vector<uint32_t, N>) << 16;
    return __builtin_convertvector(std::bit_cast<Vector<float, N>>(bits), Vector<Acc, N>);
  } else if constexpr (std::is_same_v<T, f16>) {
    // As the scalar `widen`: the product moves the exponent's bias and normalises denormals on the way.
    const auto half = __builtin_convertvector(load<uint16_t, N>(&from->bits), Vector<uint32_t, N>);
    const auto scaled = std::bit_cast<Vector<float, N>>((half & 0x7fffu) << 13) * 0x1p112f;
    const auto special = std::bit_cast<Vector<uint32_t, N>>((half & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    const auto bits = std::bit_cast<Vector<uint32_t, N>>(scaled) | special | ((half & 0x8000u) << 16);
    return __builtin_convertvector(std::bit_cast<Vector<float, N>>(bits), Vector<Acc, N>);
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
