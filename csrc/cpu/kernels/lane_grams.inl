// Compiled for every target by lane_grams.cpp. As many small Grams as a vector has lanes, side by side: no sum crosses
// lanes, and every element of a patch is read where it lies in the padded input.

// One run of elements that every lane has at the same distance: out[k · pitch + lane] for k in [0, count). Lanes beyond
// `lanes` are zeros.
template <class Acc, class T>
STATSMERGE_INLINE void pack_run(const T* from, int64_t lanes, int64_t lane_stride, int64_t stride, int64_t count,
                                Acc* out, int64_t pitch) {
  constexpr int64_t all = kLanes<Acc>;
  int64_t k = 0;
  if (lane_stride == 1 && lanes == all) {
    for (; k < count; ++k) store(out + k * pitch, load_widened<Acc, kLanes<Acc>>(from + k * stride));
  } else if (stride == 1 && count >= all) {
    for (;;) {
      Vector<Acc> block[all] = {};
      for (int64_t lane = 0; lane < lanes; ++lane) block[lane] = load_widened<Acc, kLanes<Acc>>(from + k + lane * lane_stride);
      transpose<Acc, kLanes<Acc>>(block);
      for (int64_t i = 0; i < all; ++i) store(out + (k + i) * pitch, block[i]);
      if ((k += all) == count) break;
      if (k + all > count) k = count - all;  // the last block overlaps the one before
    }
  } else {
    for (; k < count; ++k) {
      for (int64_t lane = 0; lane < lanes; ++lane) {
        out[k * pitch + lane] = static_cast<Acc>(widen(from[k * stride + lane * lane_stride]));
      }
      for (int64_t lane = lanes; lane < all; ++lane) out[k * pitch + lane] = 0;
    }
  }
}

// The part of an image's padded input that a tile's patches touch: [kernel depth, rows, columns, channels, lanes].
template <class Acc, class T>
STATSMERGE_INLINE void pack_image(const LaneTile<Acc>& tile, const LaneInput& input, int64_t image, Acc* plane) {
  constexpr int64_t lanes = kLanes<Acc>;
  const Patches& p = *input.patches;
  const int64_t height = span(p, 1, tile.rows), width = span(p, 2, tile.columns), pitch = p.channels * lanes;
  const int64_t x = tile.x * p.stride[2] - p.padding[2];
  const int64_t begin = x < 0 ? (-x < width ? -x : width) : 0;
  const int64_t end = p.size[2] - x < width ? (p.size[2] - x > begin ? p.size[2] - x : begin) : width;
  for (int64_t depth = 0; depth < p.kernel[0]; ++depth) {
    const int64_t z = tile.z * p.stride[0] - p.padding[0] + depth * p.dilation[0];
    for (int64_t row = 0; row < height; ++row, plane += width * pitch) {
      const int64_t y = tile.y * p.stride[1] - p.padding[1] + row;
      if (z < 0 || z >= p.size[0] || y < 0 || y >= p.size[1] || begin == end) {
        std::memset(plane, 0, static_cast<size_t>(width * pitch) * sizeof(Acc));
        continue;
      }
      std::memset(plane, 0, static_cast<size_t>(begin * pitch) * sizeof(Acc));
      std::memset(plane + end * pitch, 0, static_cast<size_t>((width - end) * pitch) * sizeof(Acc));
      const T* from = reinterpret_cast<const T*>(input.data) + image * p.image_stride + z * p.element_stride[0] +
                      y * p.element_stride[1] + (x + begin) * p.element_stride[2];
      Acc* to = plane + begin * pitch;
      if (p.channel_stride == 1 && p.element_stride[2] == p.channels) {
        pack_run<Acc>(from, tile.lanes, input.stride, 1, (end - begin) * p.channels, to, lanes);
      } else {
        for (int64_t c = 0; c < p.channels; ++c) {
          pack_run<Acc>(from + c * p.channel_stride, tile.lanes, input.stride, p.element_stride[2], end - begin,
                        to + c * lanes, pitch);
        }
      }
    }
  }
}

template <class Acc, class T>
void pack_images(const LaneTile<Acc>& tile, const LaneInput& input, Acc* planes) {
  const int64_t elements = elements_of(*input.patches, tile.rows, tile.columns) * kLanes<Acc>;
  for (int64_t image = 0; image < tile.images; ++image, planes += elements) {
    pack_image<Acc, T>(tile, input, image, planes);
  }
}

