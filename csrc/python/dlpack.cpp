#include "python/dlpack.h"

#include <utility>

#include "python/no_gil.h"

namespace py = pybind11;

namespace vattention {
namespace {

// The ABI of DLPack. Source: dmlc/dlpack, include/dlpack/dlpack.h.
struct DLDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};
struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

constexpr std::uint8_t kUnsignedInteger = 1;
constexpr std::uint8_t kSignedInteger = 0;
constexpr const char* kFresh = "dltensor";  // renamed by the consumer that takes it over

// Everything a capsule needs, in one block that its deleter frees.
struct Export {
  DLManagedTensor managed{};
  std::shared_ptr<Allocator> owner;
  TensorSpec spec;
};

void release_export(DLManagedTensor* managed) {
  const std::unique_ptr<Export> owned(static_cast<Export*>(managed->context));
  call_without_gil([&owned] { owned->owner->note_outlived(); });
}

void drop_unused_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, kFresh) == 0) return;  // the consumer's tensor owns it
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kFresh));
  managed->deleter(managed);
}

}  // namespace

py::capsule to_dlpack(std::shared_ptr<Allocator> allocator, TensorSpec spec) {
  auto exported = std::make_unique<Export>();
  exported->owner = std::move(allocator);
  exported->spec = std::move(spec);
  const DeviceId device = exported->owner->pool().backend().device();
  DLTensor& tensor = exported->managed.tensor;
  tensor.data = reinterpret_cast<void*>(exported->owner->base() + exported->spec.offset_bytes);
  tensor.device = {device.type, device.index};
  tensor.ndim = static_cast<std::int32_t>(exported->spec.shape.size());
  const auto item_bytes = static_cast<unsigned>(exported->spec.item_bytes);
  tensor.dtype = {item_bytes == 1 ? kUnsignedInteger : kSignedInteger,
                  static_cast<std::uint8_t>(item_bytes * 8U), 1};
  tensor.shape = exported->spec.shape.data();
  tensor.strides = exported->spec.strides.data();
  tensor.byte_offset = 0;
  exported->managed.context = exported.get();
  exported->managed.deleter = release_export;
  py::capsule capsule(&exported->managed, kFresh, drop_unused_capsule);
  (void)exported.release();  // the capsule owns it now
  return capsule;
}

}  // namespace vattention
