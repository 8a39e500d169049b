// A pool of extents under one budget, shared by the allocators that draw on it.
//
// Owns: the backend, every extent of its allocators, the free lists, the fences, the one lock and
// the one background thread (Mapper).
// Always true, under the lock: held_bytes <= budget_bytes; each extent that counts into held_bytes
// is free, owned by mappings, or carried by a Work in flight; free_bytes is what the free lists sum
// to. The lock is held over no call that waits for the GPU, but for those that put a fence or a
// wait into a stream: they wait while its queue is full.
//
// Threads: every public method of Pool and Allocator may be called from any thread. Methods that
// take a Lock expect the pool's own lock in it, held. Nobody waits for the lock with the GIL held:
// what fills a stream's queue may need the GIL to let it go on.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "backend/backend.h"
#include "core/errors.h"
#include "core/extent.h"
#include "core/patience.h"
#include "core/process.h"
#include "core/work.h"

namespace vattention {

class Allocator;
class Mapper;
struct Unmapping;

// What an allocator leaves whose last owner is gone: it goes back as soon as the device is done
// with all of it.
struct Remains {
  struct Part {
    Work::Range range;
    std::vector<Extent*> extents;  // one for each mapping in it, aliases too
    bool unmapped = false;
  };
  std::vector<Part> parts;
  Extent* guard = nullptr;
  Work::Range reservation{};  // at 0: there is none
  bool whole = true;          // whether nothing else is mapped in it
  bool quiet = true;          // whether the device is done with all of it
};

struct PoolConfig {
  std::size_t budget_bytes = 0;
  // Background: keep at least low_bytes free and created; give back what is free above high_bytes.
  std::size_t low_bytes = 0;
  std::size_t high_bytes = SIZE_MAX;
  std::size_t max_extent_bytes = 0;
  bool zero = true;        // clear memory before another owner, or the first, can read it
  bool background = true;  // run the mapper thread
};

struct PoolStats {
  std::size_t budget_bytes = 0;
  std::size_t held_bytes = 0;  // physical memory created at the driver
  std::size_t peak_held_bytes = 0;
  std::size_t free_bytes = 0;  // created, and behind nothing
  std::size_t mappings = 0;    // at the driver, aliases included
  std::uint64_t creates = 0;   // extents, ever
  std::uint64_t destroys = 0;
  std::uint64_t maps = 0;    // mappings, ever
  std::uint64_t unmaps = 0;  // unmap calls, ever
};

class Pool {
 public:
  using Lock = std::unique_lock<std::mutex>;

  // Throws ConfigError.
  [[nodiscard]] static std::shared_ptr<Pool> create(std::shared_ptr<Backend> backend,
                                                    const PoolConfig& config);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Throws OutOfPages, and changes nothing, where live sequences hold more than the new budget.
  void set_budget(std::size_t bytes);
  void set_watermarks(std::size_t low_bytes, std::size_t high_bytes);
  [[nodiscard]] PoolStats stats() const;
  // Unmaps what freed sequences left mapped and gives all free memory back to the driver. Waits
  // for the work that still uses it. Returns the bytes given back.
  std::size_t reclaim();
  // Throws std::logic_error where something that must always be true is not.
  void check() const;
  // The same where VATTENTION_DEBUG asks for it. With the lock held.
  void audit() const;
  // Ends the background thread; idempotent.
  void stop() noexcept;

  // ---- for Allocator and Mapper, all with the lock held ----

  // Throws Closed in a child of the process that made the pool.
  [[nodiscard]] Lock lock() const {
    if (inherited()) throw_inherited();
    return Lock(mutex_);
  }
  // A lock that is not held where somebody else has it.
  [[nodiscard]] Lock try_lock() const noexcept { return {mutex_, std::try_to_lock}; }
  // Whether this is a forked child of that process: nothing here may be touched then, not even to
  // destroy it.
  [[nodiscard]] bool inherited() const noexcept { return fork_count() != made_at_fork_; }
  [[nodiscard]] Backend& backend() const noexcept { return *backend_; }
  [[nodiscard]] std::size_t page_bytes() const noexcept { return page_bytes_; }
  [[nodiscard]] const PoolConfig& config() const noexcept { return config_; }
  // The order of extents of that size, which is at most the pool's largest. Throws ConfigError.
  [[nodiscard]] std::uint8_t order_of(std::size_t extent_bytes) const;

