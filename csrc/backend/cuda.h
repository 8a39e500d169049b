// Device memory through the CUDA driver's virtual memory management.
//
// Owns: a reference to the device's primary context (the one torch uses), its own background
// stream, nothing else. Always true: every call makes that context current for its own duration
// and leaves the caller's as it was, and runs in the relaxed stream-capture mode, so that mapping
// on one thread cannot invalidate a CUDA graph capture on another. Work on a stream that is itself
// being captured is refused, because it would happen at replay instead of now.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>

#include "backend/backend.h"

namespace vattention {

// Thrown by make_cuda_backend alone; says why there is no backend and what to do.
struct CudaUnavailable : std::runtime_error {
  CudaUnavailable(const std::string& why, int error_code)
      : std::runtime_error(why), code(error_code) {}
  int code;
};

[[nodiscard]] std::shared_ptr<Backend> make_cuda_backend(int ordinal);

}  // namespace vattention
