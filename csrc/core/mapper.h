// The background thread of a pool: maps ahead of growing sequences, takes back what the GPU has
// finished with, and keeps the pool between its watermarks.
//
// Owns: one std::thread, joined in stop(), and a stream of its own.
// Always true: it never calls into Python, holds the pool's lock over no driver call but the
// queries of fences, and what it maps is cleared before it is published, so that no stream has to
// wait for it.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

#include "backend/backend.h"

namespace vattention {

class Pool;

class Mapper {
 public:
  // Throws BackendFailure.
  explicit Mapper(Pool& pool);
  ~Mapper();
  Mapper(const Mapper&) = delete;
  Mapper& operator=(const Mapper&) = delete;

  // With the pool's lock held.
  void wake() noexcept;
  // Without it. Idempotent; whoever calls it, the thread has ended when it returns.
  void stop() noexcept;

 private:
  void loop();

  Pool& pool_;
  Stream stream_ = 0;
  std::condition_variable wake_;
  bool work_ = false;
  bool stop_ = false;
  std::thread thread_;
  std::once_flag joined_;
};

}  // namespace vattention