  // Bytes that could be mapped without unmapping anything first.
  [[nodiscard]] std::size_t available_bytes() const noexcept {
    return config_.budget_bytes - held_bytes_ + free_bytes_;
  }
  [[nodiscard]] std::size_t free_bytes() const noexcept { return free_bytes_; }
  // Bytes that giving up everything reclaimable would add.
  [[nodiscard]] std::size_t reclaimable_bytes() const;
  // Whether the driver can be expected to take that many more mappings.
  [[nodiscard]] bool has_mappings(std::size_t more) const noexcept;

  // Puts an extent into each piece (their `order`s are in `orders`): free ones of the size first,
  // then new ones, for which free ones of other sizes are given up where the budget is short.
  // Requires: the sizes sum to at most available_bytes(). Changes nothing where it throws.
  void take(Work& work, const std::vector<std::uint8_t>& orders);
  // After work.run(): books what became of everything it carried. Pieces that were built are
  // owned now; all others are back in the pool. Unmapped ranges are the caller's to book.
  void settle(const Work& work, bool built) noexcept;
  // One mapping less of the extent; the last one makes it free, and dirty.
  void release(Extent* extent) noexcept;
  // One owner less that was no mapping.
  void disown(Extent* extent) noexcept;
  // Gives back what an allocator leaves; called without the lock. Waits for the device unless it is
  // known to be done. While it cannot be waited for, as where a stream of it is being captured, all
  // is kept, and tried again where memory is wanted. What the driver will not unmap is left to the
  // process. Returns whether it is buried. One, in a list, so that keeping it cannot fail.
  bool bury(std::list<Remains> one) noexcept;
  // Tries again what could not be buried, of pools that are gone too; drops the lock meanwhile.
  // Returns whether any was.
  bool bury_again(Lock& lock) noexcept;
  // The same, of pools that are gone only; called without a lock.
  static bool bury_left_pools() noexcept;
  // As settle() does not know of it: a mapping of its own call that is gone.
  void count_unmapped() noexcept {
    --mappings_;
    ++counters_.unmaps;
  }

  // Between these, somebody carries extents without the lock.
  void begin_work() noexcept { ++working_; }
  void end_work() noexcept { --working_; }
  [[nodiscard]] bool working() const noexcept { return working_ > 0; }

  // Comes nearer to that many free bytes by giving up what is reclaimable, cheapest first; drops
  // the lock while the driver works. With patience it may wait for the GPU. Returns false when
  // it came no nearer; who needs more calls again.
  bool reclaim_some(Lock& lock, std::size_t bytes, Patience* patience);
  // Carries out a plan of unmappings whose fences have passed; drops the lock meanwhile. Throws
  // BackendFailure.
  void unmap_now(Lock& lock, Work& work, const std::vector<Unmapping>& unmappings) {
    require(unmap(lock, work, unmappings, false));
  }
  // Unmaps what is retired and whose fences have passed; drops the lock meanwhile. Returns whether
  // it came forward: what the driver refuses stays retired, and is tried again.
  bool collect(Lock& lock);
  // Gives idle memory above the high watermark back to the driver; drops the lock meanwhile.
  // Where there is a background thread, that does it.
  void keep_watermarks(Lock& lock);
  // Destroys free extents until at most keep_bytes are free, and no more of them than that takes;
  // drops the lock meanwhile. Returns the bytes given back. Throws BackendFailure.
  std::size_t shrink(Lock& lock, std::size_t keep_bytes);
  // Evicts what can be without waiting, and shrinks to nothing. Returns the bytes given back, and
  // in *refusal why the driver would not unmap some. Throws BackendFailure.
  std::size_t give_back_idle(Lock& lock, Status* refusal);

  [[nodiscard]] Fence borrow_fence();  // throws BackendFailure
  void return_fence(Fence fence) noexcept;
  // Of which the driver cannot say so, it has not.
  [[nodiscard]] bool has_passed(Fence fence) const noexcept;

  void attach(Allocator* allocator);
  void detach(Allocator* allocator, Lock& lock);

