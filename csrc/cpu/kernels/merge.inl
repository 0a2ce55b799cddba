// Compiled for every target by merge.cpp.
//
// A source is a task vector from some element on. `left` elements share the factor `unit()`; they are read by
//   values<Acc, N>(block, at): N of them from number block + at on, at < 16, where 16 elements from `block` on (8 where
//                              that is told by Block) lie within `left`;
//   value<Acc>(i):             number i.
// `advance` moves the source on by at most `left` elements, to one that is there.
namespace {

template <class T>
struct Stored {
  const T* data;
  int64_t left;

  Stored() = default;
  Stored(const TaskVector& t, int64_t first) : data(reinterpret_cast<const T*>(t.data) + first), left(INT64_MAX) {}

  static constexpr float unit() { return 1; }

  template <class Acc, int N, int Block>
  STATSMERGE_INLINE Vector<Acc, N> values(int64_t block, int at) const {
    return load_widened<Acc, N>(data + block + at);
  }

  template <class Acc>
  STATSMERGE_INLINE Acc value(int64_t i) const {
    return static_cast<Acc>(widen(data[i]));
  }

  void advance(int64_t count) { data += count; }
};

// Two words hold a block of 16 codes, the second of them from code 8 on at bit kSecondBit.
template <int Bits>
struct CodeWords {
  static constexpr int kSecondByte = Bits == 4 ? 4 : Bits == 3 ? 2 : 0;
  static constexpr int kSecondBit = 8 * (Bits - kSecondByte);
  static constexpr uint32_t kShifts[16] = {
      0,
      Bits,
      2 * Bits,
      3 * Bits,
      4 * Bits,
      5 * Bits,
      6 * Bits,
      7 * Bits,
      kSecondBit,
      kSecondBit + Bits,
      kSecondBit + 2 * Bits,
      kSecondBit + 3 * Bits,
      kSecondBit + 4 * Bits,
      kSecondBit + 5 * Bits,
      kSecondBit + 6 * Bits,
      kSecondBit + 7 * Bits,
  };
};

template <int Bits>
struct Codes {
  const unsigned char* data;
  const float* scales;         // from the present group on
  const int32_t* zero_points;  // likewise
  int64_t group_size, left;
  float scale, zero_point;

  Codes() = default;
  Codes(const TaskVector& t, int64_t first)
      : data(reinterpret_cast<const unsigned char*>(t.data) + first / 8 * Bits),
        scales(t.scale + first / t.group_size),
        zero_points(t.zero_point + first / t.group_size),
        group_size(t.group_size),
        left(t.group_size - first % t.group_size),
        scale(*scales),
        zero_point(static_cast<float>(*zero_points)) {}

  float unit() const { return scale; }

  template <class Acc, int N, int Block>
  STATSMERGE_INLINE Vector<Acc, N> values(int64_t block, int at) const {
    Vector<uint32_t, N> codes;
    if constexpr (Bits == 8) {
      codes = load_extended<N>(data + block + at);
    } else {
      const unsigned char* from = data + block / 8 * Bits;
      uint32_t first = 0, second = 0;
      if constexpr (Block == 16) {
        std::memcpy(&first, from, 4);
        std::memcpy(&second, from + CodeWords<Bits>::kSecondByte, 4);
      } else {
        for (int byte = 0; byte < Bits; ++byte) first |= static_cast<uint32_t>(from[byte]) << (8 * byte);
      }
      Vector<uint32_t, N> words;
      if constexpr (N == 16) {
        words = Vector<uint32_t, N>{first,  first,  first,  first,  first,  first,  first,  first,
                                    second, second, second, second, second, second, second, second};
      } else {
        words = (at < 8 ? first : second) - Vector<uint32_t, N>{};
      }
      codes = (words >> load<uint32_t, N>(CodeWords<Bits>::kShifts + at)) & ((1u << Bits) - 1);
    }
    // A small integer in the last bits of 2^23 adds itself to it; one subtraction takes 2^23 and the zero point off.
    const auto raised = std::bit_cast<Vector<float, N>>(codes | std::bit_cast<uint32_t>(0x1p23f));
    return from_float<Acc, N>(raised - (0x1p23f + zero_point));
  }

  template <class Acc>
  STATSMERGE_INLINE Acc value(int64_t i) const {
    uint64_t word = 0;
    std::memcpy(&word, data + i / 8 * Bits, Bits);
    const auto code = static_cast<float>((word >> (i % 8 * Bits)) & ((1u << Bits) - 1));
    return static_cast<Acc>(code - zero_point);
  }

