#include "common/workspace.h"

#include <sys/mman.h>

#include <mutex>
#include <new>
#include <utility>

#include "common/registry.h"

namespace tk {
namespace {

constexpr size_t kPage = size_t{1} << 21;
constexpr size_t kMostKept = size_t{64} << 20;

struct Kept {
  std::mutex mutex;
  Pages pages;
};

Kept& kept() {
  static Kept instance;
  return instance;
}

void unmap(Pages pages) {
  if (pages.base != nullptr) munmap(pages.base, pages.size);
}

}  // namespace

Pages take_pages(size_t size) {
  size = (size + kPage - 1) / kPage * kPage;
  {
    Kept& store = kept();
    const std::lock_guard<std::mutex> lock(store.mutex);
    if (store.pages.size >= size) return std::exchange(store.pages, {});
  }
  // A large page has to start at a multiple of its size.
  void* memory = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  char* start = static_cast<char*>(memory);
  char* base = start + (kPage - reinterpret_cast<uintptr_t>(start) % kPage) % kPage;
  if (base != start) munmap(start, static_cast<size_t>(base - start));
  if (base - start != static_cast<std::ptrdiff_t>(kPage))
    munmap(base + size, kPage - static_cast<size_t>(base - start));
  use_large_pages(base, size);
  return {base, size};
}

void give_pages(Pages pages) {
  if (pages.base == nullptr) return;
#if defined(MADV_FREE)
  if (pages.size <= kMostKept && madvise(pages.base, pages.size, MADV_FREE) == 0) {
    Kept& store = kept();
    const std::lock_guard<std::mutex> lock(store.mutex);
    if (store.pages.size < pages.size) std::swap(store.pages, pages);
  }
#endif
  unmap(pages);
}

void release_pages() {
  Kept& store = kept();
  const std::lock_guard<std::mutex> lock(store.mutex);
  unmap(std::exchange(store.pages, {}));
}

void use_large_pages(void* start, size_t size) {
#if defined(MADV_HUGEPAGE)
  const auto first = (reinterpret_cast<uintptr_t>(start) + kPage - 1) / kPage * kPage;
  const auto last = (reinterpret_cast<uintptr_t>(start) + size) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  static_cast<void>(start);
  static_cast<void>(size);
#endif
}

namespace {

void bind(pybind11::module_& module) {
  module.def("release_workspace", &release_pages);
  module.def("use_large_pages",
             [](uintptr_t start, size_t size) { use_large_pages(reinterpret_cast<void*>(start), size); });
}
TK_REGISTER(bind);

}  // namespace
}  // namespace tk
