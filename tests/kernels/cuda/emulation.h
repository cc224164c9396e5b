// Runs CUDA kernels on the CPU, so that their logic can be tested without a GPU.
//
// The very .cu files are compiled as C++ with this header included first. Every thread of a block is a fibre
// (ucontext) with its own stack; blocks run one after another. Barriers, warp shuffles and warp reductions are
// rendezvous: a fibre that arrives early gives way. Shared memory is a heap block of the exact size, filled with 0xff
// (NaN) before each block, so AddressSanitizer sees reads beyond it and a read before a write shows. Threads run in
// several orders, because a missing barrier shows only in some: forward, reverse, shuffled at every turn, and
// warps_ahead, in which a warp runs to the block's next barrier before the next warp starts. Threads that wait at
// different rendezvous, or for one that has exited, are an error.
//
// Under ThreadSanitizer every thread of a block is one of its fibres, new for each block, so that neither threads nor
// blocks are ordered by having run one after another: __syncthreads and __syncwarp order what is before and after them,
// shuffles order nothing, atomics are relaxed, and a launch is ordered after those before it. Two accesses of which one
// writes, to shared or global memory, that nothing orders are then a report, in whatever order they ran.
//
// What a run here cannot show: without ThreadSanitizer, races between fibres that never give way (an atomicAdd replaced
// by += passes); memory ordering and visibility beyond that, blocks that depend on each other, coalescing, bank
// conflicts, occupancy, speed, registers, what the hardware's approximate functions (__expf, tanh.approx) round to, and
// inline PTX. It is evidence about logic only: nothing that ran here has been tested on a GPU.
#pragma once

#define TK_EMULATION 1

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Set whenever a fibre starts to run.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half value) { return static_cast<float>(value.value); }
inline __half __ushort_as_half(unsigned short bits) {
  __half out;
  std::memcpy(&out, &bits, 2);
  return out;
}
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }

using std::max;
using std::min;

namespace tk::emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

enum class Wait { none, warp, block, done };

// What ThreadSanitizer sees of this header; nothing without it.
#ifdef __SANITIZE_THREAD__
// The accesses of the fibre that made it are this header's own.
struct Unseen {
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
inline void release(void* point) { __tsan_release(point); }
inline void acquire(void* point) { __tsan_acquire(point); }
inline void* current_fibre() { return __tsan_get_current_fiber(); }
inline void* new_fibre(void* before) {
  if (before != nullptr) __tsan_destroy_fiber(before);
  return __tsan_create_fiber(0);
}
inline void switch_to(void* fibre) { __tsan_switch_to_fiber(fibre, __tsan_switch_to_fiber_no_sync); }
constexpr bool kFreshStacks = true;  // what an earlier fibre did to its stack is no race with the next one
#else
struct Unseen {
  Unseen() {}
};
inline void release(void*) {}
inline void acquire(void*) {}
inline void* current_fibre() { return nullptr; }
inline void* new_fibre(void*) { return nullptr; }
inline void switch_to(void*) {}
constexpr bool kFreshStacks = false;
#endif

struct Thread {
  ucontext_t context;
  void* fibre = nullptr;  // ThreadSanitizer's
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStack);
  void* fake_stack = nullptr;  // AddressSanitizer's
  uint3 index{};
  int number = 0;
  Wait wait = Wait::none;
  int line = 0;                              // of the rendezvous
  unsigned barriers = 0, warp_barriers = 0;  // that it has passed
};

// Values change hands in two buffers by turns: nobody reaches the next but one before all have read.
struct Warp {
  unsigned turn = 0;
  int arrived = 0;
  uint64_t slots[2][kWarp];
  char points[2];  // of its barriers, by turns
};

struct Shared {
  const char* type;
  void* memory;
};

struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<Shared> shared;
  std::function<void()> kernel;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  void* scheduler_fibre = nullptr;
  char points[2], end;  // of a block's barriers, by turns, and of a launch
  size_t scheduler_stack_size = 0;
  Thread* current = nullptr;
  int num_threads = 0, block_arrived = 0;
  std::string failure, order = "forward";
  std::mt19937 random;
};

inline Machine machine;

inline void finish_switch(void* fake_stack, const void** bottom, size_t* size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, bottom, size);
#else
  (void)fake_stack, (void)bottom, (void)size;
#endif
}

inline void start_switch(void** fake_stack, const void* bottom, size_t size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, bottom, size);
#else
  (void)fake_stack, (void)bottom, (void)size;
#endif
}

inline void resume(Thread& thread) {
  Machine& m = machine;
  m.current = &thread;
  threadIdx = thread.index;
  void* fake_stack = nullptr;
  start_switch(&fake_stack, thread.stack.get(), kStack);
  switch_to(thread.fibre);
  swapcontext(&m.scheduler, &thread.context);
  finish_switch(fake_stack, nullptr, nullptr);
}

