// Small Grams and cross Grams, as many side by side as a vector has lanes.
#pragma once

#include <cstdint>

#include "cpu/kernels/gram.h"

namespace statsmerge {

constexpr int64_t kSmall = 32;  // the most columns of such a Gram

// One small Gram per batch, as accumulate_grams.
template <class Acc>
void accumulate_small(const MatrixView& x, int64_t batches, int64_t x_stride, const Acc* weight,
                      const Grams<Acc>& grams);

// As accumulate_patch_grams; or, where `other` is given, patches of one element on the grid of the outputs, as
// accumulate_patch_cross_grams. Returns false, with nothing done, for shapes that would leave most lanes idle.
template <class Acc>
bool accumulate_in_lanes(const Patches& patches, const Patches* other, const Acc* weight, const Grams<Acc>& grams);

}  // namespace statsmerge
