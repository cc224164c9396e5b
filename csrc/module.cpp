// The one native module. It knows no op by name: each file under csrc/ops registers itself.
#include <pybind11/pybind11.h>

#include "common/parallel.h"
#include "common/registry.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, module) {
  module.def("build_info", [] {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["cuda_built"] = TK_CUDA_BUILT != 0;
    info["cuda_version"] = TK_CUDA_VERSION;
    info["cuda_archs"] = TK_CUDA_ARCHS;
    info["cuda_absent_because"] = TK_CUDA_REASON;
    return info;
  });
  module.def("use_openmp_runtime", &tk::use_openmp_runtime, py::arg("path"));
  module.def("parallel_runtime", &tk::parallel_runtime);
  for (const auto bind : tk::bind_functions()) bind(module);
}