inline void give_way() {
  Machine& m = machine;
  Thread& thread = *m.current;
  start_switch(&thread.fake_stack, m.scheduler_stack, m.scheduler_stack_size);
  switch_to(m.scheduler_fibre);
  swapcontext(&thread.context, &m.scheduler);
  finish_switch(thread.fake_stack, nullptr, nullptr);
}

inline void fibre() {
  Machine& m = machine;
  finish_switch(nullptr, &m.scheduler_stack, &m.scheduler_stack_size);
  m.kernel();
  release(&m.end);
  {
    const Unseen unseen;
    m.current->wait = Wait::done;
  }
  start_switch(nullptr, m.scheduler_stack, m.scheduler_stack_size);
  switch_to(m.scheduler_fibre);
  setcontext(&m.scheduler);
}

inline std::string name(const Thread& thread) { return "thread " + std::to_string(thread.number); }

// Wait at a rendezvous of threads [first, last), of which `arrived` counts those that are there.
inline void rendezvous(Wait kind, int first, int last, int& arrived, int line) {
  const Unseen unseen;
  Machine& m = machine;
  Thread& self = *m.current;
  self.wait = kind;
  self.line = line;
  if (++arrived < last - first) return give_way();
  arrived = 0;
  for (int i = first; i < last; ++i) {
    Thread& other = *m.threads[i];
    if (other.line != line) {
      m.failure = name(self) + " is at the rendezvous of line " + std::to_string(line) + ", " + name(other) +
                  " at that of line " + std::to_string(other.line);
      return give_way();
    }
    other.wait = Wait::none;
  }
}

// Where a thread's next barrier lets it go and what it waits for, by turns: nobody reaches the next but one before all
// have passed this one.
inline char* point_of_block() {
  const Unseen unseen;
  return &machine.points[machine.current->barriers++ % 2];
}
inline char* point_of_warp() {
  const Unseen unseen;
  Thread& self = *machine.current;
  return &machine.warps[self.number / kWarp].points[self.warp_barriers++ % 2];
}

template <typename T>
const uint64_t* exchange(unsigned mask, T value, int line) {
  static_assert(sizeof(T) <= 8);
  const Unseen unseen;
  Machine& m = machine;
  const int number = m.current->number, first = number / kWarp * kWarp;
  if (mask != ~0u) m.failure = "a warp function with a partial mask: emulation.h knows whole warps only";
  Warp& warp = m.warps[number / kWarp];
  uint64_t* slots = warp.slots[warp.turn & 1];
  std::memcpy(&slots[number % kWarp], &value, sizeof(T));
  if (warp.arrived == kWarp - 1) ++warp.turn;
  rendezvous(Wait::warp, first, first + kWarp, warp.arrived, line);
  return slots;
}

template <typename T>
T read(const uint64_t* slots, int lane) {
  T value;
  std::memcpy(&value, &slots[lane], sizeof(T));
  return value;
}

inline int lane() { return machine.current->number % kWarp; }

inline void run_threads(const std::vector<int>& turn) {
  Machine& m = machine;
  const auto runnable = [&](int t) { return m.threads[t]->wait == Wait::none; };
  const size_t part = m.order == "warps_ahead" ? kWarp : turn.size();
  for (size_t begin = 0; begin < turn.size(); begin += part) {
    bool again = true;
    while (again && m.failure.empty()) {
      again = false;
      for (size_t i = begin; i < std::min(begin + part, turn.size()) && m.failure.empty(); ++i) {
        if (runnable(turn[i])) resume(*m.threads[turn[i]]);
      }
      for (size_t i = begin; part == kWarp && i < std::min(begin + part, turn.size()); ++i) again |= runnable(turn[i]);
    }
  }
}

