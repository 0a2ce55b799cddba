// What one thread of a merge kernel does, and the tables it is given. Compiled for the device and, so that a loop over
// blocks and threads can stand for a launch in a test, for the host.
#pragma once

#include "cuda/packs.h"

namespace statsmerge::cuda {

constexpr int kThreads = 128;

// How many packs a thread holds at once, kThreads packs apart; more in flight where elements are small.
template <class Acc>
constexpr int kHeld = sizeof(Acc) == sizeof(float) ? 4 : 2;

constexpr int64_t kTile = kHeld<float> * kPack * kThreads;  // elements that a block takes at a time

// How many chunks' worth of tiles a block takes: long runs for large models, many blocks for small ones.
constexpr int64_t chunk_size(int64_t numel) {
  const int64_t tiles = numel / (kTile * 16384);
  return kTile * (tiles < 1 ? 1 : tiles > 16 ? 16 : tiles);
}

// One tensor of the model: the base (or the gradient) and, in the forward pass, the result.
struct Layer {
  const char* in;
  char* out;
  int64_t numel;
  int64_t packed;  // elements before this one are read as packs: a multiple of 8, or 0 where alignment forbids it
  Storage storage;
  int wide;  // computed in double: a float64 tensor is among the operands
};

// Everything a launch needs, all pointers to device memory. `coefficients` is [layers, tasks], task_vectors [tasks,
// layers].
struct MergeArguments {
  const Layer* layers;
  const TaskVector* task_vectors;
  const int64_t* chunk_start;  // [layers + 1] first chunk of every tensor
  const double* coefficients;
  int64_t layer_count, tasks, chunk;
};

struct Range {
  int64_t begin, end;  // elements of one tensor
};

STATSMERGE_HD Range chunk_range(const MergeArguments& a, int64_t l, int64_t chunk) {
  const int64_t begin = (chunk - a.chunk_start[l]) * a.chunk, end = begin + a.chunk;
  return {begin, end < a.layers[l].numel ? end : a.layers[l].numel};
}

// The packs of a thread in the tile that starts at element `begin`. Those beyond `end` repeat the last one, so that every
// load is valid and none waits for a comparison.
template <int Held>
struct HeldPacks {
  STATSMERGE_HD HeldPacks(int64_t begin, int64_t end, int thread) : first(begin) {
    const int64_t packs = (end - begin) / kPack;
    STATSMERGE_UNROLL
    for (int p = 0; p < Held; ++p) {
      const int at = thread + p * kThreads;
      valid[p] = at < packs;
      offset[p] = valid[p] ? at : static_cast<int>(packs) - 1;
    }
  }

  // Calls f(p, scale, values) for every pack p of `data`; its loads are issued before the first call, up to 64 bytes.
  template <class Format, class Acc, class F>
  STATSMERGE_HD void decode(Format, const char* data, const Groups* groups, const F& f) const {
    constexpr int kAtOnce = Format::kBytes >= 64 ? 1 : 64 / Format::kBytes < Held ? 64 / Format::kBytes : Held;
    const char* start = data + first / kPack * Format::kBytes;
    STATSMERGE_UNROLL
    for (int p = 0; p < Held; p += kAtOnce) {
      Raw<Format::kBytes> raw[kAtOnce];
      Group group[kAtOnce] = {};
      STATSMERGE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        raw[i].load(start + static_cast<int64_t>(offset[p + i]) * Format::kBytes);
        if constexpr (Format::kGrouped) group[i] = (*groups)(first + static_cast<int64_t>(offset[p + i]) * kPack);
      }
      STATSMERGE_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        Acc values[kPack];
        const Acc scale = Format::decode(raw[i], group[i], values);
        f(p + i, scale, values);
      }
    }
  }

  int64_t first;
  int offset[Held];
  bool valid[Held];
};

// The packs of base and task vectors that a thread merges in one tile.
template <class Acc>
STATSMERGE_HD void merge_tile(const MergeArguments& a, int64_t l, Range tile, int thread) {
  const Layer& layer = a.layers[l];
  const HeldPacks<kHeld<Acc>> packs(tile.begin, tile.end, thread);
  Acc sum[kHeld<Acc>][kPack];
  with_floating<Acc>(layer.storage, [&](auto format) {
    packs.template decode<decltype(format), Acc>(format, layer.in, nullptr, [&](int p, Acc, const Acc(&values)[kPack]) {
      STATSMERGE_UNROLL
      for (int i = 0; i < kPack; ++i) sum[p][i] = values[i];
    });
  });
  for (int64_t k = 0; k < a.tasks; ++k) {
    const TaskVector& t = a.task_vectors[k * a.layer_count + l];
    const Groups groups(t, layer.numel);
    const Acc factor = static_cast<Acc>(a.coefficients[l * a.tasks + k]);
    with_format<Acc>(t, [&](auto format) {
      packs.template decode<decltype(format), Acc>(format, t.data, &groups, [&](int p, Acc scale, const Acc(&values)[kPack]) {
        const Acc scaled = factor * scale;
        STATSMERGE_UNROLL
        for (int i = 0; i < kPack; ++i) sum[p][i] += scaled * values[i];
      });
    });
  }
  with_floating<Acc>(layer.storage, [&](auto format) {
    using Format = decltype(format);
    STATSMERGE_UNROLL
    for (int p = 0; p < kHeld<Acc>; ++p) {
      if (!packs.valid[p]) continue;
      const int64_t pack = packs.first / kPack + packs.offset[p];
      Format::encode(sum[p]).store(layer.out + pack * Format::kBytes);
    }
  });
}