  // Wakes the background thread; does nothing without one.
  void wake_mapper() noexcept;
  // Wakes whoever waits for a busy slot or for memory.
  void announce() noexcept { changed_.notify_all(); }
  // Something was given up, or may be had: who waits for a fence looks again at what there is.
  void gain() noexcept { ++gains_; }
  [[nodiscard]] std::uint64_t gains() const noexcept { return gains_; }
  // While it lives, under the lock, the background thread neither refills the pool nor maps ahead.
  class GivingBack {
   public:
    explicit GivingBack(Pool& pool) noexcept : pool_(pool) { ++pool_.giving_back_; }
    ~GivingBack() {
      if (--pool_.giving_back_ == 0) pool_.wake_mapper();
    }
    GivingBack(const GivingBack&) = delete;
    GivingBack& operator=(const GivingBack&) = delete;

   private:
    Pool& pool_;
  };
  // Whether memory is on its way back to the driver by somebody's wish.
  [[nodiscard]] bool is_giving_back() const noexcept { return giving_back_ > 0; }
  [[nodiscard]] bool a_fence_passed();
  [[nodiscard]] Allocator* late_allocator() const noexcept;
  void wait_for_change(Lock& lock) { changed_.wait(lock); }

 private:
  friend class Mapper;
  class Use;
  Pool(std::shared_ptr<Backend> backend, const PoolConfig& config);
  [[noreturn]] static void throw_inherited();
  void require_a_page(std::size_t budget) const;
  // The last owner is gone. While something of it cannot be buried, the pool stays: with the
  // process, which tries again when it makes a pool or buries something.
  static bool end(Pool* pool) noexcept;
  bool bury_own_again(Lock& lock) noexcept;

  [[nodiscard]] std::size_t bytes(const Extent& extent) const noexcept {
    return extent.pages() * page_bytes_;
  }
  // So that as many new extents cannot fail.
  void reserve_records(std::size_t count);
  Extent* new_extent(std::uint8_t order) noexcept;
  void drop_extent(Extent* extent) noexcept;
  void put_free(Extent* extent) noexcept;
  void exchange(Work& work, std::size_t created_bytes) noexcept;
  [[nodiscard]] std::size_t count_free() const noexcept;
  std::size_t destroy_later(Work& work, ExtentStack& list) noexcept;
  void require(const Status& status) const;
  // Does work that touches no slot, without the lock, and books it.
  [[nodiscard]] Status run(Lock& lock, Work& work);
  bool refill(Lock& lock);
  [[nodiscard]] bool below_low() const noexcept {
    return !is_giving_back() && free_bytes_ < config_.low_bytes &&
           held_bytes_ + page_bytes_ <= config_.budget_bytes;
  }
  void lower(Lock& lock) noexcept;
  bool background_pass(Lock& lock, Stream stream);
  [[nodiscard]] bool waits_for_fences() const noexcept;
  struct Eviction {
    bool came_forward = false;
    Status refusal;  // of what the driver would not unmap
  };
  [[nodiscard]] Eviction evict(Lock& lock, std::size_t bytes);
  [[nodiscard]] std::size_t bytes_of(const Remains& remains) const noexcept;
  // What live sequences do not need now; that of it which may be in use waits for the device.
  std::size_t take_surplus(Lock& lock, std::size_t bytes, bool in_use);
  [[nodiscard]] Patience patience() const;
  [[nodiscard]] Status unmap(Lock& lock, Work& work, const std::vector<Unmapping>& unmappings,
                             bool synchronize);
  void check_locked() const;

  const std::uint64_t made_at_fork_ = fork_count();
  const std::shared_ptr<Backend> backend_;
  const std::size_t page_bytes_;
  const std::uint8_t max_order_;
  PoolConfig config_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::array<ExtentStack, kOrders> free_;
  std::vector<std::unique_ptr<Extent>> extents_;  // every record there is
  ExtentStack spare_records_;                     // records of no extent
  std::size_t held_bytes_ = 0;
  std::size_t peak_held_bytes_ = 0;
  std::size_t free_bytes_ = 0;
  std::size_t mappings_ = 0;
  std::size_t working_ = 0;
  std::size_t giving_back_ = 0;  // operations that do: the thread must not take it again meanwhile
  std::uint64_t gains_ = 0;
  std::size_t stuck_bytes_ = 0;  // behind mappings that the driver would not undo
  PoolStats counters_;
  std::vector<Fence> spare_fences_;  // with room for every fence there is
  std::size_t fences_ = 0;
  std::vector<Allocator*> allocators_;
  std::list<Remains> unburied_;
  Pool* next_left_ = nullptr;  // of the pools that are gone but for what cannot be buried
  std::unique_ptr<Mapper> mapper_;
};

}  // namespace vattention
