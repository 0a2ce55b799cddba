// Compiled for every target by block_products.cpp. The sums of four rows and four vectors stay in registers where the
// target has 32 of them, those of two rows where it has 16.

constexpr int kTileRows = kRegisters >= 32 ? 4 : 2;

// The lane of the pair (a, b) that comes `offset` after the first of the two that fold adds up for lane i.
template <class Real, int Distance>
constexpr int folded_lane(int i, int offset) {
  return i / Distance % 2 * kLanes<Real> + i - i % (2 * Distance) + i % Distance + offset;
}

// Sums of lanes a Distance apart: a's in the even groups of that many lanes, b's in the odd ones.
template <class Real, int Distance, int... I>
STATSMERGE_INLINE Vector<Real> fold(Vector<Real> a, Vector<Real> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, folded_lane<Real, Distance>(I, 0)...) +
         __builtin_shufflevector(a, b, folded_lane<Real, Distance>(I, Distance)...);
}

// Lane i becomes the sum of all lanes of v[i], once Distance has grown to half the lanes.
template <class Real, int Distance>
STATSMERGE_INLINE Vector<Real> sum_each(const Vector<Real>* v) {
  if constexpr (Distance == 0) {
    return v[0];
  } else {
    return fold<Real, Distance>(sum_each<Real, Distance / 2>(v), sum_each<Real, Distance / 2>(v + Distance),
                                std::make_integer_sequence<int, kLanes<Real>>());
  }
}

// A row of a matrix, and one of T minus one of U.
template <class Real, class T, class U>
struct Row {
  using Common = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<U, double>, double, float>;

  STATSMERGE_INLINE void point_to(const SourceRows& source, int64_t r) {
    x = reinterpret_cast<const T*>(source.rows[r]);
    y = reinterpret_cast<const U*>(source.minus[r]);
  }
  STATSMERGE_INLINE Vector<Real> at(int64_t i) const { return difference(x + i, y + i); }
  STATSMERGE_INLINE Vector<Real> tail(int64_t i, int64_t count) const {
    T x_part[kLanes<Real>] = {};
    U y_part[kLanes<Real>] = {};
    std::memcpy(x_part, x + i, static_cast<size_t>(count) * sizeof(T));
    std::memcpy(y_part, y + i, static_cast<size_t>(count) * sizeof(U));
    return difference(x_part, y_part);
  }
  static STATSMERGE_INLINE Vector<Real> difference(const T* x, const U* y) {
    return __builtin_convertvector(
        (load_widened<Common, kLanes<Real>>(x) - load_widened<Common, kLanes<Real>>(y)), Vector<Real>);
  }

  const T* x;
  const U* y;
};

template <class Real, class T>
struct Row<Real, T, void> {
  STATSMERGE_INLINE void point_to(const SourceRows& source, int64_t r) {
    x = reinterpret_cast<const T*>(source.rows[r]);
  }
  STATSMERGE_INLINE Vector<Real> at(int64_t i) const { return load_widened<Real, kLanes<Real>>(x + i); }
  STATSMERGE_INLINE Vector<Real> tail(int64_t i, int64_t count) const {
    T part[kLanes<Real>] = {};
    std::memcpy(part, x + i, static_cast<size_t>(count) * sizeof(T));
    return load_widened<Real, kLanes<Real>>(part);
  }

  const T* x;
};

// sums[4 r + c] += x[r] · (what vector c holds at this place)
template <class Real>
STATSMERGE_INLINE void add_products(const Vector<Real>* x, const Real* v, int64_t stride, Vector<Real>* sums) {
  Vector<Real> factors[kBlock];
  for (int64_t c = 0; c < kBlock; ++c) factors[c] = load(v + c * stride);
  for (int64_t r = 0; r < kTileRows; ++r) {
    for (int64_t c = 0; c < kBlock; ++c) sums[r * kBlock + c] += x[r] * factors[c];
  }
}

template <class Real>
STATSMERGE_INLINE void store_sums(const Vector<Real>* sums, Real* y) {
  constexpr int lanes = kLanes<Real>;
  for (int i = 0; i < kTileRows * kBlock; i += lanes) store(y + i, sum_each<Real, lanes / 2>(sums + i));
}