  void advance(int64_t count) {
    data += count / 8 * Bits;
    left -= count;
    if (left > 0) return;
    left = group_size;
    scale = *++scales;
    zero_point = static_cast<float>(*++zero_points);
  }
};

// How many of `count` elements all sources have left.
template <class Source, int N>
STATSMERGE_INLINE int64_t run_length(const Source (&x)[N], int64_t count) {
  for (int k = 0; k < N; ++k) count = x[k].left < count ? x[k].left : count;
  return count;
}

template <int Block, class Acc, class Source, int N>
STATSMERGE_INLINE void merge_block(const Acc* in, Acc* out, const Source (&x)[N], const Acc (&factors)[N], int64_t i,
                                   bool streamed) {
  constexpr int lanes = kLanes<Acc> < Block ? kLanes<Acc> : Block;
#pragma GCC unroll 8
  for (int at = 0; at < Block; at += lanes) {
    Vector<Acc, lanes> sum = load<Acc, lanes>(in + i + at);
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) sum += factors[k] * x[k].template values<Acc, lanes, Block>(i, at);
    if (streamed) {
      store_streamed(out + i + at, sum);
    } else {
      store(out + i + at, sum);
    }
  }
}

// Adds tasks k .. k + N of the chunk: out = in + Σ coefficient · task vector, where `in` may be `out`.
template <class Acc, int N>
struct AddTasks {
  const MergeChunk& chunk;
  int64_t k;
  const Acc* in;
  Acc* out;
  bool streamed;

  template <class Source>
  void run() const {
    Source x[N];
    Acc coefficients[N];
    for (int j = 0; j < N; ++j) {
      x[j] = Source(chunk.task_vectors[(k + j) * chunk.stride], chunk.first);
      coefficients[j] = static_cast<Acc>(chunk.coefficients[k + j]);
    }
    for (int64_t start = 0;;) {
      const int64_t n = run_length(x, chunk.count - start);
      Acc factors[N];
      for (int j = 0; j < N; ++j) factors[j] = coefficients[j] * x[j].unit();
      add_run(x, factors, in + start, out + start, n);
      start += n;
      if (start == chunk.count) break;
      for (int j = 0; j < N; ++j) x[j].advance(n);
    }
  }

  template <class Source>
  STATSMERGE_INLINE void add_run(const Source (&x)[N], const Acc (&factors)[N], const Acc* from, Acc* to,
                                 int64_t n) const {
    const bool past_caches = streamed && reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) merge_block<16>(from, to, x, factors, i, past_caches);
    for (; i + 8 <= n; i += 8) merge_block<8>(from, to, x, factors, i, false);
    for (; i < n; ++i) {
      Acc sum = from[i];
      for (int j = 0; j < N; ++j) sum += factors[j] * x[j].template value<Acc>(i);
      to[i] = sum;
    }
  }
};

template <int Block, class G, class Source, int N>
STATSMERGE_INLINE void product_block(const G* g, const Source (&x)[N], int64_t i, Vector<double> (&sums)[N]) {
  constexpr int lanes = kLanes<double>;
#pragma GCC unroll 8
  for (int at = 0; at < Block; at += lanes) {
    const Vector<double> gradient = load_widened<double, lanes>(g + i + at);
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) sums[j] += gradient * x[j].template values<double, lanes, Block>(i, at);
  }
}

// products[j] = <g, task vector k + j> over the chunk, where g starts.
template <class G, int N>
struct ProductsOfTasks {
  const MergeChunk& chunk;
  int64_t k;
  const G* gradient;
  double* products;

  template <class Source>
  void run() const {
    Source x[N];
    Vector<double> totals[N] = {};
    double rest[N] = {};
    for (int j = 0; j < N; ++j) x[j] = Source(chunk.task_vectors[(k + j) * chunk.stride], chunk.first);
    for (int64_t start = 0;;) {
      const int64_t n = run_length(x, chunk.count - start);
      const G* g = gradient + start;
      Vector<double> sums[N] = {};
      int64_t i = 0;
      for (; i + 16 <= n; i += 16) product_block<16>(g, x, i, sums);
      for (; i + 8 <= n; i += 8) product_block<8>(g, x, i, sums);
      for (; i < n; ++i) {
        for (int j = 0; j < N; ++j) rest[j] += g[i] * (x[j].unit() * x[j].template value<double>(i));
      }
      for (int j = 0; j < N; ++j) totals[j] += x[j].unit() * sums[j];
      start += n;
      if (start == chunk.count) break;
      for (int j = 0; j < N; ++j) x[j].advance(n);
    }
    for (int j = 0; j < N; ++j) products[j] = sum<double>(totals[j]) + rest[j];
  }
};

