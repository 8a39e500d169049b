#include <pybind11/pybind11.h>

#include "python/bindings.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled core of vattention. Use the vattention package instead.";
  module.attr("__version__") = VATTENTION_VERSION;
  vattention::bind_errors(module);
  vattention::bind_backend(module);
  vattention::bind_cuda(module);
  vattention::bind_core(module);
}