template <class Real, class T, class U>
void widened(const SourceRows& source, int64_t n, const Real* v, int64_t stride, Real* tile, Real* y) {
  constexpr int64_t lanes = kLanes<Real>;
  for (int64_t first = 0; first < kBlock; first += kTileRows) {
    Row<Real, T, U> rows[kTileRows];
    for (int64_t r = 0; r < kTileRows; ++r) rows[r].point_to(source, first + r);
    Real* out = tile + first * stride;
    Vector<Real> sums[kTileRows * kBlock] = {};
    Vector<Real> x[kTileRows];
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      for (int64_t r = 0; r < kTileRows; ++r) x[r] = rows[r].at(i);
      add_products(x, v + i, stride, sums);
      for (int64_t r = 0; r < kTileRows; ++r) store(out + r * stride + i, x[r]);
    }
    if (i < n) {
      for (int64_t r = 0; r < kTileRows; ++r) x[r] = rows[r].tail(i, n - i);
      add_products(x, v + i, stride, sums);
      for (int64_t r = 0; r < kTileRows; ++r) store(out + r * stride + i, x[r]);
    }
    store_sums(sums, y + first * kBlock);
  }
}

template <class Real>
void products(const Real* rows, const Real* v, int64_t n, int64_t stride, Real* y) {
  for (int64_t first = 0; first < kBlock; first += kTileRows) {
    const Real* tile = rows + first * stride;
    Vector<Real> sums[kTileRows * kBlock] = {};
    for (int64_t i = 0; i < n; i += kLanes<Real>) {
      Vector<Real> x[kTileRows];
      for (int64_t r = 0; r < kTileRows; ++r) x[r] = load(tile + r * stride + i);
      add_products(x, v + i, stride, sums);
    }
    store_sums(sums, y + first * kBlock);
  }
}

template <class Real>
void combine(const Real* rows, const Real* y, int64_t n, int64_t stride, Real* w, const SourceRows* next) {
  const int64_t bytes = next ? bytes_of(next->storage) : 0;
  Vector<Real> factors[kBlock * kBlock];
  for (int64_t i = 0; i < kBlock * kBlock; ++i) factors[i] = broadcast(y[i]);
  for (int64_t i = 0; i < n; i += kLanes<Real>) {
    Vector<Real> x[kBlock];
    for (int64_t r = 0; r < kBlock; ++r) x[r] = load(rows + r * stride + i);
    for (int64_t c = 0; c < kBlock; ++c) {
      Vector<Real> sum = load(w + c * stride + i);
      for (int64_t r = 0; r < kBlock; ++r) sum += factors[r * kBlock + c] * x[r];
      store(w + c * stride + i, sum);
    }
    if (!next) continue;
    for (int64_t r = 0; r < kBlock; ++r) __builtin_prefetch(next->rows[r] + i * bytes, 0, 2);
  }
}

template <class Real>
void add_moments(const Real* row, int64_t n, double scale, double origin, double* sums) {
  constexpr int64_t lanes = kLanes<double>;
  const Vector<double> scales = broadcast(scale), origins = broadcast(origin);
  Vector<double> deviations[2] = {}, squares[2] = {}, norms[2] = {};
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    for (int64_t part = 0; part < 2; ++part) {
      const Vector<double> x = load_widened<double, kLanes<double>>(row + i + part * lanes) * scales;
      const Vector<double> deviation = x - origins;
      deviations[part] += deviation;
      squares[part] += deviation * deviation;
      norms[part] += x * x;
    }
  }
  sums[0] += sum<double>(deviations[0] + deviations[1]);
  sums[1] += sum<double>(squares[0] + squares[1]);
  sums[2] += sum<double>(norms[0] + norms[1]);
  for (; i < n; ++i) {
    const double x = static_cast<double>(row[i]) * scale, deviation = x - origin;
    sums[0] += deviation;
    sums[1] += deviation * deviation;
    sums[2] += x * x;
  }
}

// [storage][0: nothing subtracted, 1 + minus_storage]
#define STATSMERGE_WIDENED(Real, T)                                                                          \
  {                                                                                                          \
    &widened<Real, T, void>, &widened<Real, T, double>, &widened<Real, T, float>, &widened<Real, T, bf16>,   \
        &widened<Real, T, f16>                                                                               \
  }
#define STATSMERGE_WIDENED_SINGLE(T) \
  { &widened<float, T, void>, nullptr, &widened<float, T, float>, &widened<float, T, bf16>, &widened<float, T, f16> }

inline constexpr BlockProductsTable<double> kDoubleProducts{
    {STATSMERGE_WIDENED(double, double), STATSMERGE_WIDENED(double, float), STATSMERGE_WIDENED(double, bf16),
     STATSMERGE_WIDENED(double, f16)},
    &products<double>,
    &combine<double>,
    &add_moments<double>};
inline constexpr BlockProductsTable<float> kSingleProducts{
    {{}, STATSMERGE_WIDENED_SINGLE(float), STATSMERGE_WIDENED_SINGLE(bf16), STATSMERGE_WIDENED_SINGLE(f16)},
    &products<float>,
    &combine<float>,
    &add_moments<float>};

#undef STATSMERGE_WIDENED
#undef STATSMERGE_WIDENED_SINGLE
