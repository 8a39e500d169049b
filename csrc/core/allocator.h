// Contiguous virtual memory for the sequences of one model, backed as they grow.
//
// Owns: one reservation; the slots in it; which extent is mapped where. A region is an array of
// slots with one row per token; a layout has one or more regions, all indexed by the same slot.
// Always true, under the pool's lock: what a live sequence may touch, tokens [first_token, length),
// is mapped, cleared and its own; no memory leaves a slot, or is given to another sequence, before
// the fence that was recorded when its last owner gave it up has passed; a busy slot (one that a
// Work in flight touches) is changed by nobody else; an operation that throws has changed no
// length, no live mapping and no budget (what freed sequences left behind may have been given up).
//
// Streams: `stream` is where the caller's kernels run. Memory is ready for work enqueued there
// after the call, and free() and trim() must be called after the last use was enqueued there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "core/patience.h"
#include "core/pool.h"
#include "core/run.h"

namespace vattention {

struct RegionConfig {
  std::size_t offset_bytes = 0;       // from the start of the reservation, whole pages
  std::size_t slot_stride_bytes = 0;  // whole pages
  std::size_t row_bytes = 0;          // from one token to the next
};

struct AllocatorConfig {
  std::vector<RegionConfig> regions;
  std::size_t reserved_bytes = 0;
  std::size_t max_extent_bytes = 0;
  std::uint32_t max_sequences = 0;
  std::int64_t max_seq_len = 0;
  std::int64_t tail_slack_tokens = 0;
  std::size_t guard_pages = 0;  // room behind each slot's last page, for guards
  std::int64_t lookahead_tokens = 0;
  std::int64_t fence_timeout_ms = 0;
};

// A sequence's name: stale as soon as the sequence is freed.
struct SequenceId {
  std::uint32_t slot = 0;
  std::uint64_t generation = 0;
};

struct AllocatorStats {
  std::size_t reserved_bytes = 0;
  std::size_t live_bytes = 0;     // mapped behind live sequences
  std::size_t cached_bytes = 0;   // mapped behind freed slots, and reusable now
  std::size_t retired_bytes = 0;  // given up, the GPU may not be done with it
  std::size_t surplus_bytes = 0;  // of live_bytes: whole extents beyond what the lengths need
  std::size_t guard_bytes = 0;    // the shared extent behind short sequences, once
  std::size_t live_sequences = 0;
  std::size_t free_slots = 0;
  std::int64_t live_tokens = 0;
  std::uint64_t steps = 0;
  std::uint64_t waited_steps = 0;    // those that mapped, or waited for that or a clearing
  std::uint64_t ahead_mappings = 0;  // made by the background thread
  std::uint64_t ahead_failures = 0;
  std::uint64_t adoptions = 0;
};

// One mapping, for looking from outside.
struct MappingInfo {
  std::uint32_t slot;
  std::uint32_t region;
  Address address;
  std::size_t bytes;
  Handle handle;
  Access access;
};

// One run's part of an unmapping; the range in the work has the same index.
struct Unmapping {
  Allocator* owner;
  std::uint32_t slot;
  std::uint32_t region;
  std::size_t first;  // mappings from this index of the run's on
  Fence retired;      // or, where it is not 0, the cut of the retired entry with this fence
};

class Allocator {
 public:
  // Throws ConfigError, BackendFailure, OutOfPages (for the guard).
  Allocator(std::shared_ptr<Pool> pool, AllocatorConfig config);
  ~Allocator();
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  // `count` sequences of that many tokens; their slots are consecutive and ascending. How many
  // tokens a single one is expected to get decides, if it is more, which slot's memory fits best;
  // until a sequence is longer than that, nothing is mapped for more.
  // Throws OutOfSlots, OutOfPages, SequenceTooLong, BackendFailure.
  [[nodiscard]] std::vector<SequenceId> allocate(std::size_t count, std::int64_t tokens,
                                                 Stream stream, std::int64_t expected_tokens = 0);

