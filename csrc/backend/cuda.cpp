#include "backend/cuda.h"

#include <mutex>
#include <vector>

#include "backend/cuda_driver.h"

namespace vattention {
namespace {

constexpr std::int32_t kDlCuda = 2;
// A device was reported to take about 500,000 mappings in all; other users of it need some.
constexpr std::size_t kMaxMappings = 400'000;

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(int ordinal) : ordinal_(ordinal) {
    std::string why;
    int code = 0;
    driver_ = cuda::Driver::load(&why, &code);
    if (driver_ == nullptr) throw CudaUnavailable(why, code);
    int count = 0;
    require(driver_->device_count(&count), "cuDeviceGetCount");
    if (ordinal < 0 || ordinal >= count) {
      throw CudaUnavailable("there is no CUDA device " + std::to_string(ordinal) + ": " +
                                std::to_string(count) + " visible (see CUDA_VISIBLE_DEVICES)",
                            0);
    }
    require(driver_->device_get(&device_, ordinal), "cuDeviceGet");
    int supported = 0;
    require(driver_->device_attribute(&supported, cuda::kAttributeVirtualMemoryManagement, device_),
            "cuDeviceGetAttribute");
    if (supported == 0) {
      throw CudaUnavailable("CUDA device " + std::to_string(ordinal) +
                                " has no virtual memory management (cuMemMap): use another device",
                            0);
    }
    properties_.type = cuda::kAllocationTypePinned;
    properties_.location = {cuda::kLocationTypeDevice, device_};
    require(driver_->granularity(&page_bytes_, &properties_, cuda::kGranularityMinimum),
            "cuMemGetAllocationGranularity");
    // Last, so that nothing has to be undone when an earlier step throws.
    require(driver_->primary_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
  }

  ~CudaBackend() override {
    // The results are ignored: at process exit the driver may be gone already.
    for (const Stream stream : streams_) {
      const Scope scope(*this);
      (void)driver_->stream_destroy(to_stream(stream));
    }
    (void)driver_->primary_release(device_);
  }

  [[nodiscard]] const char* name() const noexcept override { return "cuda"; }
  [[nodiscard]] std::size_t page_bytes() const noexcept override { return page_bytes_; }
  [[nodiscard]] DeviceId device() const noexcept override { return {kDlCuda, ordinal_}; }
  [[nodiscard]] std::size_t max_mappings() const noexcept override { return kMaxMappings; }
  // New device memory has been seen to be zero; CUDA does not promise it.
  [[nodiscard]] bool fresh_memory_is_zero() const noexcept override { return false; }
  [[nodiscard]] std::string describe(int code) const override { return driver_->describe(code); }

  Status memory_info(std::size_t* free_bytes, std::size_t* total_bytes) noexcept override {
    const Scope scope(*this);
    return status(driver_->memory_info(free_bytes, total_bytes), "cuMemGetInfo");
  }

  Status reserve(std::size_t bytes, Address* address) noexcept override {
    const Scope scope(*this);
    cuda::DevicePointer pointer = 0;
    const Status reserved =
        status(driver_->address_reserve(&pointer, bytes, 0, 0, 0), "cuMemAddressReserve");
    if (reserved.ok()) *address = static_cast<Address>(pointer);
    return reserved;
  }

  Status unreserve(Address address, std::size_t bytes) noexcept override {
    const Scope scope(*this);
    return status(driver_->address_free(address, bytes), "cuMemAddressFree");
  }

  Status create(std::size_t bytes, Handle* handle) noexcept override {
    const Scope scope(*this);
    cuda::AllocationHandle created = 0;
    const Status result = status(driver_->create(&created, bytes, &properties_, 0), "cuMemCreate");
    if (result.ok()) *handle = created;
    return result;
  }

  Status destroy(Handle handle) noexcept override {
    const Scope scope(*this);
    return status(driver_->release(handle), "cuMemRelease");
  }

  Status map(Address address, std::size_t bytes, Handle handle) noexcept override {
    const Scope scope(*this);
    return status(driver_->map(address, bytes, 0, handle, 0), "cuMemMap");
  }

  Status unmap(Address address, std::size_t bytes) noexcept override {
    const Scope scope(*this);
    return status(driver_->unmap(address, bytes), "cuMemUnmap");
  }

  Status set_access(Address address, std::size_t bytes, Access access) noexcept override {
    const Scope scope(*this);
    cuda::AccessDescriptor descriptor{};
    descriptor.location = properties_.location;
    descriptor.flags = access == Access::read_write ? cuda::kAccessReadWrite
                       : access == Access::read     ? cuda::kAccessRead
                                                    : cuda::kAccessNone;
    return status(driver_->set_access(address, bytes, &descriptor, 1), "cuMemSetAccess");
  }

  Status zero(Address address, std::size_t bytes, Stream stream) noexcept override {
    const Scope scope(*this);
    if (const Status capture = refuse_capture(stream); !capture.ok()) return capture;
    return status(driver_->memset_async(address, 0, bytes, to_stream(stream)), "cuMemsetD8Async");
  }

  Status create_stream(Stream* stream) noexcept override {
    const Scope scope(*this);
    cuda::StreamPointer created = nullptr;
    const Status result =
        status(driver_->stream_create(&created, cuda::kStreamNonBlocking), "cuStreamCreate");
    if (!result.ok()) return result;
    try {
      const std::lock_guard lock(streams_mutex_);
      streams_.push_back(reinterpret_cast<Stream>(created));
    } catch (const std::bad_alloc&) {
      (void)driver_->stream_destroy(created);
      return {Status::Kind::out_of_memory, cuda::kErrorOutOfMemory, "cuStreamCreate"};
    }
    *stream = reinterpret_cast<Stream>(created);
    return result;
  }

  Status synchronize(Stream stream) noexcept override {
    const Scope scope(*this);
    if (const Status capture = refuse_capture(stream); !capture.ok()) return capture;
    return status(driver_->stream_synchronize(to_stream(stream)), "cuStreamSynchronize");
  }

  Status synchronize_device() noexcept override {
    const Scope scope(*this);
    return status(driver_->context_synchronize(), "cuCtxSynchronize");
  }

  Status create_fence(Fence* fence) noexcept override {
    const Scope scope(*this);
    cuda::EventPointer event = nullptr;
    const Status result =
        status(driver_->event_create(&event, cuda::kEventDisableTiming), "cuEventCreate");
    if (result.ok()) *fence = reinterpret_cast<Fence>(event);
    return result;
  }

  Status destroy_fence(Fence fence) noexcept override {
    const Scope scope(*this);
    return status(driver_->event_destroy(to_event(fence)), "cuEventDestroy");
  }

  Status record(Fence fence, Stream stream) noexcept override {
    const Scope scope(*this);
    if (const Status capture = refuse_capture(stream); !capture.ok()) return capture;
    return status(driver_->event_record(to_event(fence), to_stream(stream)), "cuEventRecord");
  }

  Status wait(Stream stream, Fence fence) noexcept override {
    const Scope scope(*this);
    if (const Status capture = refuse_capture(stream); !capture.ok()) return capture;
    return status(driver_->stream_wait_event(to_stream(stream), to_event(fence), 0),
                  "cuStreamWaitEvent");
  }

  Status query(Fence fence, bool* passed) noexcept override {
    const Scope scope(*this);
    const cuda::Result result = driver_->event_query(to_event(fence));
    if (result == cuda::kSuccess || result == cuda::kErrorNotReady) {
      *passed = result == cuda::kSuccess;
      return {};
    }
    return status(result, "cuEventQuery");
  }

 private:
  // Makes the context current and the capture mode relaxed on this thread, for one call.
  class Scope {
   public:
    explicit Scope(const CudaBackend& backend) : driver_(*backend.driver_) {
      pushed_ = driver_.context_push(backend.context_) == cuda::kSuccess;
      exchanged_ = driver_.exchange_capture_mode(&mode_) == cuda::kSuccess;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
    ~Scope() {
      if (exchanged_) (void)driver_.exchange_capture_mode(&mode_);
      cuda::Context popped = nullptr;
      if (pushed_) (void)driver_.context_pop(&popped);
    }

   private:
    const cuda::Driver& driver_;
    int mode_ = cuda::kCaptureModeRelaxed;
    bool pushed_ = false;
    bool exchanged_ = false;
  };

  static cuda::StreamPointer to_stream(Stream stream) {
    return reinterpret_cast<cuda::StreamPointer>(stream);
  }
  static cuda::EventPointer to_event(Fence fence) {
    return reinterpret_cast<cuda::EventPointer>(fence);
  }

  static Status status(cuda::Result result, const char* call) noexcept {
    if (result == cuda::kSuccess) return {};
    return {result == cuda::kErrorOutOfMemory ? Status::Kind::out_of_memory : Status::Kind::failed,
            result, call};
  }

  Status refuse_capture(Stream stream) const noexcept {
    int capturing = 0;
    const cuda::Result result = driver_->stream_is_capturing(to_stream(stream), &capturing);
    if (result != cuda::kSuccess) return status(result, "cuStreamIsCapturing");
    if (capturing != 0) return status(cuda::kErrorStreamCaptureUnsupported, "cuStreamIsCapturing");
    return {};
  }

  void require(cuda::Result result, const char* call) const {
    if (result == cuda::kSuccess) return;
    throw CudaUnavailable(std::string(call) + " failed with " + driver_->describe(result), result);
  }

  const cuda::Driver* driver_ = nullptr;
  int ordinal_;
  cuda::Device device_ = 0;
  cuda::Context context_ = nullptr;
  cuda::AllocationProperties properties_{};
  std::size_t page_bytes_ = 0;
  std::mutex streams_mutex_;
  std::vector<Stream> streams_;
};

}  // namespace

std::shared_ptr<Backend> make_cuda_backend(int ordinal) {
  return std::make_shared<CudaBackend>(ordinal);
}

}  // namespace vattention
