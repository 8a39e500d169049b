// An extent: one physical allocation of 2^order pages, with one driver handle.
//
// Always true: it is mapped whole or not at all; it is in exactly one of these states: free (in a
// pool's list, owners == 0), owned (owners mappings refer to it), or carried by a Work in flight.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "backend/backend.h"

namespace vattention {

struct Extent {
  Handle handle = 0;         // 0 until the driver has created it
  std::uint32_t owners = 0;  // how many mappings refer to it: more than one is an alias
  std::uint8_t order = 0;    // 2^order pages
  bool dirty = true;         // may hold bytes that its next owner must not see
  Extent* below = nullptr;   // in the stack that it is in

  [[nodiscard]] std::size_t pages() const noexcept { return std::size_t{1} << order; }
};

// Extents, last in, first out, linked through themselves: putting one in cannot fail.
class ExtentStack {
 public:
  [[nodiscard]] bool empty() const noexcept { return size_ == 0; }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  [[nodiscard]] Extent* top() const noexcept { return top_; }
  void push(Extent* extent) noexcept {
    extent->below = top_;
    top_ = extent;
    ++size_;
  }
  Extent* pop() noexcept {
    Extent* const extent = top_;
    top_ = extent->below;
    --size_;
    return extent;
  }

 private:
  Extent* top_ = nullptr;
  std::size_t size_ = 0;
};

inline constexpr std::size_t kOrders = 32;

// The largest order whose extent fits into that many pages (pages > 0).
[[nodiscard]] inline std::uint8_t order_within(std::size_t pages) noexcept {
  return static_cast<std::uint8_t>(std::bit_width(pages) - 1);
}

// The smallest order whose extent holds that many pages (pages > 0).
[[nodiscard]] inline std::uint8_t order_holding(std::size_t pages) noexcept {
  return static_cast<std::uint8_t>(std::bit_width(pages - 1));
}

}  // namespace vattention
