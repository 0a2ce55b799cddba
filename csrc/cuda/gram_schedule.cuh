// Who computes which part of a Gram's lower triangle: the tiles that cover it, the order they are taken in, and how the
// tokens of the last ones are divided so that every multiprocessor has the same work. Plain arithmetic, compiled for
// the device and for the host, where tests/native/test_cuda_gram.cpp checks it.
#pragma once

#include <cstdint>

#include "cuda/host_device.h"

namespace statsmerge::cuda::gram {

constexpr int kTileRows = 128;
constexpr int kGroupRows = 16;  // rows of tiles that are taken together

struct Tile {
  int row, column;  // in tiles
};

// The tiles that touch the lower triangle: kTileRows rows of the matrix high and `ratio` times as wide. They are
// numbered by groups of kGroupRows rows of tiles, and column by column in a group: the tiles that a device computes at
// the same time then share their operands in its L2 cache (132 tiles of 128 × 256 need some 2048 + 2048 columns of
// x).
struct Triangle {
  int rows;   // of tiles
  int ratio;  // width over height of a tile

  STATSMERGE_HD static Triangle of(int64_t columns, int ratio) {
    return {static_cast<int>((columns + kTileRows - 1) / kTileRows), ratio};
  }

  // Tiles in the rows before `row`: row i has i / ratio + 1.
  STATSMERGE_HD int before(int row) const {
    const int whole = row / ratio;
    return row + ratio * (whole * (whole - 1) / 2) + row % ratio * whole;
  }
  STATSMERGE_HD int count() const { return before(rows); }

  STATSMERGE_HD Tile tile(int index) const {
    int first = 0, last = kGroupRows;
    while (last < rows && before(last) <= index) {
      first = last;
      last += kGroupRows;
    }
    if (last > rows) last = rows;
    index -= before(first);
    const int height = last - first;
    int column = first / ratio + 1;  // the columns before this one are in every row of the group
    if (index < column * height) return {first + index % height, index / height};
    index -= column * height;
    while (index >= last - ratio * column) index -= last - ratio * column++;
    return {ratio * column + index, column};
  }

  // Whether the columns of the tile's left operand are among those of its right one.
  STATSMERGE_HD bool on_diagonal(const Tile& t) const { return t.row / ratio == t.column; }
};

// What one thread block does at a time: the tokens of steps [first, last) of one tile.
struct Unit {
  Tile tile;
  int first, last;
  int slot;  // where its sum goes: into the Gram (−1), or into this place among the partial sums
};

// The first `whole` tiles are computed by one thread block each, from all tokens; the tokens of each of the others are
// cut into `split` ranges, whose sums are written apart and added up in the order of the tokens, so that the result
// does not depend on which block is faster. Block b of g takes units b, b + g, b + 2g, …
struct Schedule {
  Triangle triangle;
  int whole, split;

  STATSMERGE_HD int divided() const { return triangle.count() - whole; }  // tiles whose tokens are divided
  STATSMERGE_HD int slots() const { return divided() * split; }
  STATSMERGE_HD int units() const { return whole + slots(); }

  STATSMERGE_HD Unit unit(int index, int steps) const {
    if (index < whole) return {triangle.tile(index), 0, steps, -1};
    const int slot = index - whole, part = slot % split;
    return {triangle.tile(whole + slot / split), static_cast<int>(static_cast<int64_t>(steps) * part / split),
            static_cast<int>(static_cast<int64_t>(steps) * (part + 1) / split), slot};
  }
};

// The schedule for `processors` thread blocks at a time and tiles of `steps` steps. Tiles that fill the device a whole
// number of times stay whole; the rest, fewer than `processors`, is divided as a model of the time says, in units of a
// step: a tile's sum costs kWrite to write and, as a partial sum, as much again to be read.
inline Schedule plan(const Triangle& triangle, int processors, int steps) {
  constexpr int64_t kWrite = 8, kLaunch = 8;
  constexpr int kMostParts = 128;
  const int count = triangle.count(), rest = count % processors;
  const auto rounds = [&](int parts) { return (static_cast<int64_t>(rest) * parts + processors - 1) / processors; };
  int best = 1;
  int64_t least = rounds(1) * (steps + kWrite);
  for (int parts = 2; parts <= kMostParts && parts <= steps; ++parts) {
    const int64_t cost = rounds(parts) * ((steps + parts - 1) / parts + 2 * kWrite) + kLaunch;
    if (cost < least) {
      least = cost;
      best = parts;
    }
  }
  return {triangle, best == 1 ? count : count - rest, best};
}

// ---- small Grams (gram_small.cuh)

constexpr int kSmall = 64;  // columns
constexpr int kSmallThreads = 256;
constexpr int kSmallTokens = 256;   // at most this many at a time
constexpr int kSmallShared = 4096;  // numbers of a tile: 64 tokens of 64 columns

// The shape of the work on a Gram of some columns, and the order of its entries among the partial sums.
struct SmallShape {
  int columns;

  STATSMERGE_HD int edge() const { return (columns + 3) / 4; }           // blocks of 4
  STATSMERGE_HD int pitch() const { return 4 * edge(); }                 // of a token in shared memory
  STATSMERGE_HD int blocks() const { return edge() * (edge() + 1) / 2; }  // of 4 × 4 in the triangle
  STATSMERGE_HD int slices() const { return kSmallThreads / blocks(); }
  STATSMERGE_HD int tokens() const {
    return kSmallShared / pitch() < kSmallTokens ? kSmallShared / pitch() : kSmallTokens;
  }
  STATSMERGE_HD int entries() const { return 16 * blocks(); }

  // Block `index` of the triangle, row by row.
  STATSMERGE_HD Tile block(int index) const {
    int row = 0;
    while ((row + 1) * (row + 2) / 2 <= index) ++row;
    return {row, index - row * (row + 1) / 2};
  }
  // Row and column of an entry of the partial sums.
  STATSMERGE_HD Tile entry(int index) const {
    const Tile b = block(index / 16);
    return {4 * b.row + index % 16 / 4, 4 * b.column + index % 4};
  }
};

// Positions in a tile of `inner` numbers in a row that one thread visits: `step` further each time, without divisions.
struct Walk {
  int outer, inner, outer_step, inner_step, length;

  STATSMERGE_HD Walk(int start, int step, int length)
      : outer(start / length),
        inner(start % length),
        outer_step(step / length),
        inner_step(step % length),
        length(length) {}
  STATSMERGE_HD void next() {
    outer += outer_step;
    inner += inner_step;
    if (inner >= length) {
      inner -= length;
      ++outer;
    }
  }
};

}  // namespace statsmerge::cuda::gram
