#include "core/trace.h"

#include <cstdio>
#include <cstdlib>

namespace vattention {

int debug_level() noexcept {
  static const int level = [] {
    const char* text = std::getenv("VATTENTION_DEBUG");
    return text == nullptr ? 0 : std::atoi(text);
  }();
  return level;
}

void trace_line(const std::string& line) { std::fprintf(stderr, "vattention: %s\n", line.c_str()); }

}  // namespace vattention