  // lengths[slot] is the slot's length after the step; 0 leaves the slot alone.
  // The whole step, if nothing is to be mapped, nothing is wrong and nobody has the pool's lock;
  // else false and no change.
  [[nodiscard]] bool try_step(const std::int64_t* lengths, std::size_t count) noexcept;
  // Any step. Throws StaleSequence, SequenceTooLong, ConfigError, OutOfPages, BackendFailure.
  void step(const std::int64_t* lengths, std::size_t count, Stream stream);
  void step(const std::vector<std::pair<SequenceId, std::int64_t>>& lengths, Stream stream);

  // The sequence keeps its first `tokens` tokens.
  void trim(SequenceId id, std::int64_t tokens, Stream stream);
  // Tokens below first_token are not needed any more: their memory goes back.
  void trim_front(SequenceId id, std::int64_t first_token, Stream stream);
  void free(SequenceId id, Stream stream);

  [[nodiscard]] std::int64_t length(SequenceId id) const;
  [[nodiscard]] bool alive(SequenceId id) const;
  [[nodiscard]] AllocatorStats stats() const;
  [[nodiscard]] std::vector<MappingInfo> mappings() const;
  // Throws std::logic_error where something that must always be true is not.
  void check() const;

  // Ends every sequence; further calls throw. The memory goes back when the last owner of this
  // object, which may be a tensor, is gone.
  void close();
  // A tensor of its memory goes. After close() it may have been read until now, on any stream.
  void note_outlived() noexcept;

  [[nodiscard]] Address base() const noexcept { return base_; }
  [[nodiscard]] Pool& pool() const noexcept { return *pool_; }

 private:
  friend class Pool;

  enum class SlotState : std::uint8_t {
    empty,   // nothing mapped
    live,    // a sequence has it
    cached,  // freed, still mapped; adoptable once its fence has passed
    broken,  // something is mapped in it that the driver would not undo
  };
  // Mappings cut off a run and not yet unmapped: pages [first, last), and a guard behind them.
  struct Cut {
    std::uint32_t region;
    bool guarded;
    std::vector<Mapping> mappings;  // not empty

    [[nodiscard]] std::size_t first() const noexcept { return mappings.front().page; }
    [[nodiscard]] std::size_t last() const noexcept {
      return mappings.back().page + mappings.back().extent->pages();
    }
  };
  // Entries of a slot are unmapped first in, first out, so that what is left of a tail always
  // touches the run's end.
  struct Retired {
    Fence fence;
    bool tail;  // behind the run's end, where growth would want to map again
    std::vector<Cut> cuts;
  };
  struct Slot {
    SlotState state = SlotState::empty;
    bool busy = false;           // a Work in flight touches it
    bool fence_pending = false;  // cached: the fence has not been seen to pass
    bool refused = false;        // cached: the driver would not unmap it when it was last asked
    Fence fence = 0;
    // Behind the last clearing that was enqueued on a caller's stream, and that stream: another
    // stream's fence says nothing of it, and in another thread its handle may name another stream.
    Fence cleared = 0;
    Stream cleared_on = 0;
    std::thread::id cleared_by;
    bool clearing = false;   // it has been recorded, and not been seen to pass
    bool tail_back = false;  // part of a run is what a trim cut off; `cleared` is behind that too
    bool trimmed = false;    // kernels may read behind the sequence's tokens
    std::uint64_t generation = 0;
    std::uint64_t freed_at = 0;
    std::int64_t first_token = 0;
    std::int64_t claimed = 0;   // the length that an operation under way is to give it
    std::int64_t expected = 0;  // how long the sequence is said to get; 0: nobody knows
    std::vector<Run> runs;      // one per region
    std::vector<Retired> retired;
  };
  struct Target {
    std::uint32_t slot;
    std::int64_t tokens;
  };
  // One run's part of a growth.
  struct Change {
    std::uint32_t slot;
    std::uint32_t region;
    std::size_t front;  // where the run begins
    std::size_t from;   // pages [from, to) are to be mapped
    std::size_t to;
    std::size_t clean_to;  // pages below it are to be clean
    bool remove_guard;
    bool add_guard;
    std::size_t pieces = 0;  // how many of the work's pieces are this change's
  };
  struct Growth {
    std::vector<Change> changes;
    std::vector<std::uint8_t> orders;
    std::size_t bytes = 0;
    std::size_t mappings = 0;
    bool removes_guard = false;
    std::uint64_t gains = 0;  // the pool's, when it was carried out and not yet booked
  };
  enum class Generosity : std::uint8_t { exact, rounded, ahead };

