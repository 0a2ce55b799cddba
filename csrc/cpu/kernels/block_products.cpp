#include "cpu/kernels/block_products.h"

#include <utility>

namespace statsmerge {
namespace {

template <class Real>
struct BlockProductsTable {
  void (*widened[4][5])(const SourceRows&, int64_t, const Real*, int64_t, Real*, Real*);
  void (*products)(const Real*, const Real*, int64_t, int64_t, Real*);
  void (*combine)(const Real*, const Real*, int64_t, int64_t, Real*, const SourceRows*);
  void (*add_moments)(const Real*, int64_t, double, double, double*);
};

}  // namespace
}  // namespace statsmerge

#define STATSMERGE_KERNELS "cpu/kernels/block_products.inl"
#include "cpu/simd/every_target.h"

namespace statsmerge {
namespace {

template <class Real>
const BlockProductsTable<Real>& table() {
  if constexpr (std::is_same_v<Real, double>) {
    return STATSMERGE_ACTIVE(kDoubleProducts);
  } else {
    return STATSMERGE_ACTIVE(kSingleProducts);
  }
}

}  // namespace

template <class Real>
void BlockProducts<Real>::widened(const SourceRows& source, int64_t n, const Real* v, int64_t stride, Real* tile,
                                  Real* y) {
  const int minus = source.minus[0] ? 1 + static_cast<int>(source.minus_storage) : 0;
  table<Real>().widened[static_cast<int>(source.storage)][minus](source, n, v, stride, tile, y);
}

template <class Real>
void BlockProducts<Real>::products(const Real* rows, const Real* v, int64_t n, int64_t stride, Real* y) {
  table<Real>().products(rows, v, n, stride, y);
}

template <class Real>
void BlockProducts<Real>::combine(const Real* rows, const Real* y, int64_t n, int64_t stride, Real* w,
                                  const SourceRows* next) {
  table<Real>().combine(rows, y, n, stride, w, next);
}

template <class Real>
void BlockProducts<Real>::add_moments(const Real* row, int64_t n, double scale, double origin, double* sums) {
  table<Real>().add_moments(row, n, scale, origin, sums);
}

template struct BlockProducts<float>;
template struct BlockProducts<double>;

}  // namespace statsmerge