template <class Acc>
STATSMERGE_INLINE void pack_input(const LaneTile<Acc>& tile, const LaneInput& input, Acc* planes) {
  switch (input.patches->storage) {
    case Storage::f64:
      return pack_images<Acc, double>(tile, input, planes);
    case Storage::f32:
      return pack_images<Acc, float>(tile, input, planes);
    case Storage::bf16:
      return pack_images<Acc, bf16>(tile, input, planes);
    case Storage::f16:
      return pack_images<Acc, f16>(tile, input, planes);
  }
}

// Where the first patch of a line of outputs begins in the packed planes, and how far it is to the next.
template <class Acc>
STATSMERGE_INLINE int64_t start_of_line(const LaneTile<Acc>& tile, int64_t line) {
  const Patches& p = *tile.input.patches;
  const int64_t row_step = p.stride[1] * span(p, 2, tile.columns) * p.channels;
  const int64_t image_step = elements_of(p, tile.rows, tile.columns);
  return (line / tile.rows * image_step + line % tile.rows * row_step) * kLanes<Acc>;
}

template <class Acc>
STATSMERGE_INLINE int64_t column_step_of(const LaneTile<Acc>& tile) {
  return tile.input.patches->stride[2] * tile.input.patches->channels * kLanes<Acc>;
}

// B × B entries of every lane's Gram: sums[i · pitch + j] of the elements that the patches have at left[i] and right[j].
template <class Acc, int B, bool kDiagonal, bool kWeighted>
void multiply_block(const LaneTile<Acc>& tile, const Acc* plane, const Acc* weights, const int64_t* left,
                    const int64_t* right, Acc* sums, int64_t pitch) {
  constexpr int64_t lanes = kLanes<Acc>;
  const int64_t column_step = column_step_of<Acc>(tile);
  Vector<Acc> block[B][B] = {};
  for (int64_t line = 0; line < tile.images * tile.rows; ++line) {
    const Acc* from = plane + start_of_line<Acc>(tile, line);
    for (int64_t column = 0; column < tile.columns; ++column, from += column_step) {
      Vector<Acc> factors[B];
#pragma GCC unroll 5
      for (int j = 0; j < B; ++j) factors[j] = load(from + right[j]);
#pragma GCC unroll 5
      for (int i = 0; i < B; ++i) {
        Vector<Acc> factor = kDiagonal ? factors[i] : load(from + left[i]);
        if constexpr (kWeighted) factor *= load(weights + (line * tile.columns + column) * lanes);
#pragma GCC unroll 5
        for (int j = 0; j < (kDiagonal ? i + 1 : B); ++j) block[i][j] += factor * factors[j];
      }
    }
  }
#pragma GCC unroll 5
  for (int i = 0; i < B; ++i) {
#pragma GCC unroll 5
    for (int j = 0; j < (kDiagonal ? i + 1 : B); ++j) {
      Acc* to = sums + i * pitch + j * lanes;
      store(to, load(to) + block[i][j]);
    }
  }
}

// B entries of every lane's cross Gram: sums[j] of an output times the elements that the patches have at taps[j]. The
// outputs of neighbouring patches are `step` apart.
template <class Acc, int B, bool kWeighted>
void multiply_row(const LaneTile<Acc>& tile, const Acc* plane, const Acc* output, int64_t step, const Acc* weights,
                  const int64_t* taps, Acc* sums) {
  constexpr int64_t lanes = kLanes<Acc>;
  const int64_t column_step = column_step_of<Acc>(tile);
  Vector<Acc> row[B] = {};
  for (int64_t line = 0; line < tile.images * tile.rows; ++line) {
    const Acc* from = plane + start_of_line<Acc>(tile, line);
    for (int64_t column = 0; column < tile.columns; ++column, from += column_step, output += step) {
      Vector<Acc> factor = load(output);
      if constexpr (kWeighted) factor *= load(weights + (line * tile.columns + column) * lanes);
#pragma GCC unroll 5
      for (int j = 0; j < B; ++j) row[j] += factor * load(from + taps[j]);
    }
  }
#pragma GCC unroll 5
  for (int j = 0; j < B; ++j) store(sums + j * lanes, load(sums + j * lanes) + row[j]);
}

