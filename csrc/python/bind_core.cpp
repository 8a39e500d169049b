#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/allocator.h"
#include "core/pool.h"
#include "python/bindings.h"
#include "python/dlpack.h"
#include "python/no_gil.h"

namespace py = pybind11;

namespace vattention {
namespace {

using WithoutGil = py::call_guard<NoGil>;

// The lengths of a step: a C-contiguous buffer of 64-bit integers, read in place.
class Lengths {
 public:
  explicit Lengths(PyObject* object) {
    if (PyObject_GetBuffer(object, &view_, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) != 0) {
      PyErr_Clear();
      throw ConfigError(kWhat);
    }
    const std::string format = view_.format == nullptr ? "B" : view_.format;
    if (view_.itemsize != 8 || view_.ndim != 1 || (format != "l" && format != "q")) {
      PyBuffer_Release(&view_);
      throw ConfigError(kWhat);
    }
  }
  Lengths(const Lengths&) = delete;
  Lengths& operator=(const Lengths&) = delete;
  ~Lengths() { PyBuffer_Release(&view_); }

  [[nodiscard]] const std::int64_t* data() const {
    return static_cast<const std::int64_t*>(view_.buf);
  }
  [[nodiscard]] std::size_t count() const { return static_cast<std::size_t>(view_.shape[0]); }

