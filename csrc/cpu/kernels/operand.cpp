// Each row is read once and used for both factors of Aᵀ(A V), in blocks that stay in the cache.
#include "cpu/kernels/operand.h"

#include <cmath>
#include <utility>

#include "common/parallel.h"
#include "cpu/kernels/vector_ops.h"

namespace statsmerge {
namespace {

constexpr int64_t kPartElements = 768 * 384;  // what a thread takes at a time: half of a common weight matrix
constexpr int64_t kPartRows = 2048;           // sums over more rows would lose accuracy in float

int64_t parts_of(const Operand& a) {
  const int64_t parts = std::max(std::min<int64_t>(a.rows * a.columns / kPartElements, 16), a.rows / kPartRows);
  return std::clamp<int64_t>(parts, 1, std::max<int64_t>(a.rows, 1));
}

// Calls f(part, first row, last row) for every part of the rows, in parallel.
template <class F>
void for_parts(const Operand& a, const F& f) {
  const int64_t parts = parts_of(a);
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) f(p, p * a.rows / parts, (p + 1) * a.rows / parts);
  });
}

// Four rows from `first` on; the last row stands in for those that are missing.
SourceRows source_rows(const Operand& a, int64_t first) {
  SourceRows source{a.storage, a.minus_storage, {}, {}};
  for (int64_t i = 0; i < kBlock; ++i) {
    const int64_t r = std::min(first + i, a.rows - 1);
    source.rows[i] = a.data + r * a.row_stride * bytes_of(a.storage);
    source.minus[i] = a.minus ? a.minus + r * a.minus_stride * bytes_of(a.minus_storage) : nullptr;
  }
  return source;
}

double origin_of(const Operand& a) {
  double origin = 0;
  read_rows(a, 0, 1, [&](int64_t, const double* row) {
    double sums[3] = {};
    BlockProducts<double>::add_moments(row, a.columns, 1, row[0], sums);
    origin = row[0] + sums[0] / static_cast<double>(a.columns);
  });
  return origin;
}

// Adds up what the parts found, in their order.
Moments total(const Operand& a, double origin, const std::vector<double>& sums) {
  Moments out{a.scale, static_cast<double>(a.rows * a.columns), origin};
  for (size_t i = 0; i < sums.size(); i += 3) {
    out.deviations += sums[i];
    out.squares += sums[i + 1];
    out.norms += sums[i + 2];
  }
  return out;
}

}  // namespace

void read_rows(const Operand& a, int64_t first, int64_t last, const std::function<void(int64_t, const double*)>& f) {
  const int64_t stride = padded(a.columns);
  AlignedVector<double> tile(static_cast<size_t>(kBlock * stride), 0.0), zeros = tile;
  double unused[kBlock * kBlock];
  for (int64_t r = first; r < last; r += kBlock) {
    BlockProducts<double>::widened(source_rows(a, r), a.columns, zeros.data(), stride, tile.data(), unused);
    if (a.scale != 1) multiply(a.scale, tile.data(), kBlock * stride);
    for (int64_t i = 0; i < std::min(kBlock, last - r); ++i) f(r + i, tile.data() + i * stride);
  }
}

void form_difference(Operand& a, AlignedVector<float>& out) {
  const int64_t stride = padded(a.columns), blocks = (a.rows + kBlock - 1) / kBlock;
  const AlignedVector<float> zeros(static_cast<size_t>(kBlock * stride), 0.0f);
  out.resize(static_cast<size_t>(blocks * kBlock * stride));
  parallel_for(0, blocks, std::max<int64_t>(kPartElements / (kBlock * stride), 1), [&](int64_t begin, int64_t end) {
    float unused[kBlock * kBlock];
    for (int64_t b = begin; b < end; ++b) {
      BlockProducts<float>::widened(source_rows(a, b * kBlock), a.columns, zeros.data(), stride,
                                    out.data() + b * kBlock * stride, unused);
    }
  });
  a = {a.rows, a.columns, reinterpret_cast<const char*>(out.data()), Storage::f32, stride};
}

void inspect(Operand& a) {
  a.scale = 1;
  std::vector<double> largest(static_cast<size_t>(parts_of(a)), 0.0);
  for_parts(a, [&](int64_t part, int64_t first, int64_t last) {
    read_rows(a, first, last, [&](int64_t, const double* row) {
      for (int64_t j = 0; j < a.columns; ++j) {
        if (!std::isfinite(row[j])) throw NotFinite();
        largest[part] = std::max(largest[part], std::abs(row[j]));
      }
    });
  });
  const double all = *std::max_element(largest.begin(), largest.end());
  const int limit = a.is_double() ? 900 : 100;  // what float vectors can be scaled by where products are in float
  if (all != 0) a.scale = std::ldexp(1.0, std::clamp(-std::ilogb(all), -limit, limit));
}

