// Room in a vector, made before something begins that may not fail halfway.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace vattention {

// So that many more fit in without memory being asked for. Asks for more than that at once, as
// push_back does.
template <typename T>
void make_room(std::vector<T>& values, std::size_t more) {
  if (values.capacity() - values.size() >= more) return;
  values.reserve(std::max(values.size() + more, 2 * values.capacity()));
}

}  // namespace vattention