template <class Acc, int B, bool kWeighted>
STATSMERGE_INLINE void multiply_blocks(const LaneTile<Acc>& tile, const Acc* plane, const Acc* outputs,
                                       const Acc* weights, const int64_t* taps, int64_t count, Acc* sums) {
  constexpr int64_t lanes = kLanes<Acc>;
  const int64_t pitch = count * lanes;
  if (outputs) {
    const int64_t channels = tile.other.patches->channels;
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t j = 0; j < count; j += B) {
        multiply_row<Acc, B, kWeighted>(tile, plane, outputs + i * lanes, channels * lanes, weights, taps + j,
                                        sums + i * pitch + j * lanes);
      }
    }
    return;
  }
  for (int64_t i = 0; i < count; i += B) {
    for (int64_t j = 0; j < i; j += B) {
      multiply_block<Acc, B, false, kWeighted>(tile, plane, weights, taps + i, taps + j, sums + i * pitch + j * lanes,
                                               pitch);
    }
    multiply_block<Acc, B, true, kWeighted>(tile, plane, weights, taps + i, taps + i, sums + i * pitch + i * lanes,
                                            pitch);
  }
}

template <class Acc, int B>
STATSMERGE_INLINE void multiply_taps(const LaneTile<Acc>& tile, const Acc* plane, const Acc* outputs,
                                     const Acc* weights, const int64_t* taps, int64_t count, Acc* sums) {
  if (weights) {
    multiply_blocks<Acc, B, true>(tile, plane, outputs, weights, taps, count, sums);
  } else {
    multiply_blocks<Acc, B, false>(tile, plane, outputs, weights, taps, count, sums);
  }
}

// Adds a tile's patches to `sums` [taps or outputs, taps, lanes]. `scratch` has room for the padded input, the outputs
// and the weights.
template <class Acc>
void accumulate_tile(const LaneTile<Acc>& tile, Acc* scratch, Acc* sums) {
  constexpr int64_t lanes = kLanes<Acc>;
  const Patches& p = *tile.input.patches;
  const int64_t height = span(p, 1, tile.rows), width = span(p, 2, tile.columns);
  Acc* free = scratch + tile.images * elements_of(p, tile.rows, tile.columns) * lanes;
  Acc *outputs = nullptr, *weights = nullptr;
  pack_input(tile, tile.input, scratch);
  if (tile.other.patches) {
    outputs = std::exchange(free, free + tile.positions() * tile.other.patches->channels * lanes);
    pack_input(tile, tile.other, outputs);
  }
  if (tile.weight) {
    weights = free;
    for (int64_t line = 0; line < tile.images * tile.rows; ++line) {
      const Acc* from = tile.weight + line / tile.rows * tile.weight_image_stride + line % tile.rows * p.out[2];
      pack_run<Acc>(from, tile.lanes, tile.weight_lane_stride, 1, tile.columns, weights + line * tile.columns * lanes,
                    lanes);
    }
  }
  int64_t taps[kMostTaps];
  const int64_t count = padded_taps(p.columns(), tile.block);
  for (int64_t i = 0; i < count; ++i) {
    int64_t element = i < p.columns() ? i : 0;  // what the last block has too much is summed in vain
    const int64_t x = element % p.kernel[2] * p.dilation[2];
    element /= p.kernel[2];
    const int64_t y = element % p.kernel[1] * p.dilation[1];
    element /= p.kernel[1];
    const int64_t z = element % p.kernel[0], channel = element / p.kernel[0];
    taps[i] = (((z * height + y) * width + x) * p.channels + channel) * lanes;
  }
  if constexpr (kRegisters == 32) {
    if (tile.block == 5) return multiply_taps<Acc, 5>(tile, scratch, outputs, weights, taps, count, sums);
    if (tile.block == 4) return multiply_taps<Acc, 4>(tile, scratch, outputs, weights, taps, count, sums);
  }
  multiply_taps<Acc, 3>(tile, scratch, outputs, weights, taps, count, sums);
}

template <class Acc>
inline constexpr LaneKernels<Acc> kLaneGrams{kLanes<Acc>, kRegisters == 32 ? 5 : 3, &accumulate_tile<Acc>};
