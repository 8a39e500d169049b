// A backend that passes every call on to another one, with a hook before and after: what the fault
// injector and the tracer have in common.
#pragma once

#include <chrono>
#include <memory>
#include <utility>

#include "backend/backend.h"

namespace vattention {

class WrappedBackend : public Backend {
 public:
  explicit WrappedBackend(std::shared_ptr<Backend> inner) : inner_(std::move(inner)) {}

  [[nodiscard]] const char* name() const noexcept override { return inner_->name(); }
  [[nodiscard]] std::size_t page_bytes() const noexcept override { return inner_->page_bytes(); }
  [[nodiscard]] DeviceId device() const noexcept override { return inner_->device(); }
  [[nodiscard]] std::size_t max_mappings() const noexcept override {
    return inner_->max_mappings();
  }
  [[nodiscard]] bool fresh_memory_is_zero() const noexcept override {
    return inner_->fresh_memory_is_zero();
  }
  [[nodiscard]] std::string describe(int code) const override { return inner_->describe(code); }

  Status memory_info(std::size_t* free_bytes, std::size_t* total_bytes) noexcept override {
    return pass("memory_info", [&] { return inner_->memory_info(free_bytes, total_bytes); });
  }
  Status reserve(std::size_t bytes, Address* address) noexcept override {
    return pass("reserve", [&] { return inner_->reserve(bytes, address); });
  }
  Status unreserve(Address address, std::size_t bytes) noexcept override {
    return pass("unreserve", [&] { return inner_->unreserve(address, bytes); });
  }
  Status create(std::size_t bytes, Handle* handle) noexcept override {
    return pass("create", [&] { return inner_->create(bytes, handle); });
  }
  Status destroy(Handle handle) noexcept override {
    return pass("destroy", [&] { return inner_->destroy(handle); });
  }
  Status map(Address address, std::size_t bytes, Handle handle) noexcept override {
    return pass("map", [&] { return inner_->map(address, bytes, handle); });
  }
  Status unmap(Address address, std::size_t bytes) noexcept override {
    return pass("unmap", [&] { return inner_->unmap(address, bytes); });
  }
  Status set_access(Address address, std::size_t bytes, Access access) noexcept override {
    return pass("set_access", [&] { return inner_->set_access(address, bytes, access); });
  }
  Status zero(Address address, std::size_t bytes, Stream stream) noexcept override {
    return pass("zero", [&] { return inner_->zero(address, bytes, stream); });
  }
  Status create_stream(Stream* stream) noexcept override {
    return pass("create_stream", [&] { return inner_->create_stream(stream); });
  }
  Status synchronize(Stream stream) noexcept override {
    return pass("synchronize", [&] { return inner_->synchronize(stream); });
  }
  Status synchronize_device() noexcept override {
    return pass("synchronize_device", [&] { return inner_->synchronize_device(); });
  }
  Status create_fence(Fence* fence) noexcept override {
    return pass("create_fence", [&] { return inner_->create_fence(fence); });
  }
  Status destroy_fence(Fence fence) noexcept override {
    return pass("destroy_fence", [&] { return inner_->destroy_fence(fence); });
  }
  Status record(Fence fence, Stream stream) noexcept override {
    return pass("record", [&] { return inner_->record(fence, stream); });
  }
  Status wait(Stream stream, Fence fence) noexcept override {
    return pass("wait", [&] { return inner_->wait(stream, fence); });
  }
  Status query(Fence fence, bool* passed) noexcept override {
    return pass("query", [&] { return inner_->query(fence, passed); });
  }

 protected:
  // A failure returned from here is the call's outcome: it is not passed on.
  virtual Status before(const char* call) noexcept = 0;
  virtual void after(const char* call, const Status& status,
                     std::chrono::nanoseconds elapsed) noexcept = 0;

  const std::shared_ptr<Backend> inner_;

 private:
  template <typename Call>
  Status pass(const char* name, Call call) noexcept {
    if (const Status refused = before(name); !refused.ok()) return refused;
    const auto start = std::chrono::steady_clock::now();
    const Status status = call();
    after(name, status, std::chrono::steady_clock::now() - start);
    return status;
  }
};

}  // namespace vattention
