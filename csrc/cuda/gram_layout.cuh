// How the tile kernels of gram_wgmma.cuh and gram_mma.cuh hold their operands: one layout of shared memory for both, and
// which entries of it a thread reads. Plain arithmetic, compiled for the device and for the host, where
// tests/native/test_cuda_gram.cpp follows whole tiles through it.
#pragma once

#include "cuda/gram_schedule.cuh"

namespace statsmerge::cuda::gram {

// An operand is the sum of kParts matrices [tokens, columns] of 16-bit numbers: x itself (one part), or three bfloat16
// parts x = x₀ + x₁ + x₂ of 8 bits each, which hold all 24 bits of a float. Of the products of parts, those of x₀x₂ and
// above in size are summed, the small ones first; what is left out is about 2⁻²⁶ |x||x|, less than the rounding of a
// product in float.
struct Product {
  int left, right;
};
template <int kParts>
struct Parts;
template <>
struct Parts<1> {
  static constexpr int kProducts = 1;
  static constexpr int kTokens = 64;  // tokens of one step
  STATSMERGE_HD static constexpr Product product(int) { return {0, 0}; }
};
template <>
struct Parts<3> {
  static constexpr int kProducts = 6;
  static constexpr int kTokens = 32;
  // (0, 2), (2, 0), (1, 1), (0, 1), (1, 0), (0, 0): a digit each.
  STATSMERGE_HD static constexpr Product product(int i) {
    return {0x021010 >> 4 * (5 - i) & 3, 0x201100 >> 4 * (5 - i) & 3};
  }
};

// A step's part of an operand lies in panels of 64 columns. A panel has a row of 128 bytes for every token, and the
// eight 16-byte chunks of a row are permuted by the token's number modulo 8, so that eight tokens of the same columns
// lie in different banks. This is the 128-byte swizzle of the tensor copy engine and of wgmma, whose atoms are 8 tokens.
constexpr int kPanelColumns = 64;
constexpr int kRowBytes = 2 * kPanelColumns;
constexpr int kAtomBytes = 8 * kRowBytes;

STATSMERGE_HD constexpr int panel_bytes(int tokens) { return tokens * kRowBytes; }

// Bytes from the start of a panel to the chunk with columns [8 · chunk, 8 · chunk + 8) of a token.
STATSMERGE_HD constexpr int chunk_offset(int token, int chunk) { return token * kRowBytes + ((chunk ^ (token & 7)) * 16); }

// Bytes from the start of an operand's part to the chunk that holds `column` (a multiple of 8) of a token.
STATSMERGE_HD constexpr int operand_offset(int tokens, int token, int column) {
  return column / kPanelColumns * panel_bytes(tokens) + chunk_offset(token, column % kPanelColumns / 8);
}

// wgmma's descriptor of a matrix in that layout, columns contiguous ("MN-major"), from `address` in shared memory (of
// 1024-byte alignment) on: atoms follow each other by kAtomBytes along the tokens and by a panel along the columns.
STATSMERGE_HD constexpr uint64_t wgmma_descriptor(uint32_t address, int tokens) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  const auto field = [](uint64_t bytes) { return (bytes & 0x3ffff) >> 4; };
  return kSwizzle128 | field(kAtomBytes) << 32 | field(static_cast<uint64_t>(panel_bytes(tokens))) << 16 |
         field(address);
}

// ldmatrix.x4.trans reads four 8 × 8 matrices, their rows (tokens) at the addresses that lanes 8q … 8q + 7 give. These
// are the token and the column, relative to those of the fragment, that a lane has to point at.
struct LaneAddress {
  int token, column;
};

// The 16 × 16 left fragment of mma.m16n8k16: its quarters in the order (rows 0, tokens 0), (8, 0), (0, 8), (8, 8).
STATSMERGE_HD constexpr LaneAddress left_lane(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8}; }

// Two right fragments of 16 × 8 side by side: (tokens 0, columns 0), (8, 0), (0, 8), (8, 8).
STATSMERGE_HD constexpr LaneAddress right_lane(int lane) { return {lane % 8 + lane / 8 % 2 * 8, lane / 16 * 8}; }

// Where a lane's accumulators lie in a 16 × 8 block of a sum, in both kinds of instruction: entries 0 and 1 in row
// lane / 4, entries 2 and 3 eight rows below, in columns 2 (lane % 4) and the next.
STATSMERGE_HD constexpr int sum_row(int lane) { return lane / 4; }
STATSMERGE_HD constexpr int sum_column(int lane) { return lane % 4 * 2; }

}  // namespace statsmerge::cuda::gram
