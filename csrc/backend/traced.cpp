#include "backend/traced.h"

#include <utility>

#include "backend/wrapped.h"
#include "core/trace.h"

namespace vattention {
namespace {

class TracedBackend final : public WrappedBackend {
 public:
  using WrappedBackend::WrappedBackend;

 private:
  Status before(const char*) noexcept override { return {}; }
  void after(const char* call, const Status& status,
             std::chrono::nanoseconds elapsed) noexcept override {
    trace(3, call, std::chrono::duration<double, std::micro>(elapsed).count(), "us",
          status.ok() ? "" : "failed");
  }
};

}  // namespace

std::shared_ptr<Backend> traced_if_asked(std::shared_ptr<Backend> backend) {
  if (debug_level() < 3) return backend;
  return std::make_shared<TracedBackend>(std::move(backend));
}

}  // namespace vattention
