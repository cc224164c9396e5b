// Scratch memory of one call, and a barrier for the threads of one region.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace tk {

// One mapping, cut into cache-line aligned pieces. Large pages where the system grants them: a page fault per 4 KiB
// would cost a few percent of a call.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (base_ != nullptr) munmap(base_, size_);
  }

  // Sizes are declared first, all memory is taken at once, then addresses are read.
  template <typename T>
  int64_t add(int64_t count) {
    const int64_t at = static_cast<int64_t>(size_);
    size_ += static_cast<size_t>((count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign);
    return at;
  }
  void allocate() {
    if (size_ == 0) return;
    size_ = (size_ + kPage - 1) / kPage * kPage;
    void* memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(memory);
#if defined(MADV_HUGEPAGE)
    madvise(base_, size_, MADV_HUGEPAGE);
#endif
  }
  template <typename T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

 private:
  static constexpr int64_t kAlign = 256;
  static constexpr size_t kPage = size_t{1} << 21;
  char* base_ = nullptr;
  size_t size_ = 0;
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
