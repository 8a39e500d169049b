// Backends as Python sees them: the host's factory, the seam's calls one by one (for the
// conformance suite), and the faulty wrapper (for fault-injection tests).
#include <pybind11/chrono.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "backend/backend.h"
#include "backend/faulty.h"
#include "backend/host.h"
#include "core/errors.h"
#include "python/bindings.h"
#include "python/no_gil.h"

namespace py = pybind11;

namespace vattention {
namespace {

using WithoutGil = py::call_guard<NoGil>;

void require(const Backend& backend, const Status& status) {
  if (!status.ok()) throw_status(backend, status);
}

Access parse_access(const std::string& access) {
  if (access == "none") return Access::none;
  if (access == "read") return Access::read;
  if (access == "read_write") return Access::read_write;
  throw ConfigError("access is 'none', 'read' or 'read_write', not '" + access + "'");
}

Status::Kind parse_kind(const std::string& kind) {
  if (kind == "failed") return Status::Kind::failed;
  if (kind == "out_of_memory") return Status::Kind::out_of_memory;
  throw ConfigError("kind is 'failed' or 'out_of_memory', not '" + kind + "'");
}

void bind_seam(py::module_& module) {
  py::class_<Backend, std::shared_ptr<Backend>>(module, "Backend")
      .def_property_readonly("name", &Backend::name)
      .def_property_readonly("page_bytes", &Backend::page_bytes)
      .def_property_readonly("max_mappings", &Backend::max_mappings)
      .def_property_readonly("device_index", [](const Backend& b) { return b.device().index; })
      .def("describe", &Backend::describe, py::arg("code"))
      .def(
          "memory_info",
          [](Backend& b) {
            std::pair<std::size_t, std::size_t> free_and_total;
            require(b, b.memory_info(&free_and_total.first, &free_and_total.second));
            return free_and_total;
          },
          WithoutGil())
      .def(
          "reserve",
          [](Backend& b, std::size_t bytes) {
            Address address = 0;
            require(b, b.reserve(bytes, &address));
            return address;
          },
          py::arg("bytes"), WithoutGil())
      .def(
          "unreserve",
          [](Backend& b, Address address, std::size_t bytes) {
            require(b, b.unreserve(address, bytes));
          },
          py::arg("address"), py::arg("bytes"), WithoutGil())
      .def(
          "create",
          [](Backend& b, std::size_t bytes) {
            Handle handle = 0;
            require(b, b.create(bytes, &handle));
            return handle;
          },
          py::arg("bytes"), WithoutGil())
      .def(
          "destroy", [](Backend& b, Handle handle) { require(b, b.destroy(handle)); },
          py::arg("handle"), WithoutGil())
      .def(
          "map",
          [](Backend& b, Address address, std::size_t bytes, Handle handle) {
            require(b, b.map(address, bytes, handle));
          },
          py::arg("address"), py::arg("bytes"), py::arg("handle"), WithoutGil())
      .def(
          "unmap",
          [](Backend& b, Address address, std::size_t bytes) {
            require(b, b.unmap(address, bytes));
          },
          py::arg("address"), py::arg("bytes"), WithoutGil())
      .def(
          "set_access",
          [](Backend& b, Address address, std::size_t bytes, const std::string& access) {
            require(b, b.set_access(address, bytes, parse_access(access)));
          },
          py::arg("address"), py::arg("bytes"), py::arg("access"), WithoutGil())
      .def(
          "zero",
          [](Backend& b, Address address, std::size_t bytes, Stream stream) {
            require(b, b.zero(address, bytes, stream));
          },
          py::arg("address"), py::arg("bytes"), py::arg("stream") = 0, WithoutGil())
      .def(
          "create_stream",
          [](Backend& b) {
            Stream stream = 0;
            require(b, b.create_stream(&stream));
            return stream;
          },
          WithoutGil())
      .def(
          "synchronize", [](Backend& b, Stream stream) { require(b, b.synchronize(stream)); },
          py::arg("stream"), WithoutGil())
      .def(
          "synchronize_device", [](Backend& b) { require(b, b.synchronize_device()); },
          WithoutGil())
      .def(
          "create_fence",
          [](Backend& b) {
            Fence fence = 0;
            require(b, b.create_fence(&fence));
            return fence;
          },
          WithoutGil())
      .def(
          "destroy_fence", [](Backend& b, Fence fence) { require(b, b.destroy_fence(fence)); },
          py::arg("fence"), WithoutGil())
      .def(
          "record",
          [](Backend& b, Fence fence, Stream stream) { require(b, b.record(fence, stream)); },
          py::arg("fence"), py::arg("stream") = 0, WithoutGil())
      .def(
          "wait", [](Backend& b, Stream stream, Fence fence) { require(b, b.wait(stream, fence)); },
          py::arg("stream"), py::arg("fence"), WithoutGil())
      .def(
          "query",
          [](Backend& b, Fence fence) {
            bool passed = false;
            require(b, b.query(fence, &passed));
            return passed;
          },
          py::arg("fence"), WithoutGil());
}

void bind_faulty(py::module_& module) {
  py::class_<FaultyBackend, Backend, std::shared_ptr<FaultyBackend>>(module, "FaultyBackend")
      .def(py::init<std::shared_ptr<Backend>>(), py::arg("inner"))
      .def(
          "arm",
          [](FaultyBackend& b, const std::string& call, std::uint64_t nth, const std::string& kind,
             bool sticky) { b.arm(call, nth, parse_kind(kind), sticky); },
          py::arg("call"), py::arg("nth") = 1, py::arg("kind") = "failed",
          py::arg("sticky") = false)
      .def("disarm", &FaultyBackend::disarm)
      .def("calls", &FaultyBackend::calls)
      .def("hold_fences", &FaultyBackend::hold_fences)
      .def("release_fences", &FaultyBackend::release_fences)
      .def("block", &FaultyBackend::block, py::arg("call"))
      .def("unblock", &FaultyBackend::unblock, py::arg("call"))
      .def(
          "wait_blocked",
          [](FaultyBackend& b, const std::string& call, double timeout_s) {
            return b.wait_blocked(
                call, std::chrono::milliseconds(static_cast<std::int64_t>(timeout_s * 1000)));
          },
          py::arg("call"), py::arg("timeout_s") = 10.0, WithoutGil());
}

}  // namespace

void bind_backend(py::module_& module) {
  bind_seam(module);
  bind_faulty(module);
  module.def(
      "host_backend",
      [](std::size_t page_bytes) {
        try {
          return make_host_backend(page_bytes);
        } catch (const std::invalid_argument& reason) {
          throw ConfigError(reason.what());
        } catch (const std::system_error& reason) {
          throw BackendMissing(reason.what(), "memfd_create", reason.code().value());
        }
      },
      py::arg("page_bytes"), "The host backend. Raises ConfigError, BackendUnavailable.");
}

}  // namespace vattention
