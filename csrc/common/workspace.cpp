#include "common/workspace.h"

#include <sys/mman.h>

#include <limits>
#include <new>
#include <utility>

#include "common/registry.h"

namespace tk {
namespace {

constexpr size_t kPage = size_t{1} << 21;

void unmap(Pages pages) {
  if (pages.base != nullptr) munmap(pages.base, pages.size);
}

Pages map_pages(size_t size) {
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

}  // namespace

// A process may fork while another of its threads holds the lock, which nobody in the child then releases. So nobody
// waits for it: whoever does not get it does without the store.
Pages PageStore::take(size_t size) {
  size = (size + kPage - 1) / kPage * kPage;
  if (const std::unique_lock lock(mutex_, std::try_to_lock);
      lock && (exact_ ? pages_.size == size : pages_.size >= size))
    return std::exchange(pages_, {});
  return map_pages(size);
}

void PageStore::give(Pages pages) {
  if (pages.base == nullptr) return;
#if defined(MADV_FREE)
  if (pages.size <= most_ && madvise(pages.base, pages.size, MADV_FREE) == 0)
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) std::swap(pages_, pages);
#endif
  unmap(pages);
}

void PageStore::release() {
  Pages pages;
  if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) std::swap(pages_, pages);
  unmap(pages);
}

// Never destroyed: memory may be given back while the process ends.
PageStore& scratch_store() {
  static auto* store = new PageStore(size_t{64} << 20, false);
  return *store;
}

PageStore& gradient_store() {
  static auto* store = new PageStore(std::numeric_limits<size_t>::max(), true);
  return *store;
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

// What torch.frombuffer makes a tensor of: the memory of a head's gradient.
class GradientMemory {
 public:
  explicit GradientMemory(size_t size) : size_(size), pages_(gradient_store().take(size)) {}
  GradientMemory(const GradientMemory&) = delete;
  GradientMemory& operator=(const GradientMemory&) = delete;
  ~GradientMemory() { gradient_store().give(pages_); }

  pybind11::buffer_info info() const {
    return {pages_.base, 1, pybind11::format_descriptor<uint8_t>::format(), static_cast<pybind11::ssize_t>(size_)};
  }

 private:
  size_t size_;
  Pages pages_;
};

void bind(pybind11::module_& module) {
  pybind11::class_<GradientMemory>(module, "GradientMemory", pybind11::buffer_protocol())
      .def(pybind11::init<size_t>())
      .def_buffer(&GradientMemory::info);
  module.def("release_workspace", [] {
    scratch_store().release();
    gradient_store().release();
  });
  module.def("use_large_pages",
             [](uintptr_t start, size_t size) { use_large_pages(reinterpret_cast<void*>(start), size); });
}
TK_REGISTER(bind);

}  // namespace
}  // namespace tk
