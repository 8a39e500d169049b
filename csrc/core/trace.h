// What VATTENTION_DEBUG turns on: 1 lifecycle lines, 2 also every invariant after every operation,
// 3 also each backend call with its time (see backend/traced.h). Read once a process.
#pragma once

#include <sstream>
#include <string>

namespace vattention {

[[nodiscard]] int debug_level() noexcept;
void trace_line(const std::string& line);

template <typename... Values>
void trace(int level, const char* what, const Values&... values) {
  if (debug_level() < level) return;
  std::ostringstream line;
  line << what;
  ((line << ' ' << values), ...);
  trace_line(line.str());
}

}  // namespace vattention
