// The host backend: the CUDA driver's rules over this process's own memory.
//
// Owns: one sparse memfd, of which an extent is a range; its reservations; and the record of what
// is mapped where. Always true: it refuses whatever CUDA refuses, so that code that runs here runs
// there; inside a reservation there is never a hole, only pages without access; the resident size
// falls when an extent is destroyed and no longer mapped.
#pragma once

#include <cstddef>
#include <memory>

#include "backend/backend.h"

namespace vattention {

// Throws std::invalid_argument unless page_bytes is a power of two and at least the system's page,
// std::system_error where the system refuses a memfd.
[[nodiscard]] std::shared_ptr<Backend> make_host_backend(std::size_t page_bytes);

}  // namespace vattention
