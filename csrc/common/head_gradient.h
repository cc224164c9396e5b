// The gradient of a language-model head, dweight[v] = sum_t dz[t, v] h_t, in fp32, one tile of columns at a time. The
// driver cuts the work, packs the hidden states and multiplies; an op says what dz is.
#pragma once

#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "common/streaming.h"
#include "common/workspace.h"

namespace tk {

class HeadGradient {
 public:
  virtual ~HeadGradient() = default;
  // Forms the whole gradient, in as many threads as the runtime grants.
  void form();

 protected:
  struct Shape {
    Rows hidden;
    int64_t num_rows, H, V;
    Type type;      // of the head
    void* dweight;  // [V, H] contiguous
    float* dbias;   // [V] or null
    // A chunk holds rows from one side of this row only.
    int64_t boundary = 0;
    // What the threads share of a row of a chunk, the packed hidden states included.
    int64_t shared_dwords;
  };
  // A tile of columns of a thread: the local-th of its wave.
  struct Tile {
    int64_t v0, cols;
    int thread;
    int64_t local;
  };

  // An op's constructor declares its own memory and then allocates all of it.
  HeadGradient(const Shape& shape, int num_threads);

  // Once per wave: what the op wants packed of its columns for all chunks.
  virtual void begin_wave(const Tile&) {}
  // The thread's share of what the threads share of a chunk, beside the packed hidden states.
  virtual void pack_chunk(const Range& rows, int thread, int of) = 0;
  // Writes dz of the tile to `dz`, a packed A of tile_ rows, and adds its sums over the rows to dbias unless null.
  virtual void gradient_of(const Range& rows, const Tile& tile, uint32_t* dz, float* dbias) = 0;

  const Shape shape_;
  const TileKernels& kernels_;
  int64_t h2_, tile_, chunk_, wave_tiles_;
  int threads_;
  Workspace memory_;

 private:
  struct ThreadMemory {
    int64_t dz, acc, dbias;
  };

  void run(int thread, int of);
  void run_wave(const Range& columns, bool first, int thread, int of);

  int64_t ldd_, b_;
  std::vector<Range> chunks_;
  std::vector<ThreadMemory> own_;
  Barrier barrier_;
};

}  // namespace tk
