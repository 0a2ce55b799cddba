// How the tile kernels of gram_wgmma.cuh and gram_mma.cuh hold their operands: one layout of shared memory for both,
// and which entries of it a thread reads. Plain arithmetic, compiled for the device and for the host, where
// tests/native/test_cuda_gram.cpp follows whole tiles through it.
#pragma once

#include "cuda/gram_schedule.cuh"

namespace statsmerge::cuda::gram {

// An operand is the sum of kParts matrices [tokens, columns] of 16-bit numbers: x itself (one part), or three bfloat16
// parts x = x₀ + x₁ + x₂ of 8 bits each, which hold all 24 bits of a float. Of the products of parts, those of x₀x₂ and
// above in size are summed, the small ones first; what is left out of a product is at most 2⁻²³ of it, less than 2⁻²⁶
// on average and of either sign, which is below what a float sum of some products loses to rounding.
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
// lie in different banks. This is the 128-byte swizzle of the tensor copy engine and of wgmma, with atoms of 8 tokens.
constexpr int kPanelColumns = 64;
constexpr int kRowBytes = 2 * kPanelColumns;
constexpr int kAtomBytes = 8 * kRowBytes;

STATSMERGE_HD constexpr int panel_bytes(int tokens) { return tokens * kRowBytes; }

// Bytes from the start of a panel to the chunk with columns [8 · chunk, 8 · chunk + 8) of a token.
STATSMERGE_HD constexpr int chunk_offset(int token, int chunk) {
  return token * kRowBytes + (chunk ^ (token & 7)) * 16;
}

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

// The tile of gram_mma.cuh and its division among eight warps, each of 64 × 32 entries.
template <int kParts>
struct MmaTile {
  static constexpr int kTokens = Parts<kParts>::kTokens;
  static constexpr int kWidth = 128;
  static constexpr int kThreads = 256;
  static constexpr int kStages = kParts == 1 ? 3 : 2;
  static constexpr int kPartBytes = kWidth / kPanelColumns * panel_bytes(kTokens);
  static constexpr int kOperandBytes = kParts * kPartBytes;
  static constexpr int kSharedBytes = kStages * 2 * kOperandBytes;  // 96 KiB

  STATSMERGE_HD static constexpr int row_of_warp(int warp) { return warp / 4 * 64; }
  STATSMERGE_HD static constexpr int column_of_warp(int warp) { return warp % 4 * 32; }
};

// The i-th 16-byte chunk of an operand's step, in the order of copying: neighbouring threads take neighbouring chunks
// of a token's row.
struct Chunk {
  int part, token, column;
};
template <int kParts>
STATSMERGE_HD constexpr Chunk chunk_of(int i) {
  constexpr int kTokens = Parts<kParts>::kTokens, kRow = MmaTile<kParts>::kWidth / 8;
  return {i / (kRow * kTokens), i / kRow % kTokens, i % kRow * 8};
}

// An operand in memory: parts [tokens, columns], rows of `pitch` numbers; rows and parts are 16-byte aligned.
struct Operand {
  const uint16_t* data;
  int64_t pitch, part_stride;
};

// Where a chunk is read from, and how many of its bytes lie inside of the matrix.
struct Source {
  int64_t at;
  int bytes;
};
STATSMERGE_HD Source source_of(const Operand& operand, int64_t tokens, int64_t columns, int part, int64_t token,
                               int64_t column) {
  const int64_t left = columns - column;
  if (token >= tokens || left <= 0) return {0, 0};
  return {part * operand.part_stride + token * operand.pitch + column, left < 8 ? static_cast<int>(2 * left) : 16};
}

// The tile of gram_wgmma.cuh: a stage of shared memory holds the left operand's parts, then the right one's.
template <int kParts>
struct WgmmaTile {
  static constexpr int kTokens = Parts<kParts>::kTokens;
  static constexpr int kRatio = kParts == 1 ? 2 : 1;
  static constexpr int kWidth = kRatio * kTileRows;
  static constexpr int kThreads = 384;
  static constexpr int kStages = 4;
  static constexpr int kPanelBytes = panel_bytes(kTokens);
  static constexpr int kLeftPanels = kTileRows / kPanelColumns, kRightPanels = kWidth / kPanelColumns;
  static constexpr int kRightPartBytes = kRightPanels * kPanelBytes;
  static constexpr int kLeftBytes = kParts * kLeftPanels * kPanelBytes;
  static constexpr int kStageBytes = kLeftBytes + kParts * kRightPartBytes;  // 48 KiB
  static constexpr int kSharedBytes = kStages * kStageBytes + kAtomBytes;    // with room to align
  static constexpr int kSums = kWidth / 2;                                   // a thread's

  // Where, in a stage, the columns of 64 rows of the tile lie: in the left operand's panels, or among the right one's
  // if these hold the same columns (`shares`).
  STATSMERGE_HD static constexpr int left_start(bool shares, int tile_row, int half) {
    return shares ? kLeftBytes + (tile_row % kRatio * kLeftPanels + half) * kPanelBytes : half * kPanelBytes;
  }
  STATSMERGE_HD static constexpr int left_part_bytes(bool shares) {
    return (shares ? kRightPanels : kLeftPanels) * kPanelBytes;
  }
};

}  // namespace statsmerge::cuda::gram
