// The CUDA kernels of gram_accumulate_, as far as they can be followed on the host: tile maps and schedules, and the
// whole data movement of both tile kernels and of the small kernel, through the functions that the kernels call. What
// the hardware does in between (swizzled copies, ldmatrix, matrix instructions, wgmma's descriptors) is written down
// here from its specification.
#include <algorithm>
#include <cstring>
#include <set>

#include "check.h"
#include "common/convert.h"
#include "cuda/gram_tile.cuh"

using namespace statsmerge;
using namespace statsmerge::cuda::gram;

namespace {

constexpr int kWarps[] = {0, 1, 2, 3, 4, 5, 6, 7};

float widened(uint16_t bits) { return widen(bf16{bits}); }

// Integers, so that every sum is exact and every mistake shows.
std::vector<uint16_t> integers(int64_t count, uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::vector<uint16_t> out(static_cast<size_t>(count));
  for (uint16_t& x : out) x = narrow<bf16>(static_cast<double>(generator() % 7) - 3).bits;
  return out;
}

// One problem and its expected result.
template <int kParts>
struct Case {
  Case(int64_t tokens, int64_t columns, bool one_operand, bool pairs, std::vector<int> steps = {})
      : tokens(tokens),
        columns(columns),
        pitch((columns + 7) / 8 * 8),
        row_stride(columns + (pairs ? columns % 2 : 3)),
        column_stride(pairs ? 1 : 2),
        steps(std::move(steps)),
        left_data(integers(kParts * tokens * pitch, 1)),
        right_data(one_operand ? left_data : integers(kParts * tokens * pitch, 2)),
        gram(cast<float>(normal(columns * row_stride * 2, 3))) {
    for (float& g : gram) g = std::round(4 * g);
    left = {left_data.data(), pitch, tokens * pitch};
    right = one_operand ? left : Operand{right_data.data(), pitch, tokens * pitch};
    problem.columns = columns;
    problem.row_stride = row_stride;
    problem.column_stride = column_stride;
    problem.one_operand = one_operand;
    problem.pairs = pairs;
    problem.most = static_cast<int>((tokens + Parts<kParts>::kTokens - 1) / Parts<kParts>::kTokens);
    count = static_cast<int>(this->steps.size());
    if (count > 0) {
      problem.steps = this->steps.data();
      problem.count = &count;
    }
    expected = gram;
    std::vector<double> sums(static_cast<size_t>(columns * columns));
    for (int p = 0; p < Parts<kParts>::kProducts; ++p) {
      const Product product = Parts<kParts>::product(p);
      for (int64_t t = 0; t < tokens; ++t) {
        const int step = static_cast<int>(t / Parts<kParts>::kTokens);
        if (count > 0 && std::find(this->steps.begin(), this->steps.end(), step) == this->steps.end()) continue;
        const uint16_t* a = left_data.data() + product.left * tokens * pitch + t * pitch;
        const uint16_t* b = right_data.data() + product.right * tokens * pitch + t * pitch;
        for (int64_t i = 0; i < columns; ++i) {
          for (int64_t j = 0; j <= i; ++j) sums[i * columns + j] += widened(a[i]) * widened(b[j]);
        }
      }
    }
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        expected[i * row_stride * column_stride + j * column_stride] += static_cast<float>(sums[i * columns + j]);
      }
    }
    problem.row_stride *= column_stride;
  }

  void start(const Schedule& schedule, int width) {
    problem.schedule = schedule;
    problem.gram = gram.data();
    partial.assign(static_cast<size_t>(schedule.slots()) * kTileRows * width, std::nanf(""));
    problem.partial = partial.data();
  }

  template <int kWidth>
  void finish() {
    for (int divided = 0; divided < problem.schedule.divided() && problem.schedule.slots() > 0; ++divided) {
      for (int row = 0; row < kTileRows; ++row) {
        for (int column = 0; column < kWidth; column += 2) add_partial<kWidth>(problem, divided, row, column);
      }
    }
    CHECK(gram == expected, tokens, columns);
  }

  int64_t tokens, columns, pitch, row_stride, column_stride;
  std::vector<int> steps;
  int count;
  std::vector<uint16_t> left_data, right_data;
  std::vector<float> gram, expected, partial;
  Operand left, right;
  TileProblem problem{};
};

// ---- mma.sync

// A fragment register: two 16-bit numbers, the first in the low half.
float half_of(uint32_t reg, int which) { return widened(static_cast<uint16_t>(reg >> 16 * which)); }

