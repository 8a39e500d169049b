// Loaded before everything else: one `operator new` that a module calls throws. See test_faults.
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

std::uintptr_t module_begin = 0;
std::uintptr_t module_end = 0;
thread_local long countdown = 0;  // 0: not armed

void* get(std::size_t bytes, const void* caller) {
  const auto address = reinterpret_cast<std::uintptr_t>(caller);
  const bool counts = address >= module_begin && address < module_end && countdown > 0;
  if (counts && --countdown == 0) throw std::bad_alloc();
  void* const memory = std::malloc(bytes == 0 ? 1 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

extern "C" void watch_module(std::uintptr_t begin, std::uintptr_t end) {
  module_begin = begin;
  module_end = end;
}
extern "C" void fail_nth_new(long nth) { countdown = nth; }
// Whether one has failed since.
extern "C" int disarm_new() {
  const bool failed = countdown == 0;
  countdown = 0;
  return failed ? 1 : 0;
}

void* operator new(std::size_t bytes) { return get(bytes, __builtin_return_address(0)); }
void* operator new[](std::size_t bytes) { return get(bytes, __builtin_return_address(0)); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
