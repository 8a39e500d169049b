// What the core throws. Each type has one Python twin in vattention/errors.py; the translation is
// in python/bind_errors.cpp and nowhere else. Messages say what was needed, what there was, and
// what to do.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

#include "backend/backend.h"

namespace vattention {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Closed : Error {
  using Error::Error;
};
struct ConfigError : Error {
  using Error::Error;
};
struct OutOfSlots : Error {
  using Error::Error;
};
struct SequenceTooLong : Error {
  using Error::Error;
};
struct StaleSequence : Error {
  using Error::Error;
};

// All in bytes. `free` is what could be had without touching anything that is mapped.
struct OutOfPages : Error {
  OutOfPages(const std::string& message, std::size_t needed_bytes, std::size_t free_bytes,
             std::size_t reclaimable_bytes, std::size_t budget_bytes)
      : Error(message),
        needed(needed_bytes),
        free(free_bytes),
        reclaimable(reclaimable_bytes),
        budget(budget_bytes) {}
  std::size_t needed, free, reclaimable, budget;
};

struct BackendFailure : Error {
  BackendFailure(const std::string& message, std::string failed_call, int error_code)
      : Error(message), call(std::move(failed_call)), code(error_code) {}
  std::string call;
  int code;
};

// There is no such backend on this machine.
struct BackendMissing : BackendFailure {
  using BackendFailure::BackendFailure;
};

[[noreturn]] void throw_status(const Backend& backend, const Status& status);

// Bytes for a person: "60.00 GiB".
[[nodiscard]] std::string human_bytes(std::size_t bytes);

}  // namespace vattention
