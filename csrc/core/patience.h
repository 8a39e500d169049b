// How long one operation waits for fences, all of its waits together.
//
// Always true: an operation that says look() before it looks at what there is misses nothing that
// is gained later; and once its time is up it looks once more, not again and again.
#pragma once

#include <chrono>
#include <cstdint>

namespace vattention {

class Patience {
 public:
  explicit Patience(std::chrono::milliseconds timeout) : deadline_(Clock::now() + timeout) {}

  // What was gained until now is about to be looked at. See Pool::gains().
  void look(std::uint64_t gains) noexcept { seen_ = gains; }
  [[nodiscard]] bool has_seen(std::uint64_t gains) const noexcept { return gains == seen_; }

  [[nodiscard]] bool is_over() const noexcept { return Clock::now() >= deadline_; }
  // Whether there is news worth looking at: always, but only once after the time is up.
  [[nodiscard]] bool looks_again() noexcept {
    if (last_look_) return false;
    last_look_ = is_over();
    return true;
  }

 private:
  using Clock = std::chrono::steady_clock;

  const Clock::time_point deadline_;
  std::uint64_t seen_ = 0;
  bool last_look_ = false;
};

}  // namespace vattention