inline void run_block() {
  Machine& m = machine;
  for (const Shared& shared : m.shared) std::free(shared.memory);
  m.shared.clear();
  m.block_arrived = 0;
  m.warps.assign(m.num_threads / kWarp, Warp{});
  std::vector<int> turn(m.num_threads);
  for (int i = 0; i < m.num_threads; ++i) {
    if (static_cast<size_t>(i) == m.threads.size()) m.threads.push_back(std::make_unique<Thread>());
    Thread& thread = *m.threads[i];
    const unsigned n = i;
    thread.fibre = new_fibre(thread.fibre);
    if (kFreshStacks) thread.stack = std::make_unique<char[]>(kStack);
    thread.barriers = thread.warp_barriers = 0;
    thread.number = i;
    thread.index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / (blockDim.x * blockDim.y)};
    thread.wait = Wait::none;
    getcontext(&thread.context);
    thread.context.uc_stack = {thread.stack.get(), 0, kStack};
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, fibre, 0);
    turn[i] = m.order == "reverse" ? m.num_threads - 1 - i : i;
  }
  while (true) {
    if (m.order == "shuffled") std::shuffle(turn.begin(), turn.end(), m.random);
    run_threads(turn);
    int runnable = 0, done = 0;
    for (int i = 0; i < m.num_threads; ++i) {
      runnable += m.threads[i]->wait == Wait::none;
      done += m.threads[i]->wait == Wait::done;
    }
    if (done == m.num_threads && m.failure.empty()) return;
    if (m.failure.empty() && runnable > 0) continue;
    if (m.failure.empty()) {
      const auto waiting = [&](int i) { return m.threads[i]->wait != Wait::done; };
      int stuck = 0;
      while (!waiting(stuck)) ++stuck;
      m.failure = name(*m.threads[stuck]) + " waits at line " + std::to_string(m.threads[stuck]->line) +
                  " for threads that wait elsewhere, " + std::to_string(done) + " have exited";
    }
    const std::string failure = std::move(m.failure);
    m.failure.clear();
    throw std::runtime_error("divergent: " + failure);
  }
}

// The shared variables of a block: one object for each type.
template <typename T>
T& shared_variable() {
  const Unseen unseen;
  Machine& m = machine;
  const char* type = __PRETTY_FUNCTION__;
  for (const Shared& shared : m.shared) {
    if (shared.type == type) return *static_cast<T*>(shared.memory);
  }
  void* memory = std::aligned_alloc(std::max<size_t>(alignof(T), 16), (sizeof(T) + 15) / 16 * 16);
  std::memset(memory, 0xff, sizeof(T));
  m.shared.push_back({type, memory});
  return *static_cast<T*>(memory);
}

template <typename T>
unsigned packed(T low, T high) {
  static_assert(sizeof(T) == 2);
  unsigned word;
  std::memcpy(&word, &low, 2);
  std::memcpy(reinterpret_cast<char*>(&word) + 2, &high, 2);
  return word;
}

inline void set_order(const std::string& order, unsigned seed) {
  machine.order = order;
  machine.random.seed(seed);
}

}  // namespace tk::emulation

namespace tk {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, uintptr_t, Arguments... arguments) {
  emulation::Machine& m = emulation::machine;
  m.num_threads = block.x * block.y * block.z;
  if (m.num_threads % emulation::kWarp != 0) throw std::runtime_error("emulation.h knows whole warps only");
  if (m.num_threads > 1024) throw std::runtime_error("a block has at most 1024 threads");
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("a grid has at most 65535 blocks along y and z");
  m.kernel = [=] { kernel(arguments...); };
  gridDim = grid;
  blockDim = block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  m.scheduler_fibre = emulation::current_fibre();
  {
    const emulation::Unseen unseen;
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t b = m.order == "reverse" ? blocks - 1 - i : i;
      blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / grid.x / grid.y)};
      emulation::run_block();
    }
  }
  emulation::acquire(&m.end);
}

}  // namespace tk

#define TK_SHARED(Type, name) Type& name = ::tk::emulation::shared_variable<Type>()

inline void __syncthreads(int line = __builtin_LINE()) {
  tk::emulation::Machine& m = tk::emulation::machine;
  char* point = tk::emulation::point_of_block();
  tk::emulation::release(point);
  tk::emulation::rendezvous(tk::emulation::Wait::block, 0, m.num_threads, m.block_arrived, line);
  tk::emulation::acquire(point);
}
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  char* point = tk::emulation::point_of_warp();
  tk::emulation::release(point);
  tk::emulation::exchange(mask, 0, line);
  tk::emulation::acquire(point);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int = 32, int line = __builtin_LINE()) {
  return tk::emulation::read<T>(tk::emulation::exchange(mask, value, line), source & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32, int line = __builtin_LINE()) {
  return tk::emulation::read<T>(tk::emulation::exchange(mask, value, line), tk::emulation::lane() ^ bits);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  const uint64_t* slots = tk::emulation::exchange(mask, predicate, line);
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out |= (tk::emulation::read<int>(slots, i) != 0 ? 1u : 0u) << i;
  return out;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
  const uint64_t* slots = tk::emulation::exchange(mask, value, line);
  unsigned out = 0;
  for (int i = 0; i < 32; ++i) out = std::max(out, tk::emulation::read<unsigned>(slots, i));
  return out;
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
  const uint64_t* slots = tk::emulation::exchange(mask, value, line);
  unsigned out = ~0u;
  for (int i = 0; i < 32; ++i) out = std::min(out, tk::emulation::read<unsigned>(slots, i));
  return out;
}

template <typename T>
T atomicAdd(T* address, T value) {
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = before + value;
  } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

template <typename T>
void __stcg(T* address, T value) {
  *address = value;
}

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
