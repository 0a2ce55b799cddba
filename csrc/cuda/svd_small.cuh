// Linear algebra inside one block: inner products, Gram–Schmidt, combinations of basis vectors, and the
// eigendecomposition of a small symmetric matrix by Jacobi's method. Vectors are rows in global memory.
#pragma once

#include "cuda/svd_block.cuh"

namespace statsmerge::cuda::svd {

constexpr int kParts = 12;  // parts of an inner product, one warp each
constexpr int kSweeps = 40;

// A reproducible number in (−1, 1).
STATSMERGE_HD double random_number(uint64_t seed, uint64_t draw, uint64_t i) {
  uint64_t z = seed * 0x9e3779b97f4a7c15u + draw * 0xd1342543de82ef95u + (i + 1) * 0xbf58476d1ce4e5b9u;
  for (int round = 0; round < 2; ++round) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
  }
  return (static_cast<double>(z >> 11) + 0.5) * 0x1p-52 - 1;
}

// Shared memory for inner products.
struct Sums {
  double* parts;  // [count][kParts]
  double* sums;   // [count]
};

// sums[j] = rows[j] · x[j] for j < count; the rows are n apart, the x `step`, which is 0 for one x.
template <class Acc>
STATSMERGE_HD_PHASE void dots(const Block& block, const Acc* rows, int count, const Acc* x, int step, int n,
                              const Sums& shared) {
  block.each_warp(count * kParts, [&](int i, const Warp& warp) {
    const Acc* row = rows + static_cast<int64_t>(i / kParts) * n;
    const Acc* other = x + static_cast<int64_t>(i / kParts) * step;
    const int first = static_cast<int>(static_cast<int64_t>(n) * (i % kParts) / kParts);
    const int last = static_cast<int>(static_cast<int64_t>(n) * (i % kParts + 1) / kParts);
    double total[1];
    warp.sums(total, [&](int lane, double(&share)[1]) {
      Acc sum = 0;
      for (int e = first + lane; e < last; e += kWarp) sum += row[e] * other[e];
      share[0] += static_cast<double>(sum);
    });
    warp.each(1, [&](int) { shared.parts[i] = total[0]; });
  });
  block.each(count, [&](int64_t j) {
    double sum = 0;
    for (int part = 0; part < kParts; ++part) sum += shared.parts[j * kParts + part];
    shared.sums[j] = sum;
  });
}

template <class Acc>
STATSMERGE_HD_PHASE double norm(const Block& block, const Acc* x, int n, const Sums& shared) {
  dots(block, x, 1, x, 0, n, shared);
  return sqrt(shared.sums[0]);
}

// Takes the components along `count` rows off x.
template <class Acc>
STATSMERGE_HD_PHASE void remove_components(const Block& block, const Acc* rows, int count, Acc* x, int n,
                                           const Sums& shared) {
  if (count == 0) return;
  dots(block, rows, count, x, 0, n, shared);
  block.each(n, [&](int64_t e) {
    Acc value = x[e];
    for (int j = 0; j < count; ++j) value -= static_cast<Acc>(shared.sums[j]) * rows[static_cast<int64_t>(j) * n + e];
    x[e] = value;
  });
}

// The same bound for every row.
struct Same {
  double value;
  STATSMERGE_HD double operator()(int) const { return value; }
};

