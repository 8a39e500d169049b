#include "backend/host.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <limits>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace vattention {
namespace {

constexpr std::int32_t kDlCpu = 1;
// Used where the kernel does not say; it is its default.
constexpr std::size_t kDefaultMaxMappings = 65'530;
constexpr auto kMaxFileBytes = static_cast<std::size_t>(std::numeric_limits<off_t>::max());

// Why a call is refused. Apart from errno's values, which are passed on as they are.
enum Refusal : int {
  kMisaligned = 10'000,
  kUnknownHandle,
  kWrongSize,
  kNotReserved,
  kAlreadyMapped,
  kPartOfMapping,
  kHole,
  kStillMapped,
  kUnknownFence,
  kNotWritable,
};

const char* refusal_text(int code) {
  switch (code) {
    case kMisaligned:
      return "the address or size is zero or not whole pages";
    case kUnknownHandle:
      return "there is no such handle";
    case kWrongSize:
      return "a handle is mapped whole, and the size is not the handle's";
    case kNotReserved:
      return "the range is not within one reservation";
    case kAlreadyMapped:
      return "something is mapped there already";
    case kPartOfMapping:
      return "the range ends within a mapping, which is undone or changed whole";
    case kHole:
      return "nothing is mapped in part of the range";
    case kStillMapped:
      return "something is still mapped in the reservation";
    case kUnknownFence:
      return "there is no such fence";
    case kNotWritable:
      return "the range is not mapped for writing";
    default:
      return nullptr;
  }
}

Status refuse(int code, const char* call) noexcept {
  const bool full = code == ENOMEM || code == ENOSPC || code == EFBIG;
  return {full ? Status::Kind::out_of_memory : Status::Kind::failed, code, call};
}

class HostBackend final : public Backend {
 public:
  explicit HostBackend(std::size_t page_bytes) : page_bytes_(page_bytes) {
    const auto system_page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    if (!std::has_single_bit(page_bytes) || page_bytes < system_page) {
      throw std::invalid_argument("page_bytes must be a power of two and at least the system's " +
                                  std::to_string(system_page) + ", not " +
                                  std::to_string(page_bytes));
    }
    file_ = memfd_create("vattention", MFD_CLOEXEC);
    if (file_ < 0) throw std::system_error(errno, std::generic_category(), "memfd_create");
    max_mappings_ = read_max_mappings();
  }

  ~HostBackend() override {
    for (const auto& [address, bytes] : reservations_) {
      (void)munmap(reinterpret_cast<void*>(address), bytes);
    }
    (void)close(file_);
  }

  [[nodiscard]] const char* name() const noexcept override { return "host"; }
  [[nodiscard]] std::size_t page_bytes() const noexcept override { return page_bytes_; }
  [[nodiscard]] DeviceId device() const noexcept override { return {kDlCpu, 0}; }
  [[nodiscard]] std::size_t max_mappings() const noexcept override { return max_mappings_; }
  // A hole in a file reads as zero, and a range is always a hole when it is handed out.
  [[nodiscard]] bool fresh_memory_is_zero() const noexcept override { return true; }

  [[nodiscard]] std::string describe(int code) const override {
    if (const char* text = refusal_text(code)) return "REFUSED: " + std::string(text);
    std::string text =
        std::generic_category().message(code) + " (errno " + std::to_string(code) + ")";
    if (code == ENOMEM) text += "; see vm.max_map_count if memory is left";
    return text;
  }

  Status memory_info(std::size_t* free_bytes, std::size_t* total_bytes) noexcept override {
    const auto system_page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    *total_bytes = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * system_page;
    *free_bytes = static_cast<std::size_t>(sysconf(_SC_AVPHYS_PAGES)) * system_page;
    // Better: with what the system would give up, such as cached files.
    if (std::FILE* file = std::fopen("/proc/meminfo", "re")) {
      std::array<char, 128> line{};
      std::size_t kib = 0;
      while (std::fgets(line.data(), line.size(), file) != nullptr) {
        if (std::sscanf(line.data(), "MemAvailable: %zu kB", &kib) == 1) *free_bytes = kib << 10;
      }
      (void)std::fclose(file);
    }
    return {};
  }

