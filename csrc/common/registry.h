// Every file under csrc/ops registers its own bindings at its end; module.cpp knows none of them by name.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace tk {

using BindFunction = void (*)(pybind11::module_&);

inline std::vector<BindFunction>& bind_functions() {
  static std::vector<BindFunction> functions;
  return functions;
}

struct Registrar {
  explicit Registrar(BindFunction function) { bind_functions().push_back(function); }
};

}  // namespace tk

#define TK_REGISTER(function) static const ::tk::Registrar tk_registrar_##function(function)
