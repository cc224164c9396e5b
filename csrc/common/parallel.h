// Threads. The pool is the one of the OpenMP runtime that torch has loaded: a second runtime in the process
// would fight with it for the cores when small regions alternate. Its entry point GOMP_parallel is found at run
// time (GNU's, LLVM's and Intel's runtimes all have it); where there is none, plain std::thread does the work.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

namespace tk {

// Looks for the OpenMP runtime in the library at `path` (already loaded by the process). Returns whether it was found.
bool use_openmp_runtime(const std::string& path);

// "openmp" or "threads": what parallel regions run on.
const char* parallel_runtime();

// Calls body(context, thread, num_threads) once in each of `num_threads` threads and waits for all of them.
// An exception in a body is rethrown in the caller.
void parallel_region(int num_threads, void (*body)(void*, int, int), void* context);

template <typename F>
void parallel(int num_threads, F&& body) {
  using Body = std::remove_reference_t<F>;
  parallel_region(
      num_threads, [](void* context, int thread, int threads) { (*static_cast<Body*>(context))(thread, threads); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

struct Range {
  int64_t begin, end;
};

// The part of [0, n) that belongs to `thread`: contiguous, in order, sizes within one of each other.
inline Range split(int64_t n, int thread, int num_threads) {
  const int64_t base = n / num_threads, extra = n % num_threads;
  const int64_t begin = thread * base + (thread < extra ? thread : extra);
  return {begin, begin + base + (thread < extra ? 1 : 0)};
}

}  // namespace tk
