// Compiled for every target by product.cpp. A panel holds kPanel<P> columns of a matrix, one packed row after the other;
// columns that the matrix lacks are zeros. Three vectors wide, it is the right operand of a tile as it stands, and lends
// the left operand its elements one by one: a single packed copy of x serves both sides of xᵀ x.

template <class P>
constexpr int kPanel = 3 * kLanes<P>;

// Rows of a tile: as many as leave registers for one row of the right operand and a factor, and divide the panel.
template <class P>
constexpr int tile_rows() {
  int rows = kRegisters == 32 ? 8 : 4;
  while (kPanel<P> % rows) --rows;
  return rows;
}

// Packing takes elements P out of a matrix of elements T, starting at `from`; `rows` of the matrix are left there.
// One element, times its weight.
template <class P, class T>
STATSMERGE_INLINE P pack_element(const T* from, int64_t row_stride, int64_t rows, const Accumulator<P>* weight) {
  if constexpr (std::is_same_v<P, bf16_pair>) {
    const bool first = !weight || weight[0] != 0, second = rows > 1 && (!weight || weight[1] != 0);
    return (first ? from[0].bits : 0u) | (second ? static_cast<uint32_t>(from[row_stride].bits) << 16 : 0u);
  } else {
    return static_cast<P>(widen(*from)) * (weight ? *weight : P{1});
  }
}

// A vector of one packed row, from columns that are neighbours in memory.
template <class P, class T>
STATSMERGE_INLINE Vector<P> pack_columns(const T* from, int64_t row_stride, int64_t rows,
                                         const Accumulator<P>* weight) {
  constexpr int lanes = kLanes<P>;
  if constexpr (std::is_same_v<P, bf16_pair>) {
    Vector<P> first{}, second{};
    if (!weight || weight[0] != 0) first = __builtin_convertvector(load<uint16_t, lanes>(&from->bits), Vector<P>);
    if (rows > 1 && (!weight || weight[1] != 0)) {
      second = __builtin_convertvector(load<uint16_t, lanes>(&from[row_stride].bits), Vector<P>);
    }
    return first | (second << 16);
  } else {
    return load_widened<P, lanes>(from) * (weight ? *weight : P{1});
  }
}

// A vector of one packed column, from rows that are neighbours in memory.
template <class P, class T>
STATSMERGE_INLINE Vector<P> pack_rows(const T* from) {
  if constexpr (std::is_same_v<P, bf16_pair>) {
    return load(reinterpret_cast<const P*>(from));
  } else {
    return load_widened<P, kLanes<P>>(from);
  }
}

template <class P, class T>
STATSMERGE_INLINE void pack_typed(const MatrixView& m, int64_t first, int64_t rows, int64_t column, int64_t columns,
                                  const Accumulator<P>* weight, P* panel) {
  constexpr int64_t lanes = kLanes<P>, step = kRowsOf<P>;
  const T* from = reinterpret_cast<const T*>(m.data) + first * m.row_stride + column * m.column_stride;
  if (weight) weight += first;
  int64_t i = 0;
  if (m.row_stride == 1 && m.column_stride != 1) {
    for (; i + step * lanes <= rows; i += step * lanes) {
      for (int64_t v = 0; v < kPanel<P>; v += lanes) {
        Vector<P> block[lanes] = {};
        for (int64_t j = 0; j < lanes && v + j < columns; ++j) {
          block[j] = pack_rows<P>(from + i + (v + j) * m.column_stride);
        }
        transpose<P, lanes>(block);
        P* to = panel + i / step * kPanel<P> + v;
        for (int64_t k = 0; k < lanes; ++k) {
          if constexpr (std::is_same_v<P, bf16_pair>) {
            if (weight) block[k] &= (weight[i + 2 * k] != 0 ? 0xffffu : 0u) | (weight[i + 2 * k + 1] != 0 ? 0xffff0000u : 0u);
          } else if (weight) {
            block[k] *= weight[i + k];
          }
          store(to + k * kPanel<P>, block[k]);
        }
      }
    }
  }
  for (; i < rows; i += step) {
    const T* row = from + i * m.row_stride;
    P* to = panel + i / step * kPanel<P>;
    const Accumulator<P>* factors = weight ? weight + i : nullptr;
    int64_t j = 0;
    if (m.column_stride == 1) {
      for (; j + lanes <= columns; j += lanes) store(to + j, pack_columns<P>(row + j, m.row_stride, rows - i, factors));
    }
    for (; j < columns; ++j) to[j] = pack_element<P>(row + j * m.column_stride, m.row_stride, rows - i, factors);
    for (; j < kPanel<P>; ++j) to[j] = 0;
  }
}