// ldmatrix.x4.trans: matrix q has its rows at the addresses of lanes 8q …; a lane gets two neighbours in a column.
void load_transposed(const std::vector<char>& shared, const int (&address)[32], uint32_t (&out)[32][4]) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int q = 0; q < 4; ++q) {
      out[lane][q] = 0;
      for (int e = 0; e < 2; ++e) {
        const int from = address[8 * q + 2 * (lane % 4) + e];
        CHECK(from % 16 == 0 && from >= 0 && from + 16 <= static_cast<int>(shared.size()));
        uint16_t bits;
        std::memcpy(&bits, shared.data() + from + 2 * (lane / 4), 2);
        out[lane][q] |= static_cast<uint32_t>(bits) << 16 * e;
      }
    }
  }
}

// mma.m16n8k16 with the fragments of a whole warp.
void multiply(const uint32_t (&a)[32][4], const uint32_t (&b)[32][4], int pair, float (&sum)[32][4][4][4], int m,
              int n) {
  float left[16][16], right[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 2; ++e) {
      const int k = 2 * (lane % 4) + e, g = lane / 4;
      left[g][k] = half_of(a[lane][0], e);
      left[g + 8][k] = half_of(a[lane][1], e);
      left[g][k + 8] = half_of(a[lane][2], e);
      left[g + 8][k + 8] = half_of(a[lane][3], e);
      right[k][g] = half_of(b[lane][2 * pair], e);
      right[k + 8][g] = half_of(b[lane][2 * pair + 1], e);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      for (int k = 0; k < 16; ++k) sum[lane][m][n][e] += left[row][k] * right[k][column];
    }
  }
}

template <int kParts>
void start_copy(const Operand& operand, const TileProblem& p, int64_t tokens, int64_t token, int64_t column,
                char* to) {
  using Shape = MmaTile<kParts>;
  std::set<int> written;
  for (int i = 0; i < Shape::kOperandBytes / 16; ++i) {
    const Chunk c = chunk_of<kParts>(i);
    const Source from = source_of(operand, tokens, p.columns, c.part, token + c.token, column + c.column);
    const int at = c.part * Shape::kPartBytes + operand_offset(Shape::kTokens, c.token, c.column);
    CHECK(at + 16 <= Shape::kOperandBytes && written.insert(at).second);
    std::memset(to + at, 0, 16);
    std::memcpy(to + at, operand.data + from.at, static_cast<size_t>(from.bytes));
  }
}

template <int kParts>
void run_mma(Case<kParts>& c, const Schedule& schedule) {
  using Shape = MmaTile<kParts>;
  c.start(schedule, Shape::kWidth);
  const TileProblem& p = c.problem;
  for (int index = 0; index < schedule.units(); ++index) {
    const Unit unit = schedule.unit(index, p.step_count());
    const bool shares = p.one_operand && schedule.triangle.on_diagonal(unit.tile);
    std::vector<float> storage(8 * 32 * 64);
    for (int i = unit.first; i < unit.last; ++i) {
      std::vector<char> shared(2 * Shape::kOperandBytes, 0x7f);
      const int64_t token = static_cast<int64_t>(p.step(i)) * Shape::kTokens;
      start_copy<kParts>(c.right, p, c.tokens, token, int64_t{unit.tile.column} * Shape::kWidth,
                         shared.data() + Shape::kOperandBytes);
      if (!shares) start_copy<kParts>(c.left, p, c.tokens, token, int64_t{unit.tile.row} * kTileRows, shared.data());
      for (const int warp : kWarps) {
        auto& sum = *reinterpret_cast<float(*)[32][4][4][4]>(storage.data() + warp * 32 * 64);
        for (int product = 0; product < Parts<kParts>::kProducts; ++product) {
          const Product parts = Parts<kParts>::product(product);
          for (int k = 0; k < Shape::kTokens; k += 16) {
            const auto load = [&](int start, int column, LaneAddress (*lanes)(int), uint32_t(&out)[32][4]) {
              int address[32];
              for (int lane = 0; lane < 32; ++lane) {
                const LaneAddress to = lanes(lane);
                address[lane] = start + operand_offset(Shape::kTokens, k + to.token, column + to.column);
              }
              load_transposed(shared, address, out);
            };
            uint32_t a[4][32][4], b[2][32][4];
            const int left_at = (shares ? Shape::kOperandBytes : 0) + parts.left * Shape::kPartBytes;
            const int right_at = Shape::kOperandBytes + parts.right * Shape::kPartBytes;
            for (int m = 0; m < 4; ++m) load(left_at, Shape::row_of_warp(warp) + 16 * m, left_lane, a[m]);
            for (int n = 0; n < 2; ++n) load(right_at, Shape::column_of_warp(warp) + 16 * n, right_lane, b[n]);
            for (int m = 0; m < 4; ++m) {
              for (int n = 0; n < 4; ++n) multiply(a[m], b[n / 2], n % 2, sum, m, n);
            }
          }
        }
      }
    }
    for (const int warp : kWarps) {
      const auto& sum = *reinterpret_cast<float(*)[32][4][4][4]>(storage.data() + warp * 32 * 64);
      for (int lane = 0; lane < 32; ++lane) {
        for (int m = 0; m < 4; ++m) {
          for (int half = 0; half < 2; ++half) {
            store_sums<Shape::kWidth, 4>(
                p, unit, Shape::row_of_warp(warp) + 16 * m + 8 * half + sum_row(lane),
                Shape::column_of_warp(warp) + sum_column(lane),
                [&](int n) { return Pair{sum[lane][m][n][2 * half], sum[lane][m][n][2 * half + 1]}; });
          }
        }
      }
    }
  }
  c.template finish<Shape::kWidth>();
}

