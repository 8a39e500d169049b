#include "core/process.h"

#include <pthread.h>

#include <atomic>

namespace vattention {
namespace {

std::atomic<std::uint64_t> forks{0};

void count_fork() { ++forks; }

}  // namespace

std::uint64_t fork_count() noexcept {
  // Counted in the child only, by a handler: asking the system who we are would cost each step.
  static const bool counting = pthread_atfork(nullptr, nullptr, count_fork) == 0;
  (void)counting;
  return forks.load(std::memory_order_relaxed);
}

}  // namespace vattention
