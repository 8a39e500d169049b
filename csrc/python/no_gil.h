// Releases the GIL for a scope, as pybind11's guard does, but lets the process end.
//
// A daemon thread that comes back from a call while the interpreter shuts down may not take the
// GIL again: CPython ends the thread by unwinding it, also one that waits for the GIL already.
// Where an exception is on its way that would abort the process, and destructors that need the GIL
// would run without it. Such a thread waits here for the process's end instead.
#pragma once

#include <Python.h>
#include <unistd.h>

#include <optional>

namespace vattention {

class NoGil {
 public:
  NoGil() : at_end_(ending()), state_(PyEval_SaveThread()) {}
  NoGil(const NoGil&) = delete;
  NoGil& operator=(const NoGil&) = delete;
  ~NoGil() {
    while (!at_end_ && ending()) (void)pause();
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // the unwinding: no exception comes from C
      for (;;) (void)pause();
    }
  }

 private:
  static bool ending() noexcept {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing() != 0;
#else
    return _Py_IsFinalizing() != 0;
#endif
  }

  const bool at_end_;  // then this is the thread that ends the interpreter
  PyThreadState* const state_;
};

// Calls it without the GIL, which a thread that is not Python's does not have in the first place.
template <typename Function>
auto call_without_gil(Function function) {
  std::optional<NoGil> no_gil;
  if (Py_IsInitialized() != 0 && PyGILState_Check() != 0) no_gil.emplace();
  return function();
}

}  // namespace vattention
