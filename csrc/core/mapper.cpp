#include "core/mapper.h"

#include <chrono>
#include <exception>

#include "core/pool.h"
#include "core/trace.h"

namespace vattention {
namespace {

// How often fences are looked at while something waits to be unmapped. CUDA has no way to be woken
// by an event that costs less.
constexpr std::chrono::milliseconds kFencePoll{1};

}  // namespace

Mapper::Mapper(Pool& pool) : pool_(pool) {
  if (const Status status = pool_.backend().create_stream(&stream_); !status.ok()) {
    throw_status(pool_.backend(), status);
  }
  thread_ = std::thread([this] { loop(); });
}

Mapper::~Mapper() { stop(); }

void Mapper::wake() noexcept {
  if (!work_) {
    work_ = true;
    wake_.notify_one();
  }
}

void Mapper::stop() noexcept {
  {
    const Pool::Lock lock = pool_.lock();
    stop_ = true;
    wake_.notify_one();
  }
  std::call_once(joined_, [this] { thread_.join(); });
}

void Mapper::loop() {
  Pool::Lock lock = pool_.lock();
  while (!stop_) {
    if (!work_) {
      if (pool_.waits_for_fences()) {
        wake_.wait_for(lock, kFencePoll);
      } else {
        wake_.wait(lock, [this] { return work_ || stop_; });
      }
    }
    if (stop_) return;
    work_ = false;
    try {
      work_ = pool_.background_pass(lock, stream_) || work_;
    } catch (const std::exception& error) {
      // The next operation that needs what failed here reports it to somebody who can act.
      trace(1, "background failure:", error.what());
    }
  }
}

}  // namespace vattention
