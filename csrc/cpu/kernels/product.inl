// Compiled for every target by product.cpp. A panel holds kPanel<Acc> columns of a matrix, row after row; columns that
// the matrix lacks are zeros. Three vectors wide, it is the right operand of a tile as it stands, and lends the left
// operand its elements one by one: a single packed copy of x serves both sides of xᵀ x.

template <class Acc>
constexpr int kPanel = 3 * kLanes<Acc>;

// Rows of a tile: as many as leave registers for one row of the right operand and a factor, and divide the panel.
template <class Acc>
constexpr int tile_rows() {
  int rows = kRegisters == 32 ? 8 : 4;
  while (kPanel<Acc> % rows) --rows;
  return rows;
}

template <class Acc, class T>
STATSMERGE_INLINE void pack_typed(const MatrixView& m, int64_t first, int64_t rows, int64_t column, int64_t columns,
                                  const Acc* weight, Acc* panel) {
  constexpr int64_t lanes = kLanes<Acc>;
  const T* from = reinterpret_cast<const T*>(m.data) + first * m.row_stride + column * m.column_stride;
  const bool whole = columns == kPanel<Acc> && m.column_stride == 1;
  for (int64_t i = 0; i < rows; ++i, from += m.row_stride, panel += kPanel<Acc>) {
    const Acc factor = weight ? weight[first + i] : Acc{1};
    if (whole) {
      for (int v = 0; v < 3; ++v) {
        store(panel + v * lanes, factor * load_widened<Acc, kLanes<Acc>>(from + v * lanes));
      }
      continue;
    }
    for (int64_t j = 0; j < columns; ++j) panel[j] = factor * static_cast<Acc>(widen(from[j * m.column_stride]));
    for (int64_t j = columns; j < kPanel<Acc>; ++j) panel[j] = 0;
  }
}

template <class Acc>
void pack_panel(const MatrixView& m, int64_t first, int64_t rows, int64_t column, int64_t columns, const Acc* weight,
                Acc* panel) {
  switch (m.storage) {
    case Storage::f64:
      return pack_typed<Acc, double>(m, first, rows, column, columns, weight, panel);
    case Storage::f32:
      return pack_typed<Acc, float>(m, first, rows, column, columns, weight, panel);
    case Storage::bf16:
      return pack_typed<Acc, bf16>(m, first, rows, column, columns, weight, panel);
    case Storage::f16:
      return pack_typed<Acc, f16>(m, first, rows, column, columns, weight, panel);
  }
}

// One tile: tile_rows columns of panel a by the first V vectors of panel b.
template <class Acc, int V>
STATSMERGE_INLINE void multiply_tile(const Acc* a, const Acc* b, int64_t depth, Acc alpha, Acc* c, int64_t row_stride,
                                     int64_t column_stride, int64_t rows, int64_t columns) {
  constexpr int tile = tile_rows<Acc>();
  constexpr int64_t lanes = kLanes<Acc>;
  Vector<Acc> sums[tile][V] = {};
  for (int64_t k = 0; k < depth; ++k, a += kPanel<Acc>, b += kPanel<Acc>) {
    Vector<Acc> right[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) right[v] = load(b + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < tile; ++r) {
      const Vector<Acc> left = broadcast(a[r]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) sums[r][v] += left * right[v];
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
template <class Acc>
void multiply_panels(const Acc* a, const Acc* b, int64_t depth, Acc alpha, Acc* c, int64_t row_stride,
                     int64_t column_stride, int64_t rows, int64_t columns) {
  constexpr int tile = tile_rows<Acc>();
  for (int64_t r = 0; r < rows; r += tile) {
    Acc* to = c + r * row_stride;
    if (columns > 2 * kLanes<Acc>) {
      multiply_tile<Acc, 3>(a + r, b, depth, alpha, to, row_stride, column_stride, rows - r, columns);
    } else if (columns > kLanes<Acc>) {
      multiply_tile<Acc, 2>(a + r, b, depth, alpha, to, row_stride, column_stride, rows - r, columns);
    } else {
      multiply_tile<Acc, 1>(a + r, b, depth, alpha, to, row_stride, column_stride, rows - r, columns);
    }
  }
}

template <class Acc>
inline constexpr ProductKernels<Acc> kProduct{kPanel<Acc>, &pack_panel<Acc>, &multiply_panels<Acc>};
