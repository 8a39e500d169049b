// What one sequence's slot has mapped in one region: pages [front, end), without a gap.
//
// Always true: mappings are in address order and cover exactly [front, end); pages below clean_end
// hold zeros or the present owner's bytes; a guard, where there is one, lies right behind end, and
// then the run is not empty.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/extent.h"

namespace vattention {

struct Mapping {
  std::size_t page;  // first page, counted from the start of the slot
  Extent* extent;
};

struct Run {
  std::vector<Mapping> mappings;
  std::size_t front = 0;
  std::size_t end = 0;
  std::size_t clean_end = 0;
  bool guarded = false;

  [[nodiscard]] bool empty() const noexcept { return front == end; }
  [[nodiscard]] std::size_t pages() const noexcept { return end - front; }
  // Whether its front was given back: such a run is of no use to a next sequence.
  [[nodiscard]] bool holed() const noexcept { return !empty() && front > 0; }

  // The index of the first mapping that lies wholly at or above the page.
  [[nodiscard]] std::size_t first_above(std::size_t page) const noexcept {
    std::size_t index = mappings.size();
    while (index > 0 && mappings[index - 1].page >= page) --index;
    return index;
  }
  // How many mappings lie wholly below the page and can go: not the last one before a guard.
  [[nodiscard]] std::size_t count_below(std::size_t page) const noexcept {
    const std::size_t most = guarded ? mappings.size() - 1 : mappings.size();
    std::size_t count = 0;
    while (count < most && mappings[count].page + mappings[count].extent->pages() <= page) {
      ++count;
    }
    return count;
  }
};

}  // namespace vattention
