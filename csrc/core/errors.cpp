#include "core/errors.h"

#include <array>
#include <cstdio>

namespace vattention {

void throw_status(const Backend& backend, const Status& status) {
  throw BackendFailure(std::string(status.call) + " failed on the " + backend.name() +
                           " backend with " + backend.describe(status.code),
                       status.call, status.code);
}

std::string human_bytes(std::size_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 1024.0 && unit + 1 < kUnits.size()) {
    value /= 1024.0;
    ++unit;
  }
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), unit == 0 ? "%.0f %s" : "%.2f %s", value, kUnits[unit]);
  return text.data();
}

}  // namespace vattention