// ---- wgmma

// Address bits 4 to 6 are combined with bits 7 to 9.
int swizzled(int address) { return address ^ (address >> 7 & 7) << 4; }

// The tensor copy engine: a box of 64 columns and some tokens, row by row, zeros outside of the tensor.
void copy_panel(const Operand& operand, int64_t tokens, int64_t columns, int box, int64_t column, int64_t token,
                int part, std::vector<char>& shared, int to) {
  CHECK(to % 1024 == 0);
  for (int t = 0; t < box; ++t) {
    for (int j = 0; j < 64; ++j) {
      const bool inside = token + t < tokens && column + j < columns;
      const uint16_t bits =
          inside ? operand.data[part * operand.part_stride + (token + t) * operand.pitch + column + j] : uint16_t{0};
      std::memcpy(shared.data() + swizzled(to + t * 128 + 2 * j), &bits, 2);
    }
  }
}

// Entry (column, token) of the matrix that a descriptor stands for, columns contiguous, 128-byte swizzle: atoms of
// 64 columns and 8 tokens, the next columns at the leading offset and the next tokens at the stride offset.
float described(const std::vector<char>& shared, uint64_t descriptor, int column, int token) {
  const auto field = [&](int shift) { return static_cast<int>(descriptor >> shift & 0x3fff) * 16; };
  CHECK(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0);
  const int offset = column % 64 * 2 + column / 64 * field(16) + token % 8 * 128 + token / 8 * field(32);
  uint16_t bits;
  std::memcpy(&bits, shared.data() + swizzled(field(0) + offset), 2);
  return widened(bits);
}