  Status reserve(std::size_t bytes, Address* address) noexcept override {
    if (!whole_pages(bytes)) return refuse(kMisaligned, "reserve");
    const std::lock_guard lock(mutex_);
    // The system aligns to its own page only: take more, and give back what lies outside.
    const std::size_t padded = bytes + page_bytes_;
    void* const range = mmap(nullptr, padded, PROT_NONE, kReserved, -1, 0);
    if (range == MAP_FAILED) return refuse(errno, "mmap");
    const auto start = reinterpret_cast<Address>(range);
    const Address aligned = (start + page_bytes_ - 1) & ~(page_bytes_ - 1);
    if (aligned > start) (void)munmap(range, aligned - start);
    const std::size_t behind = start + padded - (aligned + bytes);
    if (behind > 0) (void)munmap(reinterpret_cast<void*>(aligned + bytes), behind);
    try {
      reservations_.emplace(aligned, bytes);
    } catch (const std::bad_alloc&) {
      (void)munmap(reinterpret_cast<void*>(aligned), bytes);
      return refuse(ENOMEM, "reserve");
    }
    *address = aligned;
    return {};
  }

  Status unreserve(Address address, std::size_t bytes) noexcept override {
    const std::lock_guard lock(mutex_);
    const auto found = reservations_.find(address);
    if (found == reservations_.end() || found->second != bytes) {
      return refuse(kNotReserved, "unreserve");
    }
    const auto first = mappings_.lower_bound(address);
    if (first != mappings_.end() && first->first < address + bytes) {
      return refuse(kStillMapped, "unreserve");
    }
    if (munmap(reinterpret_cast<void*>(address), bytes) != 0) return refuse(errno, "munmap");
    reservations_.erase(found);
    return {};
  }

  Status create(std::size_t bytes, Handle* handle) noexcept override {
    if (!whole_pages(bytes)) return refuse(kMisaligned, "create");
    const std::lock_guard lock(mutex_);
    try {
      Extents& spare = spare_[bytes];  // there when this extent is destroyed
      if (!spare.empty()) {
        auto extent = spare.extract(std::prev(spare.end()));
        extent.key() = next_handle_;
        extent.mapped().destroyed = false;
        extents_.insert(std::move(extent));
      } else {
        if (bytes > kMaxFileBytes - file_bytes_) return refuse(EFBIG, "ftruncate");
        if (ftruncate(file_, static_cast<off_t>(file_bytes_ + bytes)) != 0) {
          return refuse(errno, "ftruncate");
        }
        extents_.emplace(next_handle_, Extent{file_bytes_, bytes, 0, false});
        file_bytes_ += bytes;
      }
    } catch (const std::bad_alloc&) {
      return refuse(ENOMEM, "create");
    }
    *handle = next_handle_++;
    return {};
  }

  Status destroy(Handle handle) noexcept override {
    const std::lock_guard lock(mutex_);
    const auto found = extents_.find(handle);
    if (found == extents_.end() || found->second.destroyed) {
      return refuse(kUnknownHandle, "destroy");
    }
    if (found->second.mappings == 0) return give_back(found);
    found->second.destroyed = true;  // with its last mapping
    return {};
  }

  Status map(Address address, std::size_t bytes, Handle handle) noexcept override {
    if (!whole_pages(address) || !whole_pages(bytes)) return refuse(kMisaligned, "map");
    const std::lock_guard lock(mutex_);
    const auto extent = extents_.find(handle);
    if (extent == extents_.end() || extent->second.destroyed) return refuse(kUnknownHandle, "map");
    if (bytes != extent->second.bytes) return refuse(kWrongSize, "map");
    if (!reserved(address, bytes)) return refuse(kNotReserved, "map");
    if (overlapping(address, bytes) != mappings_.end()) return refuse(kAlreadyMapped, "map");
    try {
      mappings_.emplace(address, Mapping{bytes, handle, Access::none});
    } catch (const std::bad_alloc&) {
      return refuse(ENOMEM, "map");
    }
    void* const place =
        mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, file_,
             static_cast<off_t>(extent->second.offset));
    if (place == MAP_FAILED) {
      const int code = errno;
      mappings_.erase(address);
      return refuse(code, "mmap");
    }
    ++extent->second.mappings;
    return {};
  }

