// Writes a line for every backend call, with its time: VATTENTION_DEBUG=3.
#pragma once

#include <memory>

#include "backend/backend.h"

namespace vattention {

// The backend itself, or a traced one where the environment asks for it.
[[nodiscard]] std::shared_ptr<Backend> traced_if_asked(std::shared_ptr<Backend> backend);

}  // namespace vattention
