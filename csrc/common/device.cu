// Whether the kernels of this module run on the current device: asked before the first of them is launched.
#include "common/cuda.cuh"

namespace tk {
namespace {

__global__ void probe_kernel() {}

// Empty, or what the runtime says: the driver is older than the runtime, or no code in the module is for this card.
[[maybe_unused]] std::string cuda_problem() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // so that the next launch does not report it
  return cudaGetErrorString(error);
}

#ifdef TK_REGISTER
void bind(pybind11::module_& module) { module.def("cuda_problem", &cuda_problem); }
TK_REGISTER(bind);
#endif

}  // namespace
}  // namespace tk
