// Compiled for every target by symmetric_eigen.cpp. Rows are padded with zeros to whole vectors; what a step has done
// with is zero in its vectors, so loops start at a whole vector too.

STATSMERGE_INLINE double inner(const double* x, const double* y, int64_t begin, int64_t end) {
  Vector<double> sums{};
  for (int64_t j = begin; j < end; j += kLanes<double>) sums += load(x + j) * load(y + j);
  return sum<double>(sums);
}

STATSMERGE_INLINE void add_multiple(double factor, const double* x, double* y, int64_t begin, int64_t end) {
  const Vector<double> factors = broadcast(factor);
  for (int64_t j = begin; j < end; j += kLanes<double>) store(y + j, load(y + j) + factors * load(x + j));
}

// Beside entries of about 1. The squares of what is smaller would leave the range.
constexpr double kNegligible = 0x1p-500;
// An off-diagonal entry of the tridiagonal matrix that the rounding of its neighbours in the reduction hides. Among many
// eigenvalues of zero all that is left is rounding, of any size, which need not converge.
constexpr double kHidden = 0x1p-56;

// a becomes tridiagonal with diagonal d and subdiagonal e. Row k of a becomes the vector v of the reflection
// 1 − beta[k] v vᵀ; `p` is a row of zeros to work in.
void tridiagonalize(double* a, int64_t n, int64_t stride, double* d, double* e, double* beta, double* p) {
  for (int64_t k = 0; k + 1 < n; ++k) {
    double* v = a + k * stride;
    const int64_t begin = (k + 1) / kLanes<double> * kLanes<double>;
    d[k] = v[k];
    for (int64_t j = 0; j <= k; ++j) v[j] = 0;
    p[k] = 0;
    beta[k] = 0;
    e[k] = v[k + 1];
    if (k + 2 == n) break;
    const double norm = __builtin_sqrt(inner(v, v, begin, stride));
    if (norm < kNegligible) {
      e[k] = 0;
      continue;
    }
    e[k] = v[k + 1] > 0 ? -norm : norm;
    v[k + 1] -= e[k];
    beta[k] = 2 / inner(v, v, begin, stride);
    double along = 0;
    for (int64_t i = k + 1; i < n; ++i) {
      p[i] = beta[k] * inner(a + i * stride, v, begin, stride);
      along += p[i] * v[i];
    }
    add_multiple(-beta[k] / 2 * along, v, p, begin, stride);
    for (int64_t i = k + 1; i < n; ++i) {
      double* row = a + i * stride;
      const Vector<double> v_i = broadcast(v[i]), p_i = broadcast(p[i]);
      for (int64_t j = begin; j < stride; j += kLanes<double>) {
        store(row + j, load(row + j) - v_i * load(p + j) - p_i * load(v + j));
      }
    }
  }
  d[n - 1] = a[(n - 1) * stride + n - 1];
}

// x becomes xᵀ Q for the product Q of all reflections.
void reflect(const double* a, int64_t n, int64_t stride, const double* beta, double* x) {
  for (int64_t k = 0; k + 2 < n; ++k) {
    const double* v = a + k * stride;
    const int64_t begin = (k + 1) / kLanes<double> * kLanes<double>;
    add_multiple(-beta[k] * inner(x, v, begin, stride), v, x, begin, stride);
  }
}

// Diagonalises (d, e) by implicit QL; the rotations act on the rows of z, `width` apart. False if it does not converge.
bool implicit_ql(int64_t n, double* d, double* e, double* z, int64_t width) {
  e[n - 1] = 0;
  for (int64_t l = 0; l < n; ++l) {
    for (int iteration = 0;; ++iteration) {
      int64_t m = l;
      for (; m < n - 1; ++m) {
        const double beside = 0x1p-52 * (__builtin_fabs(d[m]) + __builtin_fabs(d[m + 1]));
        if (__builtin_fabs(e[m]) <= (beside > kHidden ? beside : kHidden)) break;
      }
      if (m == l) break;
      if (iteration == 100) return false;
      double g = (d[l + 1] - d[l]) / (2 * e[l]);
      g = d[m] - d[l] + e[l] / (g + __builtin_copysign(__builtin_hypot(g, 1.0), g));
      double s = 1, c = 1, shift = 0;
      int64_t i = m - 1;
      for (; i >= l; --i) {
        const double f = s * e[i], b = c * e[i];
        const double r = __builtin_sqrt(f * f + g * g);
        e[i + 1] = r;
        if (r < kNegligible) {
          d[i + 1] -= shift;
          e[i + 1] = 0;
          e[m] = 0;
          break;
        }
        s = f / r;
        c = g / r;
        g = d[i + 1] - shift;
        const double t = (d[i] - g) * s + 2 * c * b;
        shift = s * t;
        d[i + 1] = g + shift;
        g = c * t - b;
        double* x = z + i * width;
        for (int64_t j = 0; j < width; j += kLanes<double>) {
          const Vector<double> low = load(x + j), high = load(x + width + j);
          store(x + j, c * low - s * high);
          store(x + width + j, s * low + c * high);
        }
      }
      if (i >= l) continue;
      d[l] -= shift;
      e[l] = g;
      e[m] = 0;
    }
  }
  return true;
}

inline constexpr SymmetricEigen kSymmetricEigen{kLanes<double>, &tridiagonalize, &reflect, &implicit_ql};