 private:
  static constexpr const char* kWhat =
      "lengths must be a mapping of sequences to lengths, or a contiguous one-dimensional int64 "
      "array on the host with an entry for each slot";
  Py_buffer view_{};
};

// Ending them may wait for the GPU, so other threads of Python run meanwhile: what the GPU waits
// for may be one of them. The last owner may be a tensor, which goes with the GIL held, or a thread
// without it.
void destroy(Allocator* allocator) {
  call_without_gil([allocator] { std::unique_ptr<Allocator>(allocator).reset(); });
}

std::shared_ptr<Pool> ended_without_gil(std::shared_ptr<Pool> pool) {
  Pool* address = pool.get();
  return {address,
          [pool = std::move(pool)](Pool*) mutable { call_without_gil([&pool] { pool.reset(); }); }};
}

void bind_pool(py::module_& module) {
  py::class_<Pool, std::shared_ptr<Pool>>(module, "Pool")
      .def(py::init([](std::shared_ptr<Backend> backend, std::size_t budget_bytes,
                       std::size_t low_bytes, std::size_t high_bytes, std::size_t max_extent_bytes,
                       bool zero, bool background) {
             const NoGil no_gil;
             return ended_without_gil(Pool::create(
                 std::move(backend),
                 {budget_bytes, low_bytes, high_bytes, max_extent_bytes, zero, background}));
           }),
           py::kw_only(), py::arg("backend"), py::arg("budget_bytes"), py::arg("low_bytes"),
           py::arg("high_bytes"), py::arg("max_extent_bytes"), py::arg("zero"),
           py::arg("background"))
      .def("set_budget", &Pool::set_budget, py::arg("bytes"), WithoutGil())
      .def("set_watermarks", &Pool::set_watermarks, py::arg("low_bytes"), py::arg("high_bytes"),
           WithoutGil())
      .def("reclaim", &Pool::reclaim, WithoutGil())
      .def("check", &Pool::check, WithoutGil())
      .def("stop", &Pool::stop, WithoutGil())
      .def("stats", [](const Pool& pool) {
        const PoolStats s = call_without_gil([&] { return pool.stats(); });
        py::dict d;
        d["budget_bytes"] = s.budget_bytes;
        d["held_bytes"] = s.held_bytes;
        d["peak_held_bytes"] = s.peak_held_bytes;
        d["free_bytes"] = s.free_bytes;
        d["mappings"] = s.mappings;
        d["creates"] = s.creates;
        d["destroys"] = s.destroys;
        d["maps"] = s.maps;
        d["unmaps"] = s.unmaps;
        return d;
      });
}

py::dict allocator_stats(const Allocator& allocator) {
  const AllocatorStats s = call_without_gil([&] { return allocator.stats(); });
  py::dict d;
  d["reserved_bytes"] = s.reserved_bytes;
  d["live_bytes"] = s.live_bytes;
  d["cached_bytes"] = s.cached_bytes;
  d["retired_bytes"] = s.retired_bytes;
  d["surplus_bytes"] = s.surplus_bytes;
  d["guard_bytes"] = s.guard_bytes;
  d["live_sequences"] = s.live_sequences;
  d["free_slots"] = s.free_slots;
  d["live_tokens"] = s.live_tokens;
  d["steps"] = s.steps;
  d["waited_steps"] = s.waited_steps;
  d["ahead_mappings"] = s.ahead_mappings;
  d["ahead_failures"] = s.ahead_failures;
  d["adoptions"] = s.adoptions;
  return d;
}

py::list mapping_list(const Allocator& allocator) {
  py::list all;
  for (const MappingInfo& m : call_without_gil([&] { return allocator.mappings(); })) {
    all.append(py::make_tuple(m.slot, m.region, m.address, m.bytes, m.handle,
                              m.access == Access::read ? "read" : "read_write"));
  }
  return all;
}

void bind_allocator(py::module_& module) {
  py::class_<Allocator, std::shared_ptr<Allocator>>(module, "Allocator")
      .def(
          py::init([](std::shared_ptr<Pool> pool,
                      const std::vector<std::tuple<std::size_t, std::size_t, std::size_t>>& regions,
                      std::size_t reserved_bytes, std::size_t max_extent_bytes,
                      std::uint32_t max_sequences, std::int64_t max_seq_len,
                      std::int64_t tail_slack_tokens, std::size_t guard_pages,
                      std::int64_t lookahead_tokens, std::int64_t fence_timeout_ms) {
            AllocatorConfig config;
            config.reserved_bytes = reserved_bytes;
            config.max_extent_bytes = max_extent_bytes;
            config.max_sequences = max_sequences;
            config.max_seq_len = max_seq_len;
            config.tail_slack_tokens = tail_slack_tokens;
            config.guard_pages = guard_pages;
            config.lookahead_tokens = lookahead_tokens;
            config.fence_timeout_ms = fence_timeout_ms;
            for (const auto& [offset, stride, row] : regions) {
              config.regions.push_back({offset, stride, row});
            }
            const NoGil no_gil;
            return std::shared_ptr<Allocator>(
                std::make_unique<Allocator>(std::move(pool), std::move(config)).release(), destroy);
          }),
          py::kw_only(), py::arg("pool"), py::arg("regions"), py::arg("reserved_bytes"),
          py::arg("max_extent_bytes"), py::arg("max_sequences"), py::arg("max_seq_len"),
          py::arg("tail_slack_tokens"), py::arg("guard_pages"), py::arg("lookahead_tokens"),
          py::arg("fence_timeout_ms"))
      .def(
          "allocate",
          [](Allocator& allocator, std::size_t count, std::int64_t tokens, Stream stream,
             std::int64_t expected_tokens) {
            const std::vector<SequenceId> made = call_without_gil(
                [&] { return allocator.allocate(count, tokens, stream, expected_tokens); });
            py::list ids;
            for (const SequenceId& id : made) ids.append(py::make_tuple(id.slot, id.generation));
            return ids;
          },
          py::arg("count"), py::arg("tokens"), py::arg("stream"), py::arg("expected_tokens") = 0)
      .def(
          "try_step_lengths",
          [](Allocator& allocator, const py::object& lengths) {
            const Lengths view(lengths.ptr());
            return allocator.try_step(view.data(), view.count());
          },
          py::arg("lengths"))
      .def(
          "step_lengths",
          [](Allocator& allocator, const py::object& lengths, Stream stream) {
            const Lengths view(lengths.ptr());
            const NoGil no_gil;
            allocator.step(view.data(), view.count(), stream);
          },
          py::arg("lengths"), py::arg("stream"))
      // The same of 64-bit integers at an address, for what has no buffer: torch's tensors.
      .def(
          "try_step_at",
          [](Allocator& allocator, std::uintptr_t lengths, std::size_t count) {
            return allocator.try_step(reinterpret_cast<const std::int64_t*>(lengths), count);
          },
          py::arg("lengths"), py::arg("count"))
      .def(
          "step_at",
          [](Allocator& allocator, std::uintptr_t lengths, std::size_t count, Stream stream) {
            allocator.step(reinterpret_cast<const std::int64_t*>(lengths), count, stream);
          },
          py::arg("lengths"), py::arg("count"), py::arg("stream"), WithoutGil())
      .def(
          "step_sequences",
          [](Allocator& allocator,
             const std::vector<std::tuple<std::uint32_t, std::uint64_t, std::int64_t>>& lengths,
             Stream stream) {
            std::vector<std::pair<SequenceId, std::int64_t>> pairs;
            pairs.reserve(lengths.size());
            for (const auto& [slot, generation, tokens] : lengths) {
              pairs.emplace_back(SequenceId{slot, generation}, tokens);
            }
            allocator.step(pairs, stream);
          },
          py::arg("lengths"), py::arg("stream"), WithoutGil())
      .def(
          "trim",
          [](Allocator& allocator, std::uint32_t slot, std::uint64_t generation,
             std::int64_t tokens,
             Stream stream) { allocator.trim({slot, generation}, tokens, stream); },
          py::arg("slot"), py::arg("generation"), py::arg("tokens"), py::arg("stream"),
          WithoutGil())
      .def(
          "trim_front",
          [](Allocator& allocator, std::uint32_t slot, std::uint64_t generation,
             std::int64_t first_token,
             Stream stream) { allocator.trim_front({slot, generation}, first_token, stream); },
          py::arg("slot"), py::arg("generation"), py::arg("first_token"), py::arg("stream"),
          WithoutGil())
      .def(
          "free",
          [](Allocator& allocator, std::uint32_t slot, std::uint64_t generation, Stream stream) {
            allocator.free({slot, generation}, stream);
          },
          py::arg("slot"), py::arg("generation"), py::arg("stream"), WithoutGil())
      .def(
          "length",
          [](const Allocator& allocator, std::uint32_t slot, std::uint64_t generation) {
            return allocator.length({slot, generation});
          },
          py::arg("slot"), py::arg("generation"), WithoutGil())
      .def(
          "alive",
          [](const Allocator& allocator, std::uint32_t slot, std::uint64_t generation) {
            return allocator.alive({slot, generation});
          },
          py::arg("slot"), py::arg("generation"), WithoutGil())
      .def("close", &Allocator::close, WithoutGil())
      .def("check", &Allocator::check, WithoutGil())
      .def("stats", &allocator_stats)
      .def("mappings", &mapping_list)
      .def_property_readonly("base", &Allocator::base)
      .def(
          "to_dlpack",
          [](std::shared_ptr<Allocator> allocator, std::size_t offset_bytes,
             std::vector<std::int64_t> shape, std::vector<std::int64_t> strides, int item_bytes) {
            return to_dlpack(std::move(allocator),
                             {offset_bytes, std::move(shape), std::move(strides), item_bytes});
          },
          py::kw_only(), py::arg("offset_bytes"), py::arg("shape"), py::arg("strides"),
          py::arg("item_bytes"));
}

}  // namespace

void bind_core(py::module_& module) {
  bind_pool(module);
  bind_allocator(module);
}

}  // namespace vattention
