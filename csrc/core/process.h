// Whether this process is still the one that made something.
//
// A child made by fork() has neither the background thread nor a usable CUDA context, and shares
// the host backend's memory with its parent: what was made before must be left alone there.
#pragma once

#include <cstdint>

namespace vattention {

// How often this process and those it descends from have forked since the first call.
[[nodiscard]] std::uint64_t fork_count() noexcept;

}  // namespace vattention
