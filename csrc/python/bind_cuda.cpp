// The CUDA backend's factory, apart from the rest because it can fail for want of a GPU.
#include "backend/cuda.h"
#include "core/errors.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace vattention {

void bind_cuda(py::module_& module) {
  module.def(
      "cuda_backend",
      [](int index) {
        try {
          return make_cuda_backend(index);
        } catch (const CudaUnavailable& reason) {
          throw BackendMissing(reason.what(), "", reason.code);
        }
      },
      py::arg("index"), "The backend of one CUDA device. Raises BackendUnavailable.");
}

}  // namespace vattention