// Makes the `count` rows of w orthonormal among themselves. Row c has nothing left if not more than negligible(c); it
// is then replaced by a random one, made orthogonal to the `filled` rows of `basis` too, to which the others are
// orthogonal already. The space has n dimensions, `rank` of which are taken; rows for which there is no room become 0.
// Gram–Schmidt twice ("twice is enough": Giraud, Langou and Rozložník 2005). coupling[j][c], if given, is what row c
// had along the new row j. Returns how many dimensions are taken then.
template <class Acc, class Negligible>
STATSMERGE_HD_PHASE int orthonormalize(const Block& block, const Acc* basis, int filled, Acc* w, int count, int n,
                                       int rank, const Negligible& negligible, uint64_t seed, int draw,
                                       const Sums& shared, double* coupling) {
  if (coupling != nullptr) block.each(count * count, [&](int64_t i) { coupling[i] = 0; });
  for (int c = 0; c < count; ++c) {
    Acc* x = w + static_cast<int64_t>(c) * n;
    for (int round = 0; round < 2 && c > 0; ++round) {
      remove_components(block, w, c, x, n, shared);
      if (coupling != nullptr) block.each(c, [&](int64_t j) { coupling[j * count + c] += shared.sums[j]; });
    }
    double length = norm(block, x, n, shared);
    if (coupling != nullptr) block.each(1, [&](int64_t) { coupling[c * count + c] = length; });
    if (rank >= n) {
      block.each(n, [&](int64_t e) { x[e] = 0; });
      continue;
    }
    ++rank;
    if (!(length > negligible(c))) {
      block.each(n, [&](int64_t e) { x[e] = static_cast<Acc>(random_number(seed, draw + c, e)); });
      for (int round = 0; round < 3; ++round) {
        length = norm(block, x, n, shared);
        block.each(n, [&](int64_t e) { x[e] *= static_cast<Acc>(1 / length); });
        remove_components(block, basis, filled, x, n, shared);
        remove_components(block, w, c, x, n, shared);
      }
      length = norm(block, x, n, shared);
    }
    block.each(n, [&](int64_t e) { x[e] = static_cast<Acc>(x[e] / length); });
  }
  return rank;
}

// out[j] = Σ coefficients[order[j]][i] basis[i] for j < count; the rows of coefficients are `ld` apart.
template <class Acc>
STATSMERGE_HD_PHASE void combine(const Block& block, const double* coefficients, const int* order, int ld, int count,
                                 const Acc* basis, int filled, int n, Acc* out) {
  block.each(n, [&](int64_t e) {
    for (int j = 0; j < count; j += 4) {
      Acc sum[4] = {};
      for (int i = 0; i < filled; ++i) {
        const Acc x = basis[static_cast<int64_t>(i) * n + e];
        STATSMERGE_UNROLL
        for (int u = 0; u < 4; ++u) {
          if (j + u < count) sum[u] += static_cast<Acc>(coefficients[order[j + u] * ld + i]) * x;
        }
      }
      STATSMERGE_UNROLL
      for (int u = 0; u < 4; ++u) {
        if (j + u < count) out[static_cast<int64_t>(j + u) * n + e] = sum[u];
      }
    }
  });
}

// The rotations of one step of Jacobi's method.
struct Rotation {
  double c, s;
};

// In step 0 .. players − 2 of a round-robin tournament of an even number of players, the two that pair i plays.
STATSMERGE_HD void pair_of(int players, int step, int i, int& p, int& q) {
  const int ring = players - 1;
  p = i == 0 ? ring : (step + i) % ring;
  q = (step + ring - i) % ring;
  if (p > q) {
    const int t = p;
    p = q;
    q = t;
  }
}

// The rotation that annihilates the off-diagonal element b of [[a, b], [b, d]].
STATSMERGE_HD Rotation jacobi_rotation(double a, double b, double d) {
  const double zeta = (d - a) / (2 * b);
  const double t = (zeta < 0 ? -1.0 : 1.0) / (fabs(zeta) + sqrt(1 + zeta * zeta));
  const double c = 1 / sqrt(1 + t * t);
  return {c, c * t};
}

// Shared memory of the eigendecomposition; `size` is at most `ld`.
struct EigenWork {
  double* t;           // [ld][ld] the matrix; destroyed
  double* vectors;     // [ld][ld] row i: the unit eigenvector of values[i]
  double* values;      // [ld], in no order
  int* order;          // [ld]: values[order[0]] is the largest
  Rotation* rotation;  // [ld / 2 + 1]
  int* rotated;        // [ld / 2 + 1]
};