Moments moments(const Operand& a) {
  const double origin = origin_of(a);
  std::vector<double> sums(static_cast<size_t>(3 * parts_of(a)), 0.0);
  for_parts(a, [&](int64_t part, int64_t first, int64_t last) {
    read_rows(a, first, last, [&](int64_t, const double* row) {
      BlockProducts<double>::add_moments(row, a.columns, 1, origin, sums.data() + 3 * part);
    });
  });
  return total(a, origin, sums);
}

template <class Real>
void Products<Real>::normal(const double* v, int64_t count, Rows& w, Moments* moments) {
  using Blocks = BlockProducts<Real>;
  const int64_t stride = padded(a_.columns), parts = parts_of(a_);
  const int64_t block = kBlock * stride, blocks = (count + kBlock - 1) / kBlock, all = blocks * block;
  const Real scale = static_cast<Real>(a_.scale);
  const double origin = moments ? origin_of(a_) : 0;
  std::vector<double> sums(static_cast<size_t>(moments ? 3 * parts : 0), 0.0);

  // The vectors, then for every part its sum and a tile of rows, whose padding stays zero.
  buffer_.resize(static_cast<size_t>(all + parts * (all + block)), Real{0});
  Real* vectors = buffer_.data();
  for (int64_t i = 0; i < count * stride; ++i) vectors[i] = static_cast<Real>(v[i]) * scale;
  std::fill(vectors + count * stride, vectors + all, Real{0});
  const auto sum_of = [&](int64_t part) { return vectors + all + part * (all + block); };

  for_parts(a_, [&](int64_t part, int64_t first, int64_t last) {
    Real* sum = sum_of(part);
    Real* tile = sum + all;
    std::fill(sum, sum + all, Real{0});
    SourceRows next = source_rows(a_, first);
    for (int64_t r = first; r < last; r += kBlock) {
      const int64_t present = std::min(kBlock, last - r);
      const SourceRows source = std::exchange(next, source_rows(a_, r + kBlock));
      for (int64_t b = 0; b < blocks; ++b) {
        alignas(64) Real y[kBlock * kBlock];
        if (b == 0) {
          Blocks::widened(source, a_.columns, vectors, stride, tile, y);
        } else {
          Blocks::products(tile, vectors + b * block, stride, stride, y);
        }
        for (Real& value : y) value *= scale;
        std::fill(y + present * kBlock, y + kBlock * kBlock, Real{0});
        Blocks::combine(tile, y, stride, stride, sum + b * block, b == 0 ? &next : nullptr);
      }
      if (!moments) continue;
      for (int64_t i = 0; i < present; ++i) {
        Blocks::add_moments(tile + i * stride, a_.columns, a_.scale, origin, sums.data() + 3 * part);
      }
    }
  });
  parallel_for(0, count, parts == 1 ? count : 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      std::fill(w[c], w[c] + stride, 0.0);
      for (int64_t p = 0; p < parts; ++p) {
        const Real* sum = sum_of(p) + c * stride;
        for (int64_t j = 0; j < stride; ++j) w[c][j] += static_cast<double>(sum[j]);
      }
    }
  });
  if (moments) *moments = total(a_, origin, sums);
}

template class Products<float>;
template class Products<double>;

Rows product(const Operand& a, const Rows& v, int64_t count) {
  Rows y(count, a.rows);
  for_parts(a, [&](int64_t, int64_t first, int64_t last) {
    AlignedVector<double> tile(static_cast<size_t>(kBlock * v.stride), 0.0);
    for (int64_t r = first; r < last; r += kBlock) {
      for (int64_t c = 0; c < count; c += kBlock) {
        double products[kBlock * kBlock];
        if (c == 0) {
          BlockProducts<double>::widened(source_rows(a, r), a.columns, v[0], v.stride, tile.data(), products);
        } else {
          BlockProducts<double>::products(tile.data(), v[c], v.stride, v.stride, products);
        }
        for (int64_t i = 0; i < std::min(kBlock, last - r); ++i) {
          for (int64_t j = 0; j < std::min(kBlock, count - c); ++j)
            y[c + j][r + i] = products[kBlock * i + j] * a.scale;
        }
      }
    }
  });
  return y;
}

}  // namespace statsmerge