  Status unmap(Address address, std::size_t bytes) noexcept override {
    if (!whole_pages(address) || !whole_pages(bytes)) return refuse(kMisaligned, "unmap");
    const std::lock_guard lock(mutex_);
    if (!reserved(address, bytes)) return refuse(kNotReserved, "unmap");
    const auto first = overlapping(address, bytes);
    if (!whole_mappings(first, address, bytes)) return refuse(kPartOfMapping, "unmap");
    if (mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, kReserved | MAP_FIXED, -1, 0) ==
        MAP_FAILED) {
      return refuse(errno, "mmap");
    }
    for (auto mapping = first; mapping != mappings_.end() && mapping->first < address + bytes;) {
      const auto extent = extents_.find(mapping->second.handle);
      if (--extent->second.mappings == 0 && extent->second.destroyed) (void)give_back(extent);
      mapping = mappings_.erase(mapping);
    }
    return {};
  }

  Status set_access(Address address, std::size_t bytes, Access access) noexcept override {
    if (!whole_pages(address) || !whole_pages(bytes)) return refuse(kMisaligned, "set_access");
    const std::lock_guard lock(mutex_);
    const auto first = overlapping(address, bytes);
    if (const Status status = covered(first, address, bytes, "set_access"); !status.ok()) {
      return status;
    }
    const int protection = access == Access::read_write ? PROT_READ | PROT_WRITE
                           : access == Access::read     ? PROT_READ
                                                        : PROT_NONE;
    if (mprotect(reinterpret_cast<void*>(address), bytes, protection) != 0) {
      return refuse(errno, "mprotect");
    }
    for (auto m = first; m != mappings_.end() && m->first < address + bytes; ++m) {
      m->second.access = access;
    }
    return {};
  }

  Status zero(Address address, std::size_t bytes, Stream) noexcept override {
    {
      const std::lock_guard lock(mutex_);
      if (!reserved(address, bytes)) return refuse(kNotReserved, "zero");
      const Address end = address + bytes;
      Address next = address;
      for (auto m = overlapping(address, bytes); m != mappings_.end() && m->first < end; ++m) {
        if (m->first > next) return refuse(kHole, "zero");
        if (m->second.access != Access::read_write) return refuse(kNotWritable, "zero");
        next = m->first + m->second.bytes;
      }
      if (next < end) return refuse(kHole, "zero");
    }
    std::memset(reinterpret_cast<void*>(address), 0, bytes);
    return {};
  }

  // All work is done when the call that asks for it returns, so streams and fences are names only.
  Status create_stream(Stream* stream) noexcept override {
    const std::lock_guard lock(mutex_);
    *stream = ++streams_;
    return {};
  }
  Status synchronize(Stream) noexcept override { return {}; }
  Status synchronize_device() noexcept override { return {}; }

  Status create_fence(Fence* fence) noexcept override {
    const std::lock_guard lock(mutex_);
    try {
      fences_.insert(next_fence_);
    } catch (const std::bad_alloc&) {
      return refuse(ENOMEM, "create_fence");
    }
    *fence = next_fence_++;
    return {};
  }

  Status destroy_fence(Fence fence) noexcept override {
    const std::lock_guard lock(mutex_);
    return fences_.erase(fence) == 1 ? Status{} : refuse(kUnknownFence, "destroy_fence");
  }

  Status record(Fence fence, Stream) noexcept override {
    const std::lock_guard lock(mutex_);
    return fences_.contains(fence) ? Status{} : refuse(kUnknownFence, "record");
  }

  Status wait(Stream, Fence fence) noexcept override {
    const std::lock_guard lock(mutex_);
    return fences_.contains(fence) ? Status{} : refuse(kUnknownFence, "wait");
  }

  Status query(Fence fence, bool* passed) noexcept override {
    const std::lock_guard lock(mutex_);
    if (!fences_.contains(fence)) return refuse(kUnknownFence, "query");
    *passed = true;
    return {};
  }

 private:
  static constexpr int kReserved = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

  struct Extent {
    std::size_t offset;  // in the file
    std::size_t bytes;
    std::size_t mappings;
    bool destroyed;  // gone with its last mapping
  };
  struct Mapping {
    std::size_t bytes;
    Handle handle;
    Access access;
  };
  using Mappings = std::map<Address, Mapping>;
  using Extents = std::map<Handle, Extent>;

  static std::size_t read_max_mappings() {
    std::size_t limit = kDefaultMaxMappings;
    if (std::FILE* file = std::fopen("/proc/sys/vm/max_map_count", "re")) {
      if (std::fscanf(file, "%zu", &limit) != 1) limit = kDefaultMaxMappings;
      (void)std::fclose(file);
    }
    return limit - limit / 10;  // the rest of the process needs some
  }

  [[nodiscard]] bool whole_pages(std::size_t value) const noexcept {
    return value != 0 && value % page_bytes_ == 0;
  }

  [[nodiscard]] bool reserved(Address address, std::size_t bytes) const noexcept {
    auto after = reservations_.upper_bound(address);
    if (after == reservations_.begin()) return false;
    const auto& [start, size] = *std::prev(after);
    return address - start <= size && bytes <= size - (address - start);
  }

  // The first mapping that shares a byte with the range, or end().
  [[nodiscard]] Mappings::iterator overlapping(Address address, std::size_t bytes) noexcept {
    auto mapping = mappings_.lower_bound(address);
    if (mapping != mappings_.begin()) {
      const auto before = std::prev(mapping);
      if (before->first + before->second.bytes > address) return before;
    }
    if (mapping != mappings_.end() && mapping->first >= address + bytes) return mappings_.end();
    return mapping;
  }

  [[nodiscard]] bool whole_mappings(Mappings::iterator first, Address address,
                                    std::size_t bytes) const noexcept {
    for (auto m = first; m != mappings_.end() && m->first < address + bytes; ++m) {
      if (m->first < address || m->first + m->second.bytes > address + bytes) return false;
    }
    return true;
  }

  [[nodiscard]] Status covered(Mappings::iterator first, Address address, std::size_t bytes,
                               const char* call) const noexcept {
    if (!whole_mappings(first, address, bytes)) return refuse(kPartOfMapping, call);
    Address next = address;
    for (auto m = first; m != mappings_.end() && m->first < address + bytes; ++m) {
      if (m->first != next) return refuse(kHole, call);
      next = m->first + m->second.bytes;
    }
    return next == address + bytes ? Status{} : refuse(kHole, call);
  }

  // Its record moves as it is, so that this needs no memory.
  Status give_back(Extents::iterator extent) noexcept {
    const Extent& range = extent->second;
    if (fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  static_cast<off_t>(range.offset), static_cast<off_t>(range.bytes)) != 0) {
      return refuse(errno, "fallocate");
    }
    spare_.find(range.bytes)->second.insert(extents_.extract(extent));
    return {};
  }

  const std::size_t page_bytes_;
  std::size_t max_mappings_ = 0;
  int file_ = -1;
  std::mutex mutex_;
  std::size_t file_bytes_ = 0;
  std::map<Address, std::size_t> reservations_;
  Mappings mappings_;
  Extents extents_;
  std::map<std::size_t, Extents> spare_;  // by size; holes of the file
  std::set<Fence> fences_;
  Handle next_handle_ = 1;
  Fence next_fence_ = 1;
  Stream streams_ = 0;
};

}  // namespace

std::shared_ptr<Backend> make_host_backend(std::size_t page_bytes) {
  return std::make_shared<HostBackend>(page_bytes);
}

}  // namespace vattention
