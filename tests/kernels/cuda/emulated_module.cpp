// The CUDA kernels as a Python module that runs them on the CPU (emulation.h), with the bindings of the real one.
#include <pybind11/pybind11.h>

#include "common/registry.h"

PYBIND11_MODULE(emulated_kernels, module) {
  module.def("set_order", &tk::emulation::set_order, pybind11::arg("order"), pybind11::arg("seed"));
  for (const auto bind : tk::bind_functions()) bind(module);
}
