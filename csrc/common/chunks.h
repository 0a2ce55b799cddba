// A model's tensors as one row of chunks that threads share out. Without torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace statsmerge {

// Chunks start[l] .. start[l + 1] belong to tensor l.
struct Chunks {
  template <class Tensors>
  Chunks(const Tensors& tensors, int64_t chunk_size) : start(1, 0) {
    for (const auto& t : tensors) {
      numel.push_back(t.numel());
      start.push_back(start.back() + (t.numel() + chunk_size - 1) / chunk_size);
    }
  }
  int64_t count() const { return start.back(); }
  int64_t layer_of(int64_t chunk) const {
    return std::upper_bound(start.begin(), start.end(), chunk) - start.begin() - 1;
  }

  std::vector<int64_t> numel;
  std::vector<int64_t> start;
};

}  // namespace statsmerge