// Packs rows [first, first + rows) of columns [column, column + columns).
template <class P>
void pack_panel(const MatrixView& m, int64_t first, int64_t rows, int64_t column, int64_t columns,
                const Accumulator<P>* weight, P* panel) {
  if constexpr (std::is_same_v<P, bf16_pair>) return pack_typed<P, bf16>(m, first, rows, column, columns, weight, panel);
  else switch (m.storage) {
    case Storage::f64:
      return pack_typed<P, double>(m, first, rows, column, columns, weight, panel);
    case Storage::f32:
      return pack_typed<P, float>(m, first, rows, column, columns, weight, panel);
    case Storage::bf16:
      return pack_typed<P, bf16>(m, first, rows, column, columns, weight, panel);
    case Storage::f16:
      return pack_typed<P, f16>(m, first, rows, column, columns, weight, panel);
  }
}

// `count` neighbouring outputs of a row of a convolution: what one element of the kernel meets there. `x` is the input
// element under the first of them; those outside of [0, size) are zeros.
template <class Acc, class T>
STATSMERGE_INLINE void stage_row(const T* line, int64_t x, int64_t size, int64_t stride, int64_t element_stride,
                                 int64_t count, Acc* to) {
  int64_t k = 0;
  for (; k < count && x < 0; ++k, x += stride) to[k] = 0;
  const int64_t inside = x < size ? (size - x + stride - 1) / stride : 0;
  const int64_t end = k + inside < count ? k + inside : count;
  const T* from = line + x * element_stride;
  const int64_t step = stride * element_stride;
  if (step == 1) {
    for (; k + kLanes<Acc> <= end; k += kLanes<Acc>, from += kLanes<Acc>) store(to + k, load_widened<Acc, kLanes<Acc>>(from));
  }
  for (; k < end; ++k, from += step) to[k] = static_cast<Acc>(widen(*from));
  for (; k < count; ++k) to[k] = 0;
}

template <class Acc, class T>
STATSMERGE_INLINE void stage_patches(const Patches& p, int64_t group, int64_t first, int64_t rows, int64_t column,
                                     int64_t columns, Acc* stage) {
  const T* start = reinterpret_cast<const T*>(p.data) + group * p.group_stride;
  for (int64_t done = 0; done < rows;) {
    int64_t place = first + done;
    const int64_t x = place % p.out[2], y = (place /= p.out[2]) % p.out[1], z = (place /= p.out[1]) % p.out[0];
    const int64_t image = place / p.out[0];
    const int64_t count = rows - done < p.out[2] - x ? rows - done : p.out[2] - x;
    for (int64_t j = 0; j < columns; ++j) {
      int64_t element = column + j;
      const int64_t in_x = x * p.stride[2] - p.padding[2] + element % p.kernel[2] * p.dilation[2];
      element /= p.kernel[2];
      const int64_t in_y = y * p.stride[1] - p.padding[1] + element % p.kernel[1] * p.dilation[1];
      element /= p.kernel[1];
      const int64_t in_z = z * p.stride[0] - p.padding[0] + element % p.kernel[0] * p.dilation[0];
      const int64_t channel = element / p.kernel[0];
      const bool outside = in_y < 0 || in_y >= p.size[1] || in_z < 0 || in_z >= p.size[0];
      const T* line = start;
      if (!outside) {
        line += image * p.image_stride + channel * p.channel_stride + in_z * p.element_stride[0] + in_y * p.element_stride[1];
      }
      stage_row<Acc>(line, in_x, outside ? 0 : p.size[2], p.stride[2], p.element_stride[2], count,
                     stage + j * kStage + done);
    }
    done += count;
  }
}

