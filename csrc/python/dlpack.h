// Tensors leave as DLPack capsules, the exchange format's stable C structs (DLPack 0.6 and later).
//
// Always true: a capsule, and whatever tensor a consumer makes of it, owns a reference to the
// allocator, so the addresses stay reserved, and what is mapped stays mapped, for as long as it
// lives.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "core/allocator.h"

namespace vattention {

// Integers of the element's size: the consumer views them as its own type, so that types DLPack or
// an older consumer does not know (fp8) travel too.
struct TensorSpec {
  std::size_t offset_bytes = 0;  // from the reservation's start
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements
  int item_bytes = 0;
};

[[nodiscard]] pybind11::capsule to_dlpack(std::shared_ptr<Allocator> allocator, TensorSpec spec);

}  // namespace vattention
