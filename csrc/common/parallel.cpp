#include "common/parallel.h"

#include <dlfcn.h>

#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace tk {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpInt = int (*)();

struct Runtime {
  GompParallel parallel = nullptr;
  OmpInt thread_num = nullptr;
  OmpInt num_threads = nullptr;
};

Runtime& runtime() {
  static Runtime instance;
  return instance;
}

struct Region {
  void (*body)(void*, int, int);
  void* context;
  std::mutex mutex;
  std::exception_ptr error;

  void run(int thread, int num_threads) {
    try {
      body(context, thread, num_threads);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  }
};

}  // namespace

bool use_openmp_runtime(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return false;
  Runtime found;
  found.parallel = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
  found.thread_num = reinterpret_cast<OmpInt>(dlsym(library, "omp_get_thread_num"));
  found.num_threads = reinterpret_cast<OmpInt>(dlsym(library, "omp_get_num_threads"));
  if (!found.parallel || !found.thread_num || !found.num_threads) return false;
  runtime() = found;
  return true;
}

const char* parallel_runtime() { return runtime().parallel ? "openmp" : "threads"; }

void parallel_region(int num_threads, void (*body)(void*, int, int), void* context) {
  Region region{body, context, {}, nullptr};
  if (num_threads <= 1) {
    region.run(0, 1);
  } else if (runtime().parallel) {
    // The runtime may grant fewer threads than asked (nested regions, limits): each thread asks how many there are.
    runtime().parallel(
        [](void* data) { static_cast<Region*>(data)->run(runtime().thread_num(), runtime().num_threads()); }, &region,
        static_cast<unsigned>(num_threads), 0);
  } else {
    std::vector<std::thread> threads;
    threads.reserve(num_threads - 1);
    for (int thread = 1; thread < num_threads; ++thread) {
      threads.emplace_back([&region, thread, num_threads] { region.run(thread, num_threads); });
    }
    region.run(0, num_threads);
    for (std::thread& thread : threads) thread.join();
  }
  if (region.error) std::rethrow_exception(region.error);
}

}  // namespace tk
