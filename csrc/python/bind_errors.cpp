// C++ exceptions become the classes of vattention/errors.py; this is the one place that maps them.
#include <exception>
#include <stdexcept>

#include "core/errors.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace vattention {
namespace {

template <typename... Arguments>
void raise(const char* type_name, Arguments&&... arguments) {
  const py::object type = py::module_::import("vattention.errors").attr(type_name);
  const py::object error = type(std::forward<Arguments>(arguments)...);
  PyErr_SetObject(type.ptr(), error.ptr());
}

void translate(std::exception_ptr thrown) {
  using namespace py::literals;
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const OutOfPages& e) {
    raise("OutOfPages", e.what(), "needed"_a = e.needed, "free"_a = e.free,
          "reclaimable"_a = e.reclaimable, "budget"_a = e.budget);
  } catch (const BackendMissing& e) {
    raise("BackendUnavailable", e.what(), "call"_a = e.call, "code"_a = e.code);
  } catch (const BackendFailure& e) {
    raise("BackendError", e.what(), "call"_a = e.call, "code"_a = e.code);
  } catch (const ConfigError& e) {
    raise("ConfigError", e.what());
  } catch (const Closed& e) {
    raise("Closed", e.what());
  } catch (const OutOfSlots& e) {
    raise("OutOfSlots", e.what());
  } catch (const SequenceTooLong& e) {
    raise("SequenceTooLong", e.what());
  } catch (const StaleSequence& e) {
    raise("StaleSequence", e.what());
  } catch (const Error& e) {
    raise("VAttentionError", e.what());
  } catch (const std::logic_error& e) {
    PyErr_SetString(PyExc_AssertionError, e.what());  // a bug in here, found by a check
  }
}

}  // namespace

void bind_errors(py::module_&) { py::register_local_exception_translator(&translate); }

}  // namespace vattention