template <int kParts>
void run_wgmma(Case<kParts>& c, const Schedule& schedule) {
  using Shape = WgmmaTile<kParts>;
  c.start(schedule, Shape::kWidth);
  const TileProblem& p = c.problem;
  std::vector<float> a(64 * 16), b(Shape::kWidth * 16), sums(2 * 64 * Shape::kWidth);
  for (int index = 0; index < schedule.units(); ++index) {
    const Unit unit = schedule.unit(index, p.step_count());
    const bool shares = p.one_operand && schedule.triangle.on_diagonal(unit.tile);
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int i = unit.first; i < unit.last; ++i) {
      const int base = (i - unit.first) % Shape::kStages * Shape::kStageBytes + 2048;
      std::vector<char> shared(static_cast<size_t>(base + Shape::kStageBytes), 0x7f);
      const int64_t token = static_cast<int64_t>(p.step(i)) * Shape::kTokens;
      int copied = 0;
      for (int part = 0; part < kParts; ++part) {
        const auto copy = [&](const Operand& operand, int64_t column, int to) {
          copy_panel(operand, c.tokens, c.columns, Shape::kTokens, column, token, part, shared, to);
          copied += Shape::kPanelBytes;
        };
        for (int panel = 0; panel < Shape::kRightPanels; ++panel) {
          copy(c.right, int64_t{unit.tile.column} * Shape::kWidth + panel * kPanelColumns,
               base + Shape::kLeftBytes + (part * Shape::kRightPanels + panel) * Shape::kPanelBytes);
        }
        for (int panel = 0; panel < Shape::kLeftPanels && !shares; ++panel) {
          copy(c.left, int64_t{unit.tile.row} * kTileRows + panel * kPanelColumns,
               base + (part * Shape::kLeftPanels + panel) * Shape::kPanelBytes);
        }
      }
      CHECK(copied == Shape::kStageBytes - (shares ? Shape::kLeftBytes : 0));
      for (int half = 0; half < 2; ++half) {
        const uint64_t left_step =
            wgmma_descriptor(base + Shape::left_start(shares, unit.tile.row, half), Shape::kTokens);
        const uint64_t right_step = wgmma_descriptor(base + Shape::kLeftBytes, Shape::kTokens);
        for (int product = 0; product < Parts<kParts>::kProducts; ++product) {
          const Product parts = Parts<kParts>::product(product);
          const uint64_t left = left_step + parts.left * Shape::left_part_bytes(shares) / 16;
          const uint64_t right = right_step + parts.right * Shape::kRightPartBytes / 16;
          for (int k = 0; k < Shape::kTokens; k += 16) {
            for (int t = 0; t < 16; ++t) {
              for (int m = 0; m < 64; ++m) a[t * 64 + m] = described(shared, left + k * kRowBytes / 16, m, t);
              for (int n = 0; n < Shape::kWidth; ++n) {
                b[t * Shape::kWidth + n] = described(shared, right + k * kRowBytes / 16, n, t);
              }
            }
            for (int t = 0; t < 16; ++t) {
              for (int m = 0; m < 64; ++m) {
                float* row = sums.data() + (64 * half + m) * Shape::kWidth;
                for (int n = 0; n < Shape::kWidth; ++n) row[n] += a[t * 64 + m] * b[t * Shape::kWidth + n];
              }
            }
          }
        }
      }
    }
    for (int half = 0; half < 2; ++half) {
      for (int thread = 0; thread < 128; ++thread) {
        const int warp = thread / 32, lane = thread % 32;
        // A thread's accumulators, as the instruction distributes them.
        std::vector<float> result(Shape::kSums);
        for (int e = 0; e < Shape::kSums; ++e) {
          const int row = 64 * half + 16 * warp + lane / 4 + e / 2 % 2 * 8, column = e / 4 * 8 + lane % 4 * 2 + e % 2;
          result[e] = sums[row * Shape::kWidth + column];
        }
        const int row = 64 * half + 16 * warp + sum_row(lane);
        for (int first = 0; first < Shape::kWidth / 8; first += 8) {
          for (int below = 0; below < 2; ++below) {
            store_sums<Shape::kWidth, 8>(p, unit, row + 8 * below, 8 * first + sum_column(lane), [&](int i) {
              return Pair{result[4 * (first + i) + 2 * below], result[4 * (first + i) + 2 * below + 1]};
            });
          }
        }
      }
    }
  }
  c.template finish<Shape::kWidth>();
}

}  // namespace

DEVICE_TEST(gram_tiles_cover_the_triangle_once) {
  for (int ratio = 1; ratio <= 2; ++ratio) {
    for (int rows = 1; rows < 70; ++rows) {
      const Triangle triangle{rows, ratio};
      std::set<std::pair<int, int>> seen;
      for (int index = 0; index < triangle.count(); ++index) {
        const Tile tile = triangle.tile(index);
        CHECK(tile.row >= 0 && tile.row < rows && tile.column >= 0, rows, index);
        CHECK(tile.column * ratio <= tile.row, rows, index);
        CHECK(seen.insert({tile.row, tile.column}).second, rows, index);
        // The tile has entries right of its row's first diagonal entry, or left of it only.
        CHECK(triangle.on_diagonal(tile) == ((tile.column + 1) * ratio > tile.row));
      }
      int touching = 0;
      for (int row = 0; row < rows; ++row) {
        for (int column = 0; column * ratio <= row; ++column) ++touching;
      }
      CHECK(static_cast<int>(seen.size()) == touching, rows, ratio);
    }
  }
  CHECK(Triangle::of(4096, 2).count() == 272 && Triangle::of(8192, 2).count() == 1056);
  CHECK(Triangle::of(1, 2).count() == 1 && Triangle::of(128, 1).count() == 1 && Triangle::of(129, 1).count() == 3);
}