// The part of a chunk that thread `thread` of its block merges.
template <class Acc>
STATSMERGE_HD void merge_thread(const MergeArguments& a, int64_t l, Range chunk, int thread) {
  const Layer& layer = a.layers[l];
  constexpr int64_t tile = int64_t{kHeld<Acc>} * kPack * kThreads;
  const int64_t packed_end = chunk.end < layer.packed ? chunk.end : layer.packed;
  for (int64_t begin = chunk.begin; begin < packed_end; begin += tile) {
    const int64_t end = begin + tile;
    merge_tile<Acc>(a, l, {begin, end < packed_end ? end : packed_end}, thread);
  }
  for (int64_t i = (chunk.begin > packed_end ? chunk.begin : packed_end) + thread; i < chunk.end; i += kThreads) {
    Acc sum = element<Acc>(layer.in, layer.storage, i);
    for (int64_t k = 0; k < a.tasks; ++k) {
      const Acc factor = static_cast<Acc>(a.coefficients[l * a.tasks + k]);
      sum += factor * element<Acc>(a.task_vectors[k * a.layer_count + l], i);
    }
    set_element(layer.out, layer.storage, i, sum);
  }
}

constexpr int kTasksAtOnce = 8;  // inner products that a block has room for

// Adds to sums[j · kThreads], j < count, what thread `thread` has of the inner products of the gradient with the task
// vectors first .. first + count over a chunk. A pack's eight products are added in Acc, packs in double.
template <class Acc>
STATSMERGE_HD void dot_thread(const MergeArguments& a, int64_t l, Range chunk, int64_t first, int count, int thread,
                              double* sums) {
  const Layer& layer = a.layers[l];
  constexpr int64_t tile = int64_t{kHeld<Acc>} * kPack * kThreads;
  const int64_t packed_end = chunk.end < layer.packed ? chunk.end : layer.packed;
  for (int64_t begin = chunk.begin; begin < packed_end; begin += tile) {
    const HeldPacks<kHeld<Acc>> packs(begin, begin + tile < packed_end ? begin + tile : packed_end, thread);
    Acc gradient[kHeld<Acc>][kPack];
    with_floating<Acc>(layer.storage, [&](auto format) {
      packs.template decode<decltype(format), Acc>(format, layer.in, nullptr, [&](int p, Acc, const Acc(&values)[kPack]) {
        STATSMERGE_UNROLL
        for (int i = 0; i < kPack; ++i) gradient[p][i] = values[i];
      });
    });
    for (int j = 0; j < count; ++j) {
      const TaskVector& t = a.task_vectors[(first + j) * a.layer_count + l];
      const Groups groups(t, layer.numel);
      double sum = 0;
      with_format<Acc>(t, [&](auto format) {
        packs.template decode<decltype(format), Acc>(format, t.data, &groups, [&](int p, Acc scale, const Acc(&values)[kPack]) {
          Acc run = 0;
          STATSMERGE_UNROLL
          for (int i = 0; i < kPack; ++i) run += gradient[p][i] * values[i];
          if (packs.valid[p]) sum += static_cast<double>(run) * static_cast<double>(scale);
        });
      });
      sums[j * kThreads] += sum;
    }
  }
  for (int64_t i = (chunk.begin > packed_end ? chunk.begin : packed_end) + thread; i < chunk.end; i += kThreads) {
    const double gradient = element<double>(layer.in, layer.storage, i);
    for (int j = 0; j < count; ++j) {
      sums[j * kThreads] += gradient * element<double>(a.task_vectors[(first + j) * a.layer_count + l], i);
    }
  }
}

// How far a search for the last of `count` ascending starts that is at most `value` gets in one step: a warp's lanes
// look at 32 of them, `seen` has the bits of those whose start is at most `value`.
struct Search {
  int64_t low, count;

  STATSMERGE_HD int64_t step() const { return (count + 31) / 32; }
  STATSMERGE_HD bool below(const int64_t* start, int64_t value, int lane) const {
    return lane * step() < count && start[low + lane * step()] <= value;
  }
  STATSMERGE_HD void narrow(uint32_t seen) {
    const int64_t skipped = (31 - leading_zeros(seen)) * step(), rest = count - skipped;
    count = step() < rest ? step() : rest;
    low += skipped;
  }
  STATSMERGE_HD static int leading_zeros(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __clz(static_cast<int>(bits));
#else
    return std::countl_zero(bits);
#endif
  }
};

}  // namespace statsmerge::cuda