// Cyclic Jacobi (Golub and Van Loan, section 8.5), the pairs of a tournament's step at once. Elements are taken for 0
// where they are at most `negligible` times the largest on the diagonal, or rounding error beside their own diagonal
// elements: small eigenvalues of graded matrices keep their relative accuracy.
STATSMERGE_HD_PHASE void symmetric_eigen(const Block& block, const EigenWork& work, int size, int ld,
                                         double negligible) {
  constexpr double kRounding = 0x1p-53;
  const int players = size + size % 2, pairs = players / 2;
  double* const t = work.t;
  block.each(size * size, [&](int64_t i) { work.vectors[i / size * ld + i % size] = i / size == i % size ? 1 : 0; });
  for (int sweep = 0; sweep < kSweeps && size > 1; ++sweep) {
    double largest = 0;
    for (int i = 0; i < size; ++i) largest = fmax(largest, fabs(t[i * ld + i]));
    block.each(pairs, [&](int64_t i) { work.rotated[i] = 0; });
    for (int step = 0; step < players - 1; ++step) {
      block.each(pairs, [&](int64_t i) {
        int p, q;
        pair_of(players, step, static_cast<int>(i), p, q);
        Rotation r{1, 0};
        if (q < size) {
          const double a = t[p * ld + p], b = t[p * ld + q], d = t[q * ld + q];
          if (fabs(b) > negligible * largest && fabs(b) > kRounding * sqrt(fabs(a)) * sqrt(fabs(d))) {
            r = jacobi_rotation(a, b, d);
            work.rotated[i] = 1;
          }
        }
        work.rotation[i] = r;
      });
      // [x_p, x_q] becomes [c x_p − s x_q, s x_p + c x_q] along rows and columns of t, and along the rows of vectors.
      block.each(pairs * pairs + pairs * size, [&](int64_t i) {
        int p, q, u, v;
        if (i < pairs * pairs) {
          const int row = static_cast<int>(i) / pairs, column = static_cast<int>(i) % pairs;
          pair_of(players, step, row, p, q);
          pair_of(players, step, column, u, v);
          const Rotation a = work.rotation[row], b = work.rotation[column];
          if (a.s == 0 && b.s == 0) return;
          const bool tall = q < size, wide = v < size;
          const double pu = t[p * ld + u], pv = wide ? t[p * ld + v] : 0;
          const double qu = tall ? t[q * ld + u] : 0, qv = tall && wide ? t[q * ld + v] : 0;
          const double pu1 = a.c * pu - a.s * qu, qu1 = a.s * pu + a.c * qu;
          const double pv1 = a.c * pv - a.s * qv, qv1 = a.s * pv + a.c * qv;
          const bool annihilated = row == column;
          t[p * ld + u] = b.c * pu1 - b.s * pv1;
          if (wide) t[p * ld + v] = annihilated ? 0 : b.s * pu1 + b.c * pv1;
          if (tall) t[q * ld + u] = annihilated ? 0 : b.c * qu1 - b.s * qv1;
          if (tall && wide) t[q * ld + v] = b.s * qu1 + b.c * qv1;
        } else {
          const int rest = static_cast<int>(i) - pairs * pairs, row = rest / size, e = rest % size;
          pair_of(players, step, row, p, q);
          const Rotation a = work.rotation[row];
          if (a.s == 0 || q >= size) return;
          const double xp = work.vectors[p * ld + e], xq = work.vectors[q * ld + e];
          work.vectors[p * ld + e] = a.c * xp - a.s * xq;
          work.vectors[q * ld + e] = a.s * xp + a.c * xq;
        }
      });
    }
    int rotated = 0;
    for (int i = 0; i < pairs; ++i) rotated += work.rotated[i];
    block.each(0, [](int64_t) {});
    if (rotated == 0) break;
  }
  block.each(size, [&](int64_t i) { work.values[i] = t[i * ld + i]; });
  block.each(size, [&](int64_t i) {
    int place = 0;
    for (int j = 0; j < size; ++j) {
      place += work.values[j] > work.values[i] || (work.values[j] == work.values[i] && j < i);
    }
    work.order[place] = static_cast<int>(i);
  });
}

}  // namespace statsmerge::cuda::svd
