// Compiled for every target by cholesky.cpp.

// Columns of x that are solved for at a time, and rows of them held in registers.
constexpr int kStripVectors = 3;
constexpr int64_t kStrip = kStripVectors * kLanes<double>;
constexpr int kTileRows = kRegisters == 32 ? 8 : 4;

// The upper triangle of a block of at most kLeaf rows becomes its factor; what is below is left alone.
bool factor_leaf(double* c, int64_t stride, int64_t n, double least) {
  constexpr int64_t lanes = kLanes<double>;
  alignas(64) double block[kLeaf * kLeaf] = {};
  for (int64_t i = 0; i < n; ++i) std::memcpy(block + i * kLeaf + i, c + i * stride + i, (n - i) * sizeof(double));
  for (int64_t k = 0; k < n; ++k) {
    double* pivot = block + k * kLeaf;
    if (!(pivot[k] > least) || pivot[k] > std::numeric_limits<double>::max()) return false;
    const double diagonal = std::sqrt(pivot[k]), inverse = 1 / diagonal;
    pivot[k] = diagonal;
    for (int64_t j = k + 1; j < n; ++j) pivot[j] *= inverse;
    for (int64_t i = k + 1; i < n; ++i) {
      double* row = block + i * kLeaf;
      const Vector<double> factor = broadcast(pivot[i]);
      for (int64_t j = i / lanes * lanes; j < n; j += lanes) store(row + j, load(row + j) - factor * load(pivot + j));
    }
  }
  for (int64_t i = 0; i < n; ++i) std::memcpy(c + i * stride + i, block + i * kLeaf + i, (n - i) * sizeof(double));
  return true;
}

// Rows [first, first + Rows) of a strip, those above being solved for already. `left` counts the rows that exist.
STATSMERGE_INLINE void solve_tile(const TriangleView& t, int64_t first, int64_t left, double* strip) {
  constexpr int64_t lanes = kLanes<double>;
  Vector<double> x[kTileRows][kStripVectors];
  const double* row[kTileRows];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    row[r] = t.data + (first + (r < left ? r : 0)) * t.row_stride;
#pragma GCC unroll 3
    for (int v = 0; v < kStripVectors; ++v) x[r][v] = load(strip + (first + r) * kStrip + v * lanes);
  }
  for (int64_t k = 0; k < first; ++k) {
    Vector<double> above[kStripVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kStripVectors; ++v) above[v] = load(strip + k * kStrip + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Vector<double> factor = broadcast(row[r][k * t.column_stride]);
#pragma GCC unroll 3
      for (int v = 0; v < kStripVectors; ++v) x[r][v] -= factor * above[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    if (r >= left) return;
    const double inverse = 1 / row[r][(first + r) * t.column_stride];
#pragma GCC unroll 3
    for (int v = 0; v < kStripVectors; ++v) {
      x[r][v] *= inverse;
      store(strip + (first + r) * kStrip + v * lanes, x[r][v]);
    }
#pragma GCC unroll 8
    for (int s = r + 1; s < kTileRows; ++s) {
      const Vector<double> factor = broadcast(row[s][(first + r) * t.column_stride]);
#pragma GCC unroll 3
      for (int v = 0; v < kStripVectors; ++v) x[s][v] -= factor * x[r][v];
    }
  }
}

// x [n, columns] <- T⁻¹ x for a lower triangular T of at most kLeaf rows.
void solve_leaf(const TriangleView& t, int64_t n, double* x, int64_t stride, int64_t columns) {
  alignas(64) double strip[(kLeaf + kTileRows) * kStrip];
  for (int64_t column = 0; column < columns; column += kStrip) {
    const int64_t width = columns - column < kStrip ? columns - column : kStrip;
    for (int64_t i = 0; i < n; ++i) {
      std::memcpy(strip + i * kStrip, x + i * stride + column, width * sizeof(double));
      for (int64_t j = width; j < kStrip; ++j) strip[i * kStrip + j] = 0;
    }
    std::memset(strip + n * kStrip, 0, kTileRows * kStrip * sizeof(double));
    for (int64_t first = 0; first < n; first += kTileRows) solve_tile(t, first, n - first, strip);
    for (int64_t i = 0; i < n; ++i) std::memcpy(x + i * stride + column, strip + i * kStrip, width * sizeof(double));
  }
}

// One row of a pivoted factorisation: row -= Σ_t factors[t · stride] · above[t · stride ..], times `scale`; its squares
// leave the diagonal.
void pivot_row(const double* above, const double* factors, int64_t count, int64_t stride, double scale, double* row,
               double* diagonal, int64_t n) {
  constexpr int64_t lanes = kLanes<double>;
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    Vector<double> sums[4];
    for (int v = 0; v < 4; ++v) sums[v] = load(row + i + v * lanes);
    for (int64_t t = 0; t < count; ++t) {
      const Vector<double> factor = broadcast(factors[t * stride]);
      for (int v = 0; v < 4; ++v) sums[v] -= factor * load(above + t * stride + i + v * lanes);
    }
    for (int v = 0; v < 4; ++v) {
      sums[v] *= scale;
      store(row + i + v * lanes, sums[v]);
      store(diagonal + i + v * lanes, load(diagonal + i + v * lanes) - sums[v] * sums[v]);
    }
  }
  for (; i < n; ++i) {
    double sum = row[i];
    for (int64_t t = 0; t < count; ++t) sum -= factors[t * stride] * above[t * stride + i];
    row[i] = sum * scale;
    diagonal[i] -= row[i] * row[i];
  }
}

inline constexpr CholeskyKernels kCholesky{&factor_leaf, &solve_leaf, &pivot_row};
