// The part of the CUDA driver that is used, opened at run time.
//
// Owns the types and symbols of libcuda as its public ABI fixes them, so that neither the toolkit
// nor a GPU is needed to build. VATTENTION_CUDA_SYMBOLS is the one list: a function is declared,
// loaded and callable because it is in it. tests/cuda_abi_check.cpp compares all of this with a
// toolkit's cuda.h where one is installed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace vattention::cuda {

using Result = int;
using Device = int;
using DevicePointer = unsigned long long;
using AllocationHandle = unsigned long long;
using Context = struct ContextTag*;
using StreamPointer = struct StreamTag*;
using EventPointer = struct EventTag*;

inline constexpr Result kSuccess = 0;
inline constexpr Result kErrorOutOfMemory = 2;
inline constexpr Result kErrorNotReady = 600;
inline constexpr Result kErrorStreamCaptureUnsupported = 900;

inline constexpr int kAllocationTypePinned = 1;
inline constexpr int kLocationTypeDevice = 1;
inline constexpr int kAccessNone = 0;
inline constexpr int kAccessRead = 1;
inline constexpr int kAccessReadWrite = 3;
inline constexpr int kGranularityMinimum = 0;
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr int kCaptureModeRelaxed = 2;
inline constexpr int kAttributeVirtualMemoryManagement = 102;

struct Location {
  int type;
  int id;
};

struct AllocationProperties {
  int type;
  int requested_handle_types;
  Location location;
  void* win32_handle_metadata;
  struct {
    unsigned char compression_type;
    unsigned char gpu_direct_rdma_capable;
    unsigned short usage;
    unsigned char reserved[4];
  } flags;
};

struct AccessDescriptor {
  Location location;
  int flags;
};

// X(member, exported symbol, parameters)
#define VATTENTION_CUDA_SYMBOLS(X)                                                                 \
  X(init, cuInit, (unsigned flags))                                                                \
  X(error_name, cuGetErrorName, (Result code, const char** text))                                  \
  X(error_string, cuGetErrorString, (Result code, const char** text))                              \
  X(device_count, cuDeviceGetCount, (int* count))                                                  \
  X(device_get, cuDeviceGet, (Device * device, int ordinal))                                       \
  X(device_attribute, cuDeviceGetAttribute, (int* value, int attribute, Device device))            \
  X(primary_retain, cuDevicePrimaryCtxRetain, (Context * context, Device device))                  \
  X(primary_release, cuDevicePrimaryCtxRelease_v2, (Device device))                                \
  X(context_push, cuCtxPushCurrent_v2, (Context context))                                          \
  X(context_pop, cuCtxPopCurrent_v2, (Context * context))                                          \
  X(context_synchronize, cuCtxSynchronize, ())                                                     \
  X(exchange_capture_mode, cuThreadExchangeStreamCaptureMode, (int* mode))                         \
  X(granularity, cuMemGetAllocationGranularity,                                                    \
    (std::size_t* bytes, const AllocationProperties* properties, int option))                      \
  X(memory_info, cuMemGetInfo_v2, (std::size_t* free, std::size_t* total))                         \
  X(address_reserve, cuMemAddressReserve,                                                          \
    (DevicePointer * address, std::size_t bytes, std::size_t alignment, DevicePointer wanted,      \
     unsigned long long flags))                                                                    \
  X(address_free, cuMemAddressFree, (DevicePointer address, std::size_t bytes))                    \
  X(create, cuMemCreate,                                                                           \
    (AllocationHandle * handle, std::size_t bytes, const AllocationProperties* properties,         \
     unsigned long long flags))                                                                    \
  X(release, cuMemRelease, (AllocationHandle handle))                                              \
  X(map, cuMemMap,                                                                                 \
    (DevicePointer address, std::size_t bytes, std::size_t offset, AllocationHandle handle,        \
     unsigned long long flags))                                                                    \
  X(unmap, cuMemUnmap, (DevicePointer address, std::size_t bytes))                                 \
  X(set_access, cuMemSetAccess,                                                                    \
    (DevicePointer address, std::size_t bytes, const AccessDescriptor* access, std::size_t count)) \
  X(memset_async, cuMemsetD8Async,                                                                 \
    (DevicePointer address, unsigned char value, std::size_t bytes, StreamPointer stream))         \
  X(stream_create, cuStreamCreate, (StreamPointer * stream, unsigned flags))                       \
  X(stream_destroy, cuStreamDestroy_v2, (StreamPointer stream))                                    \
  X(stream_synchronize, cuStreamSynchronize, (StreamPointer stream))                               \
  X(stream_is_capturing, cuStreamIsCapturing, (StreamPointer stream, int* capturing))              \
  X(event_create, cuEventCreate, (EventPointer * event, unsigned flags))                           \
  X(event_destroy, cuEventDestroy_v2, (EventPointer event))                                        \
  X(event_record, cuEventRecord, (EventPointer event, StreamPointer stream))                       \
  X(stream_wait_event, cuStreamWaitEvent,                                                          \
    (StreamPointer stream, EventPointer event, unsigned flags))                                    \
  X(event_query, cuEventQuery, (EventPointer event))

// The functions of libcuda. Immutable once loaded; never unloaded.
struct Driver {
#define VATTENTION_DECLARE(member, symbol, parameters) Result(*member) parameters = nullptr;
  VATTENTION_CUDA_SYMBOLS(VATTENTION_DECLARE)
#undef VATTENTION_DECLARE

  // Opens libcuda and initialises it, once a process. Returns nullptr, with the reason and what to
  // do about it in *why, where there is no usable driver.
  [[nodiscard]] static const Driver* load(std::string* why, int* code);

  [[nodiscard]] std::string describe(Result code) const;
};

}  // namespace vattention::cuda
