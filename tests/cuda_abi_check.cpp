// Compiles only if csrc/backend/cuda_driver.h agrees with the toolkit's cuda.h; never linked.
#include <cuda.h>

#include <cstddef>
#include <type_traits>

#include "backend/cuda_driver.h"

namespace cuda = vattention::cuda;

static_assert(sizeof(cuda::Location) == sizeof(CUmemLocation));
static_assert(sizeof(cuda::AllocationProperties) == sizeof(CUmemAllocationProp));
static_assert(offsetof(cuda::AllocationProperties, requested_handle_types) ==
              offsetof(CUmemAllocationProp, requestedHandleTypes));
static_assert(offsetof(cuda::AllocationProperties, location) ==
              offsetof(CUmemAllocationProp, location));
static_assert(offsetof(cuda::AllocationProperties, win32_handle_metadata) ==
              offsetof(CUmemAllocationProp, win32HandleMetaData));
static_assert(offsetof(cuda::AllocationProperties, flags) ==
              offsetof(CUmemAllocationProp, allocFlags));
static_assert(sizeof(cuda::AccessDescriptor) == sizeof(CUmemAccessDesc));
static_assert(offsetof(cuda::AccessDescriptor, flags) == offsetof(CUmemAccessDesc, flags));
static_assert(sizeof(cuda::DevicePointer) == sizeof(CUdeviceptr));
static_assert(sizeof(cuda::AllocationHandle) == sizeof(CUmemGenericAllocationHandle));

static_assert(cuda::kSuccess == CUDA_SUCCESS);
static_assert(cuda::kErrorOutOfMemory == CUDA_ERROR_OUT_OF_MEMORY);
static_assert(cuda::kErrorNotReady == CUDA_ERROR_NOT_READY);
static_assert(cuda::kErrorStreamCaptureUnsupported == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
static_assert(cuda::kAllocationTypePinned == CU_MEM_ALLOCATION_TYPE_PINNED);
static_assert(cuda::kLocationTypeDevice == CU_MEM_LOCATION_TYPE_DEVICE);
static_assert(cuda::kAccessNone == CU_MEM_ACCESS_FLAGS_PROT_NONE);
static_assert(cuda::kAccessRead == CU_MEM_ACCESS_FLAGS_PROT_READ);
static_assert(cuda::kAccessReadWrite == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
static_assert(cuda::kGranularityMinimum == CU_MEM_ALLOC_GRANULARITY_MINIMUM);
static_assert(cuda::kEventDisableTiming == CU_EVENT_DISABLE_TIMING);
static_assert(cuda::kStreamNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(cuda::kCaptureModeRelaxed == CU_STREAM_CAPTURE_MODE_RELAXED);
static_assert(cuda::kAttributeVirtualMemoryManagement ==
              CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);

// Every function: as many parameters, each of the same size.
template <typename Ours, typename Theirs>
struct same_shape : std::false_type {};
template <typename... Ours, typename... Theirs>
struct same_shape<cuda::Result (*)(Ours...), CUresult (*)(Theirs...)>
    : std::bool_constant<sizeof...(Ours) == sizeof...(Theirs) &&
                         ((sizeof(Ours) == sizeof(Theirs)) && ...)> {};

#define VATTENTION_CHECK(member, symbol, parameters)                                  \
  static_assert(same_shape<decltype(cuda::Driver::member), decltype(&symbol)>::value, \
                #symbol " has another signature");
VATTENTION_CUDA_SYMBOLS(VATTENTION_CHECK)
#undef VATTENTION_CHECK
