#include "backend/faulty.h"

#include <utility>

namespace vattention {

FaultyBackend::FaultyBackend(std::shared_ptr<Backend> inner)
    : WrappedBackend(std::move(inner)), name_("faulty " + std::string(inner_->name())) {}

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

Status FaultyBackend::before(const char* call) noexcept {
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

// Waiting for a stream means that what was held on it has passed.
Status FaultyBackend::synchronize(Stream stream) noexcept {
  const Status status = WrappedBackend::synchronize(stream);
  const std::lock_guard lock(mutex_);
  if (status.ok()) std::erase_if(held_, [&](const auto& held) { return held.second == stream; });
  return status;
}

Status FaultyBackend::synchronize_device() noexcept {
  const Status status = WrappedBackend::synchronize_device();
  const std::lock_guard lock(mutex_);
  if (status.ok()) held_.clear();
  return status;
}

Status FaultyBackend::destroy_fence(Fence fence) noexcept {
  const Status status = WrappedBackend::destroy_fence(fence);
  const std::lock_guard lock(mutex_);
  if (status.ok()) held_.erase(fence);
  return status;
}

Status FaultyBackend::record(Fence fence, Stream stream) noexcept {
  const Status status = WrappedBackend::record(fence, stream);
  const std::lock_guard lock(mutex_);
  if (status.ok()) {
    held_.erase(fence);
    if (hold_) held_[fence] = stream;
  }
  return status;
}

Status FaultyBackend::query(Fence fence, bool* passed) noexcept {
  const Status status = WrappedBackend::query(fence, passed);
  const std::lock_guard lock(mutex_);
  if (status.ok() && held_.contains(fence)) *passed = false;
  return status;
}

}  // namespace vattention
