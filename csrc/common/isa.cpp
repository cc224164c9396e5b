#include "common/isa.h"

#include <cstdlib>
#include <mutex>
#include <stdexcept>

#include "common/registry.h"
#include "common/row_kernels.h"
#include "common/tile_kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tk {

#define TK_DECLARE_KERNELS(name)          \
  namespace name {                        \
  extern const TileKernels kFloatKernels; \
  extern const TileKernels kPairKernels;  \
  extern const RowKernels kRowKernels;    \
  }
TK_DECLARE_KERNELS(portable)
TK_DECLARE_KERNELS(avx2)
TK_DECLARE_KERNELS(avx512)
TK_DECLARE_KERNELS(avx512bf16)
TK_DECLARE_KERNELS(amx)
#undef TK_DECLARE_KERNELS

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};

#if TK_ISA_X86
// Linux hands the AMX tile registers to a process on request only; threads made afterwards inherit the permission.
bool request_amx() {
#if defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool runs_here(Isa isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return avx2;  // every processor with AVX2 and FMA has F16C
    case Isa::avx512:
      return avx512;
    case Isa::avx512bf16:
      return bf16;
    case Isa::amx: {
      unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
      const bool tiles = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx >> 22 & 1u) && (edx >> 24 & 1u);
      return bf16 && tiles && request_amx();
    }
  }
  return false;
}

bool is_intel() { return __builtin_cpu_is("intel"); }
#endif

const std::vector<Isa>& detected() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> list{Isa::portable};
#if TK_ISA_X86
    for (const Isa isa : {Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx})
      if (runs_here(isa)) list.push_back(isa);
#endif
    return list;
  }();
  return found;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<Isa> available_isas() { return detected(); }

Isa current_isa() {
  const char* asked = std::getenv("TRACE_KERNELS_ISA");
  if (asked == nullptr || *asked == '\0') {
    const Isa best = detected().back();
#if TK_ISA_X86
    // Intel's vdpbf16ps is slower than its fp32 FMA on the widened operands (measured: 0.55 of it).
    if (best == Isa::avx512bf16 && is_intel()) return Isa::avx512;
#endif
    return best;
  }
  std::string names;
  for (const Isa isa : detected()) {
    if (std::string(asked) == isa_name(isa)) return isa;
    names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument("TRACE_KERNELS_ISA: got '" + std::string(asked) + "', this machine has " + names);
}

const TileKernels& tile_kernels(Type type) {
  [[maybe_unused]] const bool pairs = type == Type::bf16;
  switch (current_isa()) {
#if TK_ISA_X86
    case Isa::amx:
      return pairs ? amx::kPairKernels : amx::kFloatKernels;
    case Isa::avx512bf16:
      return pairs ? avx512bf16::kPairKernels : avx512bf16::kFloatKernels;
    case Isa::avx512:
      return avx512::kFloatKernels;
    case Isa::avx2:
      return avx2::kFloatKernels;
#endif
    default:
      return portable::kFloatKernels;
  }
}

const RowKernels& row_kernels() {
  switch (current_isa()) {
#if TK_ISA_X86
    case Isa::amx:
      return amx::kRowKernels;
    case Isa::avx512bf16:
      return avx512bf16::kRowKernels;
    case Isa::avx512:
      return avx512::kRowKernels;
    case Isa::avx2:
      return avx2::kRowKernels;
#endif
    default:
      return portable::kRowKernels;
  }
}

namespace {

void bind(pybind11::module_& module) {
  module.def("isa", [] { return isa_name(current_isa()); });
  module.def("available_isas", [] {
    pybind11::list names;
    for (const Isa isa : available_isas()) names.append(isa_name(isa));
    return names;
  });
}
TK_REGISTER(bind);

}  // namespace
}  // namespace tk
