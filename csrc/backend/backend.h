// The seam to physical memory. Everything above this header is the same on a GPU and on the host.
//
// A backend owns no policy: it reserves addresses, creates physical allocations ("extents", one
// handle each), maps one at an address, sets access, and tells when work on a stream has passed.
//
// Contract, the same for every backend (the CUDA driver's, where it is the stricter one):
//   - Sizes and addresses are multiples of page_bytes(). A handle is mapped whole, from its start.
//   - Mapping over a mapping is refused. Unmapping part of a mapping is refused; unmapping a range
//     with holes works. A mapping starts without access. Access is set over ranges without a hole
//     (the host refuses any other; CUDA, with driver 580, those with a hole at either end).
//   - A handle may be mapped at several places (an alias). Destroying a handle that is still mapped
//     is allowed: its memory goes back with its last mapping.
//   - Unreserving a range in which something is mapped is refused.
//   - A call either takes effect or changes nothing and says why in its Status. Nothing throws.
//   - Every method may be called from any thread; calls are not ordered against each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace vattention {

using Address = std::uintptr_t;  // a virtual address, on the device of the backend
using Handle = std::uint64_t;    // one physical allocation
using Stream = std::uintptr_t;   // a CUstream; 0 is the default stream; the host ignores it
using Fence = std::uint64_t;     // a point in a stream

enum class Access : std::uint8_t { none, read, read_write };

// The outcome of one backend call. `call` is a string literal naming the driver or system call.
struct [[nodiscard]] Status {
  enum class Kind : std::uint8_t { ok, out_of_memory, failed };

  Kind kind = Kind::ok;
  int code = 0;
  const char* call = "";

  [[nodiscard]] bool ok() const noexcept { return kind == Kind::ok; }
};

// What a DLPack consumer is told about where the memory is (DLDeviceType, device id).
struct DeviceId {
  std::int32_t type;
  std::int32_t index;
};

class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  [[nodiscard]] virtual const char* name() const noexcept = 0;
  [[nodiscard]] virtual std::size_t page_bytes() const noexcept = 0;
  [[nodiscard]] virtual DeviceId device() const noexcept = 0;
  // How many mappings a process can hold before the driver or kernel refuses more, with a margin.
  [[nodiscard]] virtual std::size_t max_mappings() const noexcept = 0;
  // Whether the memory of a new handle is promised to read as zero.
  [[nodiscard]] virtual bool fresh_memory_is_zero() const noexcept = 0;
  // Name and meaning of a code, such as "CUDA_ERROR_OUT_OF_MEMORY: out of memory".
  [[nodiscard]] virtual std::string describe(int code) const = 0;

  // Physical memory of the device that nobody holds, and all of it.
  virtual Status memory_info(std::size_t* free_bytes, std::size_t* total_bytes) noexcept = 0;

  virtual Status reserve(std::size_t bytes, Address* address) noexcept = 0;
  virtual Status unreserve(Address address, std::size_t bytes) noexcept = 0;

  virtual Status create(std::size_t bytes, Handle* handle) noexcept = 0;
  virtual Status destroy(Handle handle) noexcept = 0;

  virtual Status map(Address address, std::size_t bytes, Handle handle) noexcept = 0;
  virtual Status unmap(Address address, std::size_t bytes) noexcept = 0;
  virtual Status set_access(Address address, std::size_t bytes, Access access) noexcept = 0;

  // Writes zeros over mapped, writable memory, in the order of the stream.
  virtual Status zero(Address address, std::size_t bytes, Stream stream) noexcept = 0;

  // A stream of the backend's own, for background work; destroyed with the backend.
  virtual Status create_stream(Stream* stream) noexcept = 0;
  // Waits until everything enqueued on the stream so far is done.
  virtual Status synchronize(Stream stream) noexcept = 0;
  // Waits until everything enqueued on any stream of the device so far is done.
  virtual Status synchronize_device() noexcept = 0;

  virtual Status create_fence(Fence* fence) noexcept = 0;
  virtual Status destroy_fence(Fence fence) noexcept = 0;
  // Moves the fence behind everything enqueued on the stream so far.
  virtual Status record(Fence fence, Stream stream) noexcept = 0;
  // Holds back what is enqueued on the stream from now on until the fence, as it was recorded last,
  // has passed; does not wait itself.
  virtual Status wait(Stream stream, Fence fence) noexcept = 0;
  // Whether the stream has passed the fence. A fence that was never recorded has passed.
  virtual Status query(Fence fence, bool* passed) noexcept = 0;
};

}  // namespace vattention
