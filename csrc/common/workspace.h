// Scratch memory of one call, and a barrier for the threads of one region.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tk {

// Memory in large pages where the system grants them: a page fault per 4 KiB would cost a few percent of a call.
struct Pages {
  char* base = nullptr;
  size_t size = 0;
};

// Keeps the mapping that was last given back for the next call, marked as free: the system takes its pages when it
// needs them. Fresh pages are zeroed first, which costs as much as a tenth of a call, and half of one in a virtual
// machine whose host takes free pages back.
class PageStore {
 public:
  // most: bytes of the largest mapping that is kept. exact: a kept one serves its own size only.
  PageStore(size_t most, bool exact) : most_(most), exact_(exact) {}
  Pages take(size_t size);
  void give(Pages pages);
  // Unmaps what is kept.
  void release();

 private:
  const size_t most_;
  const bool exact_;
  std::mutex mutex_;
  Pages pages_;
};

// Of the scratch memory of calls, and of gradients of a head: as large as the head, and of one size from step to step.
PageStore& scratch_store();
PageStore& gradient_store();
// Asks for large pages behind [start, start + size) before it is first written.
void use_large_pages(void* start, size_t size);

// Scratch memory of one call, cut into cache-line aligned pieces. What is in it at first is arbitrary.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { scratch_store().give(pages_); }

  // Sizes are declared first, all memory is taken at once, then addresses are read.
  template <typename T>
  int64_t add(int64_t count) {
    const int64_t at = static_cast<int64_t>(size_);
    size_ += static_cast<size_t>((count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign);
    return at;
  }
  void allocate() {
    if (size_ != 0) pages_ = scratch_store().take(size_);
  }
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(pages_.base + offset);
  }

 private:
  static constexpr int64_t kAlign = 256;
  size_t size_ = 0;
  Pages pages_;
};

// Waits until all `count` threads have arrived; reusable. Spins shortly, then yields: cores may be shared.
class Barrier {
 public:
  void wait(int count) {
    if (count <= 1) return;
    const int phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins > 4096) {
        std::this_thread::yield();
      } else {
#if defined(__x86_64__)
        _mm_pause();
#endif
      }
    }
  }

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

// Denormal results count as 0 in this thread while the object lives: a tail of tiny probabilities would otherwise cost
// a microcode assist each, at no benefit.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(before_); }
#else
  FlushDenormals() = default;
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

#if defined(__x86_64__)
 private:
  unsigned before_;
#endif
};

}  // namespace tk