// As pack_panel, for the patches of a group: a few at a time are staged column by column, and packed as a matrix.
template <class Acc>
void pack_patches(const Patches& p, int64_t group, int64_t first, int64_t rows, int64_t column, int64_t columns,
                  const Acc* weight, Acc* panel) {
  Acc stage[kPanel<Acc> * kStage];
  constexpr Storage storage = std::is_same_v<Acc, double> ? Storage::f64 : Storage::f32;
  for (int64_t done = 0; done < rows; done += kStage) {
    const int64_t count = rows - done < kStage ? rows - done : kStage;
    switch (p.storage) {
      case Storage::f64:
        stage_patches<Acc, double>(p, group, first + done, count, column, columns, stage);
        break;
      case Storage::f32:
        stage_patches<Acc, float>(p, group, first + done, count, column, columns, stage);
        break;
      case Storage::bf16:
        stage_patches<Acc, bf16>(p, group, first + done, count, column, columns, stage);
        break;
      case Storage::f16:
        stage_patches<Acc, f16>(p, group, first + done, count, column, columns, stage);
        break;
    }
    const MatrixView staged{reinterpret_cast<const char*>(stage), storage, count, columns, 1, kStage};
    pack_panel<Acc>(staged, 0, count, 0, columns, weight ? weight + first + done : nullptr,
                    panel + done * kPanel<Acc>);
  }
}

template <class P>
STATSMERGE_INLINE Vector<Accumulator<P>> multiply_add(Vector<P> a, Vector<P> b, Vector<Accumulator<P>> sum) {
  if constexpr (std::is_same_v<P, bf16_pair>) {
#ifdef STATSMERGE_BF16_DOT
    return std::bit_cast<Vector<float>>(_mm512_dpbf16_ps(std::bit_cast<__m512>(sum), std::bit_cast<__m512bh>(a),
                                                         std::bit_cast<__m512bh>(b)));
#endif
  } else {
    return sum + a * b;
  }
}

// One tile: tile_rows columns of panel a by the first V vectors of panel b.
template <class P, int V>
STATSMERGE_INLINE void multiply_tile(const P* a, const P* b, int64_t depth, Accumulator<P> alpha, Accumulator<P>* c,
                                     int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns) {
  using Acc = Accumulator<P>;
  constexpr int tile = tile_rows<P>();
  constexpr int64_t lanes = kLanes<P>;
  Vector<Acc> sums[tile][V] = {};
  for (int64_t k = 0; k < depth; ++k, a += kPanel<P>, b += kPanel<P>) {
    Vector<P> right[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) right[v] = load(b + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < tile; ++r) {
      const Vector<P> left = broadcast(a[r]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sums[r][v] = multiply_add<P>(left, right[v], sums[r][v]);
    }
  }
  if (rows >= tile && columns == V * lanes && column_stride == 1) {
#pragma GCC unroll 8
    for (int r = 0; r < tile; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) {
        Acc* to = c + r * row_stride + v * lanes;
        store(to, load(to) + alpha * sums[r][v]);
      }
    }
    return;
  }
  Acc spilled[tile * V * lanes];
  for (int r = 0; r < tile; ++r) {
    for (int v = 0; v < V; ++v) store(spilled + (r * V + v) * lanes, alpha * sums[r][v]);
  }
  for (int64_t r = 0; r < rows && r < tile; ++r) {
    for (int64_t j = 0; j < columns; ++j) c[r * row_stride + j * column_stride] += spilled[r * V * lanes + j];
  }
}

// c [rows, columns] += alpha · aᵀ b for two panels with `rows` and `columns` columns in use.
template <class P>
void multiply_panels(const P* a, const P* b, int64_t depth, Accumulator<P> alpha, Accumulator<P>* c,
                     int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns) {
  constexpr int tile = tile_rows<P>();
  for (int64_t r = 0; r < rows; r += tile) {
    Accumulator<P>* to = c + r * row_stride;
    if (columns > 2 * kLanes<P>) {
      multiply_tile<P, 3>(a + r, b, depth, alpha, to, row_stride, column_stride, rows - r, columns);
    } else if (columns > kLanes<P>) {
      multiply_tile<P, 2>(a + r, b, depth, alpha, to, row_stride, column_stride, rows - r, columns);
    } else {
      multiply_tile<P, 1>(a + r, b, depth, alpha, to, row_stride, column_stride, rows - r, columns);
    }
  }
}

template <class Acc>
inline constexpr ProductKernels<Acc> kProduct{kPanel<Acc>, &pack_panel<Acc>, &pack_patches<Acc>, &multiply_panels<Acc>};

template <>
inline constexpr ProductKernels<bf16_pair> kProduct<bf16_pair>
#ifdef STATSMERGE_BF16_DOT
    {kPanel<bf16_pair>, &pack_panel<bf16_pair>, nullptr, &multiply_panels<bf16_pair>};
#else
    {};
#endif
