// A backend that fails on purpose. For tests: it wraps a real one, counts every call, and can make
// chosen calls fail, hold fences back as a busy GPU does, and stop a call at a gate.
//
// Always true: a call that is made to fail does not reach the wrapped backend.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>

#include "backend/wrapped.h"

namespace vattention {

class FaultyBackend final : public WrappedBackend {
 public:
  static constexpr int kInjected = 999;  // the code of a failure made here

  explicit FaultyBackend(std::shared_ptr<Backend> inner);

  // The nth call from now (1: the next) of that name, or of any where it is empty, fails; with
  // `sticky` every later one does too.
  void arm(const std::string& call, std::uint64_t nth, Status::Kind kind, bool sticky);
  void disarm();
  [[nodiscard]] std::map<std::string, std::uint64_t> calls() const;

  // While fences are held, none that is recorded passes; it does when they are released, or when
  // its stream or the device is synchronized.
  void hold_fences();
  void release_fences();

  // Calls of that name wait at a gate until it is opened.
  void block(const std::string& call);
  void unblock(const std::string& call);
  // Whether a call of that name waits at its gate, or came to it within the time.
  [[nodiscard]] bool wait_blocked(const std::string& call, std::chrono::milliseconds timeout);

  [[nodiscard]] const char* name() const noexcept override { return name_.c_str(); }
  [[nodiscard]] std::string describe(int code) const override;

  Status synchronize(Stream stream) noexcept override;
  Status synchronize_device() noexcept override;
  Status destroy_fence(Fence fence) noexcept override;
  Status record(Fence fence, Stream stream) noexcept override;
  Status query(Fence fence, bool* passed) noexcept override;

 private:
  // Counts the call, waits at its gate, and says whether it is to fail.
  Status before(const char* call) noexcept override;
  void after(const char*, const Status&, std::chrono::nanoseconds) noexcept override {}

  const std::string name_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::uint64_t> calls_;
  std::string armed_call_;
  std::uint64_t countdown_ = 0;  // 0: not armed
  Status::Kind armed_kind_ = Status::Kind::failed;
  bool sticky_ = false;
  bool hold_ = false;
  std::map<Fence, Stream> held_;
  std::set<std::string> gates_;
  std::map<std::string, int> waiting_;
};

}  // namespace vattention