DEVICE_TEST(gram_tiles_of_a_group_are_close) {
  // What 132 tiles in a row read of x: at most about 16 rows and as many columns of 256 (plus the group's other end).
  const Triangle triangle = Triangle::of(16384, 2);
  for (int first = 0; first + 132 <= triangle.count(); first += 132) {
    std::set<int> rows, columns;
    for (int index = first; index < first + 132; ++index) {
      rows.insert(triangle.tile(index).row);
      columns.insert(triangle.tile(index).column);
    }
    CHECK(rows.size() <= 2 * kGroupRows && rows.size() + 2 * columns.size() <= 64, first, rows.size(), columns.size());
  }
}

DEVICE_TEST(gram_schedules_cover_every_step_once) {
  for (const int processors : {1, 7, 108, 132}) {
    for (const int rows : {1, 2, 5, 16, 17, 32, 33, 64}) {
      for (const int steps : {1, 2, 3, 16, 100, 512}) {
        for (int ratio = 1; ratio <= 2; ++ratio) {
          const Schedule schedule = plan(Triangle{rows, ratio}, processors, steps);
          const int count = schedule.triangle.count();
          CHECK(schedule.whole <= count && schedule.divided() < processors && schedule.split <= std::max(steps, 1));
          for (const int taken : {steps, steps / 3, 0}) {  // as many as a list of used steps may have
            std::vector<int> next(static_cast<size_t>(rows) * rows, 0);
            std::set<int> slots;
            for (int index = 0; index < schedule.units(); ++index) {
              const Unit unit = schedule.unit(index, taken);
              int& at = next[unit.tile.row * rows + unit.tile.column];
              CHECK(unit.first == at && unit.last >= at, index);  // in the order of the tokens, without gaps
              at = unit.last;
              CHECK((unit.slot < 0) == (index < schedule.whole));
              if (unit.slot >= 0) {
                CHECK(unit.slot < schedule.slots() && slots.insert(unit.slot).second);
                const Tile tile = schedule.triangle.tile(schedule.whole + unit.slot / schedule.split);
                CHECK(tile.row == unit.tile.row && tile.column == unit.tile.column);
              }
            }
            CHECK(static_cast<int>(slots.size()) == schedule.slots());
            for (int index = 0; index < count; ++index) {
              const Tile tile = schedule.triangle.tile(index);
              CHECK(next[tile.row * rows + tile.column] == taken);
            }
          }
        }
      }
    }
  }
}

DEVICE_TEST(gram_schedules_balance_the_device) {
  // The busiest thread block's steps over what an even division would give it.
  const auto imbalance = [](int64_t columns, int ratio, int steps) {
    const Schedule schedule = plan(Triangle::of(columns, ratio), 132, steps);
    std::vector<int64_t> work(132);
    for (int index = 0; index < schedule.units(); ++index) {
      const Unit unit = schedule.unit(index, steps);
      work[index % 132] += unit.last - unit.first;
    }
    const double even = static_cast<double>(schedule.triangle.count()) * steps / 132;
    return static_cast<double>(*std::max_element(work.begin(), work.end())) / even;
  };
  CHECK(imbalance(4096, 2, 512) < 1.01, imbalance(4096, 2, 512));
  CHECK(imbalance(8192, 2, 512) < 1.01);
  CHECK(imbalance(4096, 1, 1024) < 1.01);
  CHECK(imbalance(768, 2, 512) < 1.1);
  CHECK(imbalance(5120, 2, 512) < 1.1);
}

DEVICE_TEST(gram_mma_kernel_on_the_host) {
  for (const bool one_operand : {true, false}) {
    for (const bool pairs : {true, false}) {
      Case<1> plain(one_operand ? 130 : 64, 259, one_operand, pairs);
      run_mma(plain, {Triangle::of(259, 1), 3, 2});
      Case<3> split(70, 133, one_operand, pairs);
      run_mma(split, plan(Triangle::of(133, 1), 4, 3));
    }
  }
  Case<1> one_token(1, 65, true, true);
  run_mma(one_token, plan(Triangle::of(65, 1), 132, 1));
  Case<1> listed(300, 140, false, true, {0, 3, 4});
  run_mma(listed, {Triangle::of(140, 1), 0, 5});
}

DEVICE_TEST(gram_wgmma_kernel_on_the_host) {
  for (const bool one_operand : {true, false}) {
    for (const bool pairs : {true, false}) {
      Case<1> plain(one_operand ? 130 : 64, 390, one_operand, pairs);
      run_wgmma(plain, {Triangle::of(390, 2), 4, 2});
      Case<3> split(70, 133, one_operand, pairs);
      run_wgmma(split, plan(Triangle::of(133, 1), 4, 3));
    }
  }
  Case<1> one_token(1, 65, true, true);
  run_wgmma(one_token, plan(Triangle::of(65, 2), 132, 1));
  Case<1> listed(300, 140, false, true, {0, 3, 4});
  run_wgmma(listed, {Triangle::of(140, 2), 0, 5});
}

