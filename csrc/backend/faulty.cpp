#include "backend/faulty.h"

#include <utility>

namespace vattention {

FaultyBackend::FaultyBackend(std::shared_ptr<Backend> inner)
    : inner_(std::move(inner)), name_("faulty " + std::string(inner_->name())) {}

void FaultyBackend::arm(const std::string& call, std::uint64_t nth, Status::Kind kind,
                        bool sticky) {
  const std::lock_guard lock(mutex_);
  armed_call_ = call;
  countdown_ = nth;
  armed_kind_ = kind;
  sticky_ = sticky;
}

void FaultyBackend::disarm() {
  const std::lock_guard lock(mutex_);
  countdown_ = 0;
}

std::map<std::string, std::uint64_t> FaultyBackend::calls() const {
  const std::lock_guard lock(mutex_);
  return calls_;
}

void FaultyBackend::hold_fences() {
  const std::lock_guard lock(mutex_);
  hold_ = true;
}

void FaultyBackend::release_fences() {
  const std::lock_guard lock(mutex_);
  hold_ = false;
  held_.clear();
}

void FaultyBackend::block(const std::string& call) {
  const std::lock_guard lock(mutex_);
  gates_.insert(call);
}

void FaultyBackend::unblock(const std::string& call) {
  const std::lock_guard lock(mutex_);
  gates_.erase(call);
  changed_.notify_all();
}

bool FaultyBackend::wait_blocked(const std::string& call, std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, timeout, [&] { return waiting_[call] > 0; });
}

std::string FaultyBackend::describe(int code) const {
  return code == kInjected ? "INJECTED: made to fail by a test" : inner_->describe(code);
}

Status FaultyBackend::enter(const char* call) noexcept {
  std::unique_lock lock(mutex_);
  ++calls_[call];
  if (gates_.contains(call)) {
    ++waiting_[call];
    changed_.notify_all();
    changed_.wait(lock, [&] { return !gates_.contains(call); });
    --waiting_[call];
  }
  if (countdown_ == 0 || (!armed_call_.empty() && armed_call_ != call)) return {};
  if (countdown_ > 1) {
    --countdown_;
    return {};
  }
  if (!sticky_) countdown_ = 0;
  return {armed_kind_, kInjected, call};
}

Status FaultyBackend::memory_info(std::size_t* free_bytes, std::size_t* total_bytes) noexcept {
  const Status status = enter("memory_info");
  return status.ok() ? inner_->memory_info(free_bytes, total_bytes) : status;
}

Status FaultyBackend::reserve(std::size_t bytes, Address* address) noexcept {
  const Status status = enter("reserve");
  return status.ok() ? inner_->reserve(bytes, address) : status;
}

Status FaultyBackend::unreserve(Address address, std::size_t bytes) noexcept {
  const Status status = enter("unreserve");
  return status.ok() ? inner_->unreserve(address, bytes) : status;
}

Status FaultyBackend::create(std::size_t bytes, Handle* handle) noexcept {
  const Status status = enter("create");
  return status.ok() ? inner_->create(bytes, handle) : status;
}

Status FaultyBackend::destroy(Handle handle) noexcept {
  const Status status = enter("destroy");
  return status.ok() ? inner_->destroy(handle) : status;
}

Status FaultyBackend::map(Address address, std::size_t bytes, Handle handle) noexcept {
  const Status status = enter("map");
  return status.ok() ? inner_->map(address, bytes, handle) : status;
}

Status FaultyBackend::unmap(Address address, std::size_t bytes) noexcept {
  const Status status = enter("unmap");
  return status.ok() ? inner_->unmap(address, bytes) : status;
}

Status FaultyBackend::set_access(Address address, std::size_t bytes, Access access) noexcept {
  const Status status = enter("set_access");
  return status.ok() ? inner_->set_access(address, bytes, access) : status;
}

Status FaultyBackend::zero(Address address, std::size_t bytes, Stream stream) noexcept {
  const Status status = enter("zero");
  return status.ok() ? inner_->zero(address, bytes, stream) : status;
}

Status FaultyBackend::create_stream(Stream* stream) noexcept {
  const Status status = enter("create_stream");
  return status.ok() ? inner_->create_stream(stream) : status;
}

Status FaultyBackend::synchronize(Stream stream) noexcept {
  if (const Status status = enter("synchronize"); !status.ok()) return status;
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(held_, [&](const auto& held) { return held.second == stream; });
  }
  return inner_->synchronize(stream);
}

Status FaultyBackend::synchronize_device() noexcept {
  if (const Status status = enter("synchronize_device"); !status.ok()) return status;
  {
    const std::lock_guard lock(mutex_);
    held_.clear();
  }
  return inner_->synchronize_device();
}

Status FaultyBackend::create_fence(Fence* fence) noexcept {
  const Status status = enter("create_fence");
  return status.ok() ? inner_->create_fence(fence) : status;
}

Status FaultyBackend::destroy_fence(Fence fence) noexcept {
  if (const Status status = enter("destroy_fence"); !status.ok()) return status;
  {
    const std::lock_guard lock(mutex_);
    held_.erase(fence);
  }
  return inner_->destroy_fence(fence);
}

Status FaultyBackend::record(Fence fence, Stream stream) noexcept {
  if (const Status status = enter("record"); !status.ok()) return status;
  const Status status = inner_->record(fence, stream);
  const std::lock_guard lock(mutex_);
  if (status.ok() && hold_) held_[fence] = stream;
  return status;
}

Status FaultyBackend::query(Fence fence, bool* passed) noexcept {
  if (const Status status = enter("query"); !status.ok()) return status;
  const Status status = inner_->query(fence, passed);
  const std::lock_guard lock(mutex_);
  if (status.ok() && held_.contains(fence)) *passed = false;
  return status;
}

}  // namespace vattention