  using Lock = Pool::Lock;

  // Arithmetic.
  [[nodiscard]] std::size_t pages_for(std::uint32_t region, std::int64_t tokens) const noexcept;
  [[nodiscard]] std::int64_t tokens_in(std::uint32_t region, std::size_t pages) const noexcept;
  [[nodiscard]] Address page_address(std::uint32_t slot, std::uint32_t region,
                                     std::size_t page) const noexcept;
  [[nodiscard]] std::size_t mapped_pages(const Slot& slot) const noexcept;
  [[nodiscard]] std::int64_t mapped_tokens(const Slot& slot) const noexcept;
  // The page from which on a run is surplus to a sequence that may grow by that many tokens.
  [[nodiscard]] std::size_t surplus_from(std::uint32_t slot, std::uint32_t region,
                                         std::int64_t growth_tokens) const noexcept;
  [[nodiscard]] std::int64_t most_tokens(std::uint32_t slot, std::int64_t tokens) const noexcept;
  void refresh(std::uint32_t slot) noexcept;
  // For growth that is to come.
  void wake_mapper() noexcept;
  // Until it is refreshed, no growth of the slot's sequence is ready: what it would use is going.
  void hold_back(std::uint32_t slot) noexcept;
  [[nodiscard]] static bool has_retired_tail(const Slot& slot) noexcept;

  [[nodiscard]] Backend& backend() const noexcept { return pool_->backend(); }
  void require_open() const;
  [[nodiscard]] bool is_live(SequenceId id) const noexcept;
  [[nodiscard]] Slot& require_live(SequenceId id);
  void require_length(std::int64_t tokens) const;
  void wait_idle(Lock& lock, std::uint32_t slot);

  // A step that needs nothing; else false and no change.
  [[nodiscard]] bool step_idly(const std::int64_t* lengths, std::size_t count) noexcept;

  // Slots.
  [[nodiscard]] bool quiescent(Slot& slot);
  [[nodiscard]] std::int64_t pick_slot(std::int64_t tokens);
  [[nodiscard]] std::int64_t pick_slots(std::uint32_t count);
  // Where a sliding window has left only the end of some of these slots mapped, unmaps that; drops
  // the lock meanwhile. Returns whether anything was done. Throws BackendFailure.
  bool vacate_holed(Lock& lock, std::uint32_t first, std::uint32_t count);
  [[nodiscard]] std::size_t late_slots();
  [[noreturn]] void throw_out_of_slots(std::size_t wanted);
  [[nodiscard]] bool usable(Slot& slot);
  [[nodiscard]] bool any_fence_pending() const noexcept;
  [[nodiscard]] bool a_fence_passed();
  // Throws BackendFailure where the driver cannot say whether a fence has passed: no wait would
  // end.
  void require_answers() const;
  [[nodiscard]] Patience patience() const;
  bool wait_for_a_fence(Lock& lock, Patience& patience);

  // Growth (growth.cpp).
  // `readers`: whether kernels on the stream may be reading behind the targets' tokens.
  void grow(Lock& lock, const std::vector<Target>& targets, Stream stream, bool readers,
            Patience& patience);
  [[nodiscard]] bool any_busy(const std::vector<Target>& targets) const noexcept;
  [[nodiscard]] Growth plan(const std::vector<Target>& targets, Generosity generosity) const;
  void plan_run(Growth& growth, const Target& target, std::uint32_t region,
                Generosity generosity) const;
  [[nodiscard]] Work prepare(Growth& growth, Stream stream);
  void commit(const Growth& growth, const Work& work, bool built);
  enum class Caller : std::uint8_t { mapper, allocation, step };
  Status execute(Lock& lock, Growth& growth, Stream stream, Caller caller);
  [[noreturn]] void throw_out_of_pages(std::size_t needed, std::size_t free,
                                       const std::string& why) const;
  [[noreturn]] void throw_device_full(std::size_t needed, const Status& status) const;
  bool map_ahead(Lock& lock, Stream stream);
  [[nodiscard]] std::size_t guard_count() const noexcept {
    return guard_ == nullptr ? 0 : config_.guard_pages / guard_->pages();
  }
  void take_back_tails(Slot& slot, Stream stream);
  // The slot's sequence is lost: the driver has left it in an unknown state.
  void give_up(std::uint32_t slot) noexcept;
  Status record_clearings(const Growth& growth, Stream stream) noexcept;
  void note_clearing(Slot& slot, Stream stream) noexcept;
  void make_guard(Lock& lock);