DEVICE_TEST(gram_shared_memory_is_read_without_conflicts) {
  // The eight addresses of each quarter of an ldmatrix lie in different banks: 16-byte chunks modulo 128 bytes.
  for (const auto lanes : {left_lane, right_lane}) {
    for (int column = 0; column < 128; column += 16) {
      for (int q = 0; q < 4; ++q) {
        std::set<int> banks;
        for (int lane = 8 * q; lane < 8 * q + 8; ++lane) {
          banks.insert(operand_offset(64, lanes(lane).token, column + lanes(lane).column) / 16 % 8);
        }
        CHECK(banks.size() == 8, column, q);
      }
    }
  }
  static_assert(WgmmaTile<1>::kSharedBytes + 1024 <= 227 * 1024 && WgmmaTile<3>::kSharedBytes + 1024 <= 227 * 1024);
  static_assert(MmaTile<1>::kSharedBytes <= 99 * 1024 && MmaTile<3>::kSharedBytes <= 99 * 1024);
  static_assert(WgmmaTile<1>::kStageBytes % kAtomBytes == 0 && WgmmaTile<3>::kStageBytes % kAtomBytes == 0);
}

DEVICE_TEST(gram_three_parts_hold_a_float) {
  const auto x = cast<float>(normal(2000, 4)), y = cast<float>(normal(2000, 5));
  const auto parts_of = [](float value) {
    std::vector<double> parts;
    for (int part = 0; part < 3; ++part) {
      parts.push_back(widen(narrow<bf16>(static_cast<double>(value))));
      value -= static_cast<float>(parts.back());
    }
    CHECK(value == 0);
    return parts;
  };
  std::set<std::pair<int, int>> products;
  for (int p = 0; p < 6; ++p) products.insert({Parts<3>::product(p).left, Parts<3>::product(p).right});
  CHECK((products == std::set<std::pair<int, int>>{{0, 0}, {0, 1}, {1, 0}, {1, 1}, {0, 2}, {2, 0}}));
  CHECK(Parts<3>::product(5).left == 0 && Parts<3>::product(5).right == 0);  // the largest comes last
  double squares = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const auto a = parts_of(x[i]), b = parts_of(y[i]);
    double sum = 0;
    for (const auto& [left, right] : products) sum += a[left] * b[right];
    const double exact = static_cast<double>(x[i]) * y[i];
    CHECK(std::abs(sum - exact) <= 0x1p-23 * std::abs(exact), x[i], y[i]);
    squares += (sum / exact - 1) * (sum / exact - 1);
  }
  CHECK(std::sqrt(squares / static_cast<double>(x.size())) < 0x1p-26);
}

DEVICE_TEST(gram_small_kernel_on_the_host) {
  for (int columns = 1; columns <= kSmall; columns += columns < 10 ? 1 : 9) {
    const SmallShape shape{columns};
    CHECK(shape.slices() >= 1 && shape.slices() * shape.entries() <= kSmallShared);
    CHECK(shape.tokens() >= 1 && shape.tokens() * shape.pitch() <= kSmallShared && shape.tokens() <= kSmallTokens);
    std::set<std::pair<int, int>> seen;
    for (int e = 0; e < shape.entries(); ++e) {
      const Tile at = shape.entry(e);
      CHECK(at.row < shape.pitch() && at.column < shape.pitch() && seen.insert({at.row, at.column}).second);
    }
    for (int i = 0; i < columns; ++i) {
      for (int j = 0; j <= i; ++j) CHECK(seen.count({i, j}) == 1, columns, i, j);
    }
    for (const int count : {1, 37, shape.tokens()}) {
      for (const bool tokens_contiguous : {false, true}) {
        const int length = tokens_contiguous ? count : columns;
        std::vector<int> visits(static_cast<size_t>(count) * columns);
        for (int thread = 0; thread < kSmallThreads; ++thread) {
          Walk walk(thread, kSmallThreads, length);
          for (int i = thread; i < count * columns; i += kSmallThreads, walk.next()) {
            CHECK(walk.outer * length + walk.inner == i && walk.inner < length);
            ++visits[i];
          }
        }
        CHECK(std::count(visits.begin(), visits.end(), 1) == count * columns);
      }
    }
  }
}
