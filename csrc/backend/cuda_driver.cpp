#include "backend/cuda_driver.h"

#include <dlfcn.h>

namespace vattention::cuda {
namespace {

struct Loaded {
  Driver driver;
  bool usable = false;
  int code = 0;
  std::string why;
};

Loaded open_driver() {
  Loaded loaded;
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    loaded.why = std::string("the CUDA driver could not be opened (") +
                 (reason != nullptr ? reason : "libcuda.so.1") +
                 "): install an NVIDIA driver, or use device=\"cpu\" for the host backend";
    return loaded;
  }
#define VATTENTION_LOAD(member, symbol, parameters)                                              \
  loaded.driver.member =                                                                         \
      reinterpret_cast<decltype(loaded.driver.member)>(dlsym(library, #symbol));                 \
  if (loaded.driver.member == nullptr) {                                                         \
    loaded.why = "the CUDA driver has no " #symbol ": a driver of CUDA 11.4 or newer is needed"; \
    return loaded;                                                                               \
  }
  VATTENTION_CUDA_SYMBOLS(VATTENTION_LOAD)
#undef VATTENTION_LOAD

  loaded.code = loaded.driver.init(0);
  if (loaded.code != kSuccess) {
    loaded.why = "cuInit failed with " + loaded.driver.describe(loaded.code) +
                 ": check that nvidia-smi sees a GPU, or use device=\"cpu\" for the host backend";
    return loaded;
  }
  loaded.usable = true;
  return loaded;
}

}  // namespace

const Driver* Driver::load(std::string* why, int* code) {
  static const Loaded loaded = open_driver();
  if (loaded.usable) return &loaded.driver;
  *why = loaded.why;
  *code = loaded.code;
  return nullptr;
}

std::string Driver::describe(Result code) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (error_name(code, &name) != kSuccess || name == nullptr) name = "unknown CUDA error";
  if (error_string(code, &text) != kSuccess || text == nullptr) text = "no description";
  return std::string(name) + " (" + std::to_string(code) + "): " + text;
}

}  // namespace vattention::cuda
