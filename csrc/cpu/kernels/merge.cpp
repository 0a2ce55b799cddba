#include "cpu/kernels/merge.h"

#include <algorithm>

#include "common/chunks.h"
#include "common/parallel.h"

namespace statsmerge {
namespace {

// Elements; a multiple of 8, so that packed codes start at a byte. A chunk's sums stay in the first cache level, and
// the streams it reads are long enough for the processor to fetch ahead.
constexpr int64_t kChunk = 8192;

// Results larger than this are written past the caches, which they would only sweep.
constexpr int64_t kStreamedBytes = int64_t{16} << 20;

// What one thread does at a time: elements `first` .. `first + count` of one layer.
struct MergeChunk {
  const MergeLayer* layer;
  const TaskVector* task_vectors;  // of this layer, `stride` apart
  int64_t stride, tasks;
  const double* coefficients;
  int64_t first, count;
  bool streamed;
};

struct MergeKernels {
  void (*merge)(const MergeChunk&);
  void (*products)(const MergeChunk&, double* products);
};

}  // namespace
}  // namespace statsmerge

#define STATSMERGE_KERNELS "cpu/kernels/merge.inl"
#include "cpu/simd/every_target.h"

namespace statsmerge {
namespace {

// Calls f(chunk, number of the chunk) for every chunk of the model.
template <class F>
void for_each_chunk(const std::vector<MergeLayer>& layers, const std::vector<TaskVector>& task_vectors,
                    const Chunks& chunks, const F& f) {
  const int64_t stride = static_cast<int64_t>(layers.size());
  const int64_t tasks = layers.empty() ? 0 : static_cast<int64_t>(task_vectors.size()) / stride;
  int64_t elements = 0, bytes = 0;
  for (const MergeLayer& layer : layers) {
    elements += layer.count;
    bytes += layer.count * bytes_of(layer.storage);
  }
  // a thread is worth waking for 16 full chunks' work
  const int64_t grain = 16 * kChunk * std::max<int64_t>(chunks.count(), 1) / std::max<int64_t>(elements, 1);
  parallel_for(0, chunks.count(), std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin, l = chunks.layer_of(begin); c < end; ++c) {
      while (c >= chunks.start[l + 1]) ++l;
      const int64_t first = (c - chunks.start[l]) * kChunk;
      f(MergeChunk{&layers[l], task_vectors.data() + l, stride, tasks, nullptr, first,
                   std::min(kChunk, layers[l].count - first), bytes >= kStreamedBytes},
        c);
    }
    if (bytes >= kStreamedBytes) baseline::finish_streamed();
  });
}

}  // namespace

void merge(const std::vector<MergeLayer>& layers, const std::vector<TaskVector>& task_vectors,
           const double* coefficients) {
  const auto kernel = STATSMERGE_ACTIVE(kMergeKernels).merge;
  for_each_chunk(layers, task_vectors, Chunks(layers, kChunk), [&](MergeChunk chunk, int64_t) {
    chunk.coefficients = coefficients + (chunk.layer - layers.data()) * chunk.tasks;
    kernel(chunk);
  });
}

void merge_products(const std::vector<MergeLayer>& layers, const std::vector<TaskVector>& task_vectors,
                    double* products) {
  const auto kernel = STATSMERGE_ACTIVE(kMergeKernels).products;
  const Chunks chunks(layers, kChunk);
  const int64_t tasks = layers.empty() ? 0 : static_cast<int64_t>(task_vectors.size() / layers.size());
  std::vector<double> partial(static_cast<size_t>(chunks.count() * tasks));
  for_each_chunk(layers, task_vectors, chunks,
                 [&](const MergeChunk& chunk, int64_t c) { kernel(chunk, partial.data() + c * tasks); });
  const double* next = partial.data();
  for (size_t l = 0; l < layers.size(); ++l, products += tasks) {
    std::fill(products, products + tasks, 0.0);
    for (int64_t c = chunks.start[l]; c < chunks.start[l + 1]; ++c) {
      for (int64_t k = 0; k < tasks; ++k) products[k] += *next++;
    }
  }
}

}  // namespace statsmerge
