// Compiled for every target by vector_ops.cpp.

inline double dot(const double* x, const double* y, int64_t n) {
  Vector<double> sums[4] = {};
  constexpr int64_t lanes = kLanes<double>;
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    for (int c = 0; c < 4; ++c) sums[c] += load(x + i + c * lanes) * load(y + i + c * lanes);
  }
  for (; i < n; i += lanes) {
    const int64_t count = n - i < lanes ? n - i : lanes;
    sums[0] += load_part(x + i, count) * load_part(y + i, count);
  }
  return sum<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

inline void axpy(double factor, const double* x, double* y, int64_t n) {
  constexpr int64_t lanes = kLanes<double>;
  const Vector<double> factors = broadcast(factor);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store(y + i, load(y + i) + factors * load(x + i));
  for (; i < n; ++i) y[i] += factor * x[i];
}

inline void multiply(double factor, double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

inline void rotate(double* x, double* y, double c, double s, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double old = x[i];
    x[i] = c * old - s * y[i];
    y[i] = s * old + c * y[i];
  }
}

inline constexpr VectorOps kVectorOps{&dot, &axpy, &multiply, &rotate};
