// How the linear ops cut their work. A block of rows is shared by the threads of a group; each streams its own part of
// the vocabulary past the rows, and the parts are merged at the end of the block. Groups take blocks in turn.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/parallel.h"
#include "common/tile_kernels.h"
#include "common/workspace.h"

namespace tk {

struct Plan {
  int64_t block_rows;  // rows whose gradient is accumulated at a time, per group
  int64_t tile_rows, tile_cols;
  int members, groups;
};

// Scores exist for this many columns at a time, so that they stay in the cache next to the operands.
inline constexpr int64_t kScoreCols = 256;
inline constexpr int64_t kScoreStride = c_stride(kScoreCols);

// row_bytes: fp32 gradient of a row (0: none); column_bytes: packed operands of a column. A thread takes 8 MiB of each.
inline Plan make_plan(int64_t num_rows, int64_t V, int64_t row_bytes, int64_t column_bytes, int threads) {
  constexpr int64_t kBytes = int64_t{8} << 20;
  Plan plan;
  plan.tile_rows = 256;
  const int64_t fitting = row_bytes == 0 ? 2048 : std::max(kBytes / row_bytes / kRowPad * kRowPad, kRowPad);
  // Equal blocks: each reads and packs the whole of W.
  const int64_t most = std::min<int64_t>(fitting, 2048), blocks = std::max<int64_t>((num_rows + most - 1) / most, 1);
  plan.block_rows = round_up((num_rows + blocks - 1) / blocks, kRowPad);
  plan.tile_cols = std::clamp(kBytes / column_bytes / kColPad * kColPad, kColPad, kMaxTileCols);
  // Few rows: the packed tile is used once, and must be in the cache then.
  if (plan.block_rows <= 128) plan.tile_cols = std::min(plan.tile_cols, kScoreCols);
  // A thread should have a few hundred columns at least; beyond that, threads take rows.
  plan.members = static_cast<int>(std::clamp<int64_t>((V + kScoreCols - 1) / kScoreCols, 1, threads));
  plan.groups = std::max(1, threads / plan.members);
  if (plan.groups > 1)
    plan.block_rows = std::min(plan.block_rows, round_up((num_rows + plan.groups - 1) / plan.groups, kRowPad));
  return plan;
}

// The columns of one member of a group; empty for the last ones when there are few.
inline Range member_columns(int64_t V, int member, int members) {
  const Range units = split((V + kColPad - 1) / kColPad, member, members);
  return {std::min(units.begin * kColPad, V), std::min(units.end * kColPad, V)};
}

inline int64_t bytes_of(Type type) { return type == Type::f32 ? 4 : 2; }

// One element of a packed A, on either side of the kernels.
inline uint32_t* packed_at(bool pairs, uint32_t* a, int64_t rows_a, int64_t r, int64_t k) {
  const int64_t k2 = pairs ? k / 2 : k;
  return a + (k2 / kKC * rows_a + r) * kKS + k2 % kKC;
}
inline float packed_value(bool pairs, uint32_t* a, int64_t rows_a, int64_t r, int64_t k) {
  uint32_t bits = *packed_at(pairs, a, rows_a, r, k);
  if (pairs) bits = k % 2 == 0 ? bits << 16 : bits & 0xffff0000u;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void set_packed_value(bool pairs, uint32_t* a, int64_t rows_a, int64_t r, int64_t k, float value) {
  uint32_t bits, *at = packed_at(pairs, a, rows_a, r, k);
  std::memcpy(&bits, &value, 4);
  if (!pairs) {
    *at = bits;
    return;
  }
  const uint32_t half = value != value ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *at = k % 2 == 0 ? (*at & 0xffff0000u) | half : (*at & 0xffffu) | half << 16;
}

// The same rows from row r on.
inline Rows rows_from(Rows rows, int64_t r) {
  if (rows.index != nullptr) {
    rows.index += r;
  } else {
    rows.data = static_cast<const char*>(rows.data) + r * rows.stride * bytes_of(rows.type);
  }
  return rows;
}

// Packs the member's share of rows [r0, r0 + rows) to the group's slab `a` of height rows_a; a barrier must follow.
inline void pack_share(const TileKernels& kernels, const Rows& source, int64_t r0, int64_t rows, int64_t k_elems,
                       int64_t rows_a, uint32_t* a, int member, int members) {
  const Range share = split(round_up(rows, kRowPad) / kRowPad, member, members);
  const int64_t first = share.begin * kRowPad, last = share.end * kRowPad;
  if (first < last)
    kernels.pack_a(rows_from(source, r0 + first), std::min(rows, last) - first, last - first, k_elems, rows_a,
                   a + first * kKS);
}

// A pass of all blocks of rows over the vocabulary.
class BlockPass {
 public:
  virtual ~BlockPass() = default;
  // Returns how many threads shared the columns of a block: the runtime may grant fewer threads than planned, and then
  // one group of them does everything.
  int run() {
    int members = plan_.members;
    parallel(plan_.members * plan_.groups, [&](int thread, int of) {
      const bool as_planned = of == plan_.members * plan_.groups;
      const int own_members = as_planned ? plan_.members : std::min(of, plan_.members);
      const int groups = as_planned ? plan_.groups : 1, group = thread / own_members;
      if (thread == 0) members = own_members;
      if (group >= groups) return;
      const FlushDenormals flush;
      const int64_t step = plan_.block_rows;
      for (int64_t r0 = group * step; r0 < num_rows_; r0 += groups * step)
        block(r0, std::min(step, num_rows_ - r0), group, thread % own_members, own_members);
    });
    return members;
  }

 protected:
  BlockPass(int64_t num_rows, const Plan& plan) : plan_(plan), num_rows_(num_rows), barriers_(plan.groups) {}
  // One member's part of a block; all members of the group are in it at the same time.
  virtual void block(int64_t r0, int64_t rows, int group, int member, int members) = 0;

  const Plan& plan_;
  const int64_t num_rows_;
  std::vector<Barrier> barriers_;  // of the groups
  Workspace memory_;
};

}  // namespace tk