  // Giving up (reclaim.cpp). The plans append to work.unmaps and unmappings alike.
  [[nodiscard]] static bool holed(const Slot& slot) noexcept;
  // Everything in a slot; returns the bytes.
  std::size_t unmap_slot_later(Work& work, std::vector<Unmapping>& unmappings, std::uint32_t slot);
  std::size_t plan_eviction(Work& work, std::vector<Unmapping>& unmappings, std::size_t bytes,
                            bool refused);
  void plan_retired(Work& work, std::vector<Unmapping>& unmappings);
  std::size_t plan_surplus(Work& work, std::vector<Unmapping>& unmappings, std::size_t bytes,
                           bool in_use);
  // The driver would not unmap the freed slot: others are tried first.
  void note_refused(std::uint32_t slot) noexcept;
  void finish_unmapping(const Unmapping& unmapping);
  void release_guard();  // one behind a run
  // A freed slot that has nothing left is empty.
  void settle_cached(Slot& slot) const noexcept;
  void unmap_later(Work& work, std::vector<Unmapping>& unmappings, std::uint32_t slot,
                   std::uint32_t region, std::size_t first);
  // Puts one fence behind the work on the stream and moves what `copy` copies of each run to a
  // retired entry of the slot; `remove` takes it off the run. Changes nothing where it throws.
  template <typename Copy, typename Remove>
  void retire(Slot& slot, bool tail, const std::vector<std::uint32_t>& regions, Stream stream,
              Copy copy, Remove remove) {
    if (regions.empty()) return;
    slot.retired.reserve(slot.retired.size() + 1);
    Retired retired{0, tail, {}};
    for (const std::uint32_t region : regions) retired.cuts.push_back(copy(region));
    retired.fence = record_fence(slot, stream);
    for (const Cut& cut : retired.cuts) remove(slot.runs[cut.region], cut);
    slot.retired.push_back(std::move(retired));
    ++retired_entries_;
  }
  // Orders the stream behind what clears the slot's memory.
  void follow_clearing(Slot& slot, Stream stream);
  void await_clearing(const Slot& slot, Stream stream) const;
  [[nodiscard]] bool is_clearing(Slot& slot);
  void note_cleared(Slot& slot) noexcept;
  // A fence behind all that was enqueued on the stream, and behind what clears the slot's memory.
  [[nodiscard]] Fence record_fence(Slot& slot, Stream stream);
  void collect_retired(Lock& lock);
  [[nodiscard]] std::size_t reclaimable_bytes() const;
  [[nodiscard]] std::size_t cached_bytes() const;
  // Adds to *owners how many mappings refer to each extent.
  void check_locked(std::map<const Extent*, std::size_t>* owners) const;
  void audit() const { pool_->audit(); }
  [[nodiscard]] bool is_quiet(Slot& slot);
  void tear_down() noexcept;

  const std::shared_ptr<Pool> pool_;
  const AllocatorConfig config_;
  const std::size_t page_bytes_;
  const std::uint8_t max_order_;
  Address base_ = 0;
  bool closed_ = false;
  bool outlived_ = false;  // by a tensor, after close()
  std::size_t users_ = 0;  // those working on this object without the lock
  Extent* guard_ = nullptr;
  std::vector<Slot> slots_;
  // By slot, apart from Slot so that an idle step reads three arrays and nothing else.
  std::vector<std::int64_t> lengths_;
  std::vector<std::int64_t> ready_;  // the length that needs no work; 0 where there is no sequence
  std::vector<std::int64_t> soft_;   // the length above which the mapper is woken
  std::uint64_t clock_ = 0;
  std::size_t retired_entries_ = 0;  // over all slots
  std::size_t clearing_slots_ = 0;
  std::optional<std::uint64_t> full_at_;  // the pool's gains when the mapper last found no room
  AllocatorStats counters_;
};

}  // namespace vattention