// Runs `work` with the source that reads `t`.
template <class Work>
void run_with_source(const TaskVector& t, const Work& work) {
  switch (t.bits) {
    case 2:
      return work.template run<Codes<2>>();
    case 3:
      return work.template run<Codes<3>>();
    case 4:
      return work.template run<Codes<4>>();
    case 8:
      return work.template run<Codes<8>>();
  }
  switch (t.storage) {
    case Storage::f64:
      return work.template run<Stored<double>>();
    case Storage::f32:
      return work.template run<Stored<float>>();
    case Storage::bf16:
      return work.template run<Stored<bf16>>();
    case Storage::f16:
      return work.template run<Stored<f16>>();
  }
}

// How many of the tasks from number k on are taken together: 4 that are read alike, or 1.
int64_t group_length(const MergeChunk& chunk, int64_t k) {
  const TaskVector& t = chunk.task_vectors[k * chunk.stride];
  if (k + 4 > chunk.tasks) return 1;
  for (int64_t next = k + 1; next < k + 4; ++next) {
    const TaskVector& other = chunk.task_vectors[next * chunk.stride];
    if (other.bits != t.bits || other.storage != t.storage) return 1;
  }
  return 4;
}

template <class T>
void merge_chunk_of(const MergeChunk& chunk) {
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const T* base = reinterpret_cast<const T*>(chunk.layer->in) + chunk.first;
  T* out = reinterpret_cast<T*>(chunk.layer->out) + chunk.first;
  if (chunk.tasks == 0) {
    std::memcpy(out, base, static_cast<size_t>(chunk.count) * sizeof(T));
    return;
  }
  alignas(64) Acc sums[kChunk];
  const Acc* in = sums;
  if constexpr (std::is_same_v<T, Acc>) {
    in = base;
  } else {
    for (int64_t i = 0; i < chunk.count; ++i) sums[i] = widen(base[i]);
  }
  for (int64_t k = 0, n; k < chunk.tasks; k += n) {
    n = group_length(chunk, k);
    const TaskVector& t = chunk.task_vectors[k * chunk.stride];
    Acc* to = sums;
    bool streamed = false;
    if constexpr (std::is_same_v<T, Acc>) {
      if (k + n == chunk.tasks) {
        to = out;
        streamed = chunk.streamed;
      }
    }
    if (n == 4) {
      run_with_source(t, AddTasks<Acc, 4>{chunk, k, in, to, streamed});
    } else {
      run_with_source(t, AddTasks<Acc, 1>{chunk, k, in, to, streamed});
    }
    in = sums;
  }
  if constexpr (!std::is_same_v<T, Acc>) {
    for (int64_t i = 0; i < chunk.count; ++i) out[i] = narrow<T>(sums[i]);
  }
}

void merge_chunk(const MergeChunk& chunk) {
  switch (chunk.layer->storage) {
    case Storage::f64:
      return merge_chunk_of<double>(chunk);
    case Storage::f32:
      return merge_chunk_of<float>(chunk);
    case Storage::bf16:
      return merge_chunk_of<bf16>(chunk);
    case Storage::f16:
      return merge_chunk_of<f16>(chunk);
  }
}

template <class T>
void products_of(const MergeChunk& chunk, double* products) {
  using G = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const T* stored = reinterpret_cast<const T*>(chunk.layer->in) + chunk.first;
  alignas(64) G widened[std::is_same_v<T, G> ? 1 : kChunk];
  const G* g = widened;
  if constexpr (std::is_same_v<T, G>) {
    g = stored;
  } else {
    for (int64_t i = 0; i < chunk.count; ++i) widened[i] = widen(stored[i]);
  }
  for (int64_t k = 0, n; k < chunk.tasks; k += n) {
    n = group_length(chunk, k);
    const TaskVector& t = chunk.task_vectors[k * chunk.stride];
    if (n == 4) {
      run_with_source(t, ProductsOfTasks<G, 4>{chunk, k, g, products + k});
    } else {
      run_with_source(t, ProductsOfTasks<G, 1>{chunk, k, g, products + k});
    }
  }
}

void chunk_products(const MergeChunk& chunk, double* products) {
  switch (chunk.layer->storage) {
    case Storage::f64:
      return products_of<double>(chunk, products);
    case Storage::f32:
      return products_of<float>(chunk, products);
    case Storage::bf16:
      return products_of<bf16>(chunk, products);
    case Storage::f16:
      return products_of<f16>(chunk, products);
  }
}

constexpr MergeKernels kMergeKernels{&merge_chunk, &chunk_products};

}  // namespace
