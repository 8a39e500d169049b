// The extension module's parts. Translation only: no decision is taken on this side of the core.
#pragma once

#include <pybind11/pybind11.h>

namespace vattention {

void bind_errors(pybind11::module_& module);
void bind_backend(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);
void bind_core(pybind11::module_& module);

}  // namespace vattention
