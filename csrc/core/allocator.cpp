// Slots and sequences. Growth is in growth.cpp, giving memory up in reclaim.cpp.
#include "core/allocator.h"

#include <algorithm>
#include <limits>
#include <string>
#include <thread>
#include <utility>

#include "core/errors.h"
#include "core/trace.h"

namespace vattention {
namespace {

constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

}  // namespace

Allocator::Allocator(std::shared_ptr<Pool> pool, AllocatorConfig config)
    : pool_(std::move(pool)),
      config_(std::move(config)),
      page_bytes_(pool_->page_bytes()),
      max_order_(pool_->order_of(config_.max_extent_bytes)) {
  if (config_.regions.empty() || config_.max_sequences == 0 || config_.max_seq_len <= 0) {
    throw ConfigError("an allocator needs a region, a sequence and a token at least");
  }
  {
    const Lock lock = pool_->lock();
  }  // throws in a forked child, where nothing may be touched
  slots_.resize(config_.max_sequences);
  for (Slot& slot : slots_) slot.runs.resize(config_.regions.size());
  lengths_.resize(config_.max_sequences, 0);
  ready_.resize(config_.max_sequences, 0);
  soft_.resize(config_.max_sequences, kNever);
  if (const Status status = backend().reserve(config_.reserved_bytes, &base_); !status.ok()) {
    throw BackendFailure(std::string(status.call) + " failed to reserve " +
                             human_bytes(config_.reserved_bytes) + " of addresses with " +
                             backend().describe(status.code) +
                             ": use a smaller max_seq_len, or fewer max_sequences",
                         status.call, status.code);
  }
  try {
    Lock lock = pool_->lock();
    if (config_.tail_slack_tokens > 0) make_guard(lock);
    pool_->attach(this);
  } catch (...) {
    tear_down();
    throw;
  }
  trace(1, "reserve", config_.reserved_bytes);
}

Allocator::~Allocator() {
  if (pool_->inherited()) return;
  {
    Lock lock = pool_->lock();
    pool_->detach(this, lock);
    pool_->begin_work();  // what it holds is nobody's until it is torn down
  }
  tear_down();
  const Lock lock = pool_->lock();
  pool_->end_work();
  pool_->announce();
}

void Allocator::require_open() const {
  if (closed_) throw Closed("the allocator is closed: make a new one");
}

bool Allocator::alive(SequenceId id) const {
  const Lock lock = pool_->lock();
  return !closed_ && is_live(id);
}

bool Allocator::is_live(SequenceId id) const noexcept {
  return id.slot < slots_.size() && slots_[id.slot].state == SlotState::live &&
         slots_[id.slot].generation == id.generation;
}

Allocator::Slot& Allocator::require_live(SequenceId id) {
  require_open();
  if (!is_live(id)) {
    throw StaleSequence("the sequence in slot " + std::to_string(id.slot) +
                        " has been freed: allocate a new one");
  }
  return slots_[id.slot];
}

void Allocator::require_length(std::int64_t tokens) const {
  if (tokens < 0) {
    throw ConfigError("a sequence cannot have " + std::to_string(tokens) + " tokens");
  }
  if (tokens > config_.max_seq_len) {
    throw SequenceTooLong(std::to_string(tokens) + " tokens do not fit in a slot of " +
                          std::to_string(config_.max_seq_len) +
                          ": make the allocator with a larger max_seq_len (addresses are free)");
  }
}

void Allocator::wait_idle(Lock& lock, std::uint32_t slot) {
  while (slots_[slot].busy) pool_->wait_for_change(lock);
}

// ---- arithmetic ----

std::size_t Allocator::pages_for(std::uint32_t region, std::int64_t tokens) const noexcept {
  const auto kept =
      static_cast<std::size_t>(std::clamp<std::int64_t>(tokens, 0, config_.max_seq_len));
  return (kept * config_.regions[region].row_bytes + page_bytes_ - 1) / page_bytes_;
}

std::int64_t Allocator::tokens_in(std::uint32_t region, std::size_t pages) const noexcept {
  const std::size_t tokens = pages * page_bytes_ / config_.regions[region].row_bytes;
  return std::min(static_cast<std::int64_t>(tokens), config_.max_seq_len);
}

Address Allocator::page_address(std::uint32_t slot, std::uint32_t region,
                                std::size_t page) const noexcept {
  const RegionConfig& r = config_.regions[region];
  return base_ + r.offset_bytes + slot * r.slot_stride_bytes + page * page_bytes_;
}

std::size_t Allocator::mapped_pages(const Slot& slot) const noexcept {
  std::size_t pages = 0;
  for (const Run& run : slot.runs) pages += run.pages();
  return pages;
}

// How long a sequence the slot holds without a driver call; what a hole at its front costs is not
// counted.
std::int64_t Allocator::mapped_tokens(const Slot& slot) const noexcept {
  std::int64_t tokens = config_.max_seq_len;
  for (std::uint32_t r = 0; r < slot.runs.size(); ++r) {
    tokens = std::min(tokens, slot.runs[r].empty() ? 0 : tokens_in(r, slot.runs[r].end));
  }
  return tokens;
}

// Recomputes up to which length the slot's sequence needs no work, and from which one on the mapper
// has some: guards, and so what lies behind them, it leaves to the steps.
void Allocator::refresh(std::uint32_t index) noexcept {
  const Slot& slot = slots_[index];
  if (slot.state != SlotState::live || closed_) {
    ready_[index] = 0;
    soft_[index] = kNever;
    return;
  }
  std::int64_t ready = config_.max_seq_len;
  std::int64_t growable = config_.max_seq_len;  // the same, of what the mapper can do more for
  for (std::uint32_t r = 0; r < slot.runs.size(); ++r) {
    const Run& run = slot.runs[r];
    const std::size_t clean = std::min(run.end, run.clean_end);
    const bool guarded = run.guarded && clean == run.end;
    std::int64_t tokens = tokens_in(r, clean);
    const std::size_t cover = guarded ? run.end + config_.guard_pages : clean;
    if (config_.tail_slack_tokens > 0 && cover < pages_for(r, config_.max_seq_len)) {
      const auto rows =
          static_cast<std::int64_t>(cover * page_bytes_ / config_.regions[r].row_bytes);
      tokens = std::min(tokens, std::max<std::int64_t>(0, rows - config_.tail_slack_tokens));
    }
    ready = std::min(ready, tokens);
    if (!guarded) growable = std::min(growable, tokens);
  }
  ready_[index] = ready;
  if (growable >= config_.max_seq_len || config_.lookahead_tokens == 0) {
    soft_[index] = kNever;
    return;
  }
  soft_[index] = std::max<std::int64_t>(0, growable - config_.lookahead_tokens);
  // What it is expected to need is there: no more until it is longer than that.
  if (slot.expected > 0 && growable >= slot.expected) {
    soft_[index] = std::max(soft_[index], slot.expected);
  }
}

// Where it has found no room, there is none before something is gained.
void Allocator::wake_mapper() noexcept {
  if (full_at_ != pool_->gains()) pool_->wake_mapper();
}

// The length up to which a sequence of so many tokens may have memory ahead of its needs.
std::int64_t Allocator::most_tokens(std::uint32_t slot, std::int64_t tokens) const noexcept {
  const std::int64_t expected = slots_[slot].expected;
  return expected > 0 && tokens <= expected ? expected : config_.max_seq_len;
}

void Allocator::hold_back(std::uint32_t index) noexcept {
  ready_[index] = std::min(ready_[index], lengths_[index]);
}

// What of a run the sequence may need: its tokens, its slack, and its growth.
std::size_t Allocator::surplus_from(std::uint32_t slot, std::uint32_t region,
                                    std::int64_t growth_tokens) const noexcept {
  const std::int64_t length = std::max(lengths_[slot], slots_[slot].claimed);
  const std::int64_t beyond = length == 0 ? 0 : config_.tail_slack_tokens;
  return pages_for(region, length + beyond + growth_tokens);
}

// ---- slots ----

// Whether the fence of a freed slot has passed and nothing of it waits to be unmapped.
bool Allocator::quiescent(Slot& slot) {
  if (!slot.retired.empty()) return false;
  if (!slot.fence_pending) return true;
  if (!pool_->has_passed(slot.fence)) return false;
  slot.fence_pending = false;
  note_cleared(slot);  // what the fence was put behind has passed with it
  pool_->return_fence(std::exchange(slot.fence, 0));
  pool_->gain();
  return true;
}

bool Allocator::usable(Slot& slot) {
  if (slot.busy) return false;
  return slot.state == SlotState::empty || (slot.state == SlotState::cached && quiescent(slot));
}

// The slot whose memory fits best, or -1. Best is the smallest that holds all the tokens, unless
// that would tie up more than twice their need; then the largest that holds fewer; then an empty
// one; then one whose memory is in the wrong place; then whatever there is.
std::int64_t Allocator::pick_slot(std::int64_t tokens) {
  std::int64_t fits = -1;
  std::int64_t smaller = -1;
  std::int64_t empty = -1;
  std::int64_t misplaced = -1;
  std::size_t fits_pages = 0;
  std::int64_t smaller_tokens = 0;
  for (std::uint32_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    if (!usable(slot)) continue;
    if (slot.state == SlotState::empty) {
      if (empty < 0) empty = i;
      continue;
    }
    if (holed(slot)) {
      if (misplaced < 0) misplaced = i;
      continue;
    }
    const std::int64_t held = mapped_tokens(slot);
    const std::size_t pages = mapped_pages(slot);
    if (held >= tokens && (fits < 0 || pages < fits_pages)) {
      fits = i;
      fits_pages = pages;
    } else if (held < tokens && (smaller < 0 || held > smaller_tokens)) {
      smaller = i;
      smaller_tokens = held;
    }
  }
  std::size_t needed_pages = 0;
  for (std::uint32_t r = 0; r < config_.regions.size(); ++r) needed_pages += pages_for(r, tokens);
  // A page a region of slack, so that rounding alone never rules a slot out.
  // Of a sequence that is still empty nobody knows what it will need.
  const bool wasteful = tokens > 0 && fits_pages > 2 * needed_pages + config_.regions.size();
  if (fits >= 0 && !wasteful) return fits;
  if (smaller >= 0) return smaller;
  if (empty >= 0) return empty;
  return misplaced >= 0 ? misplaced : fits;
}

// The first of `count` usable slots in a row, or -1; of several such places the one with most
// memory in it.
std::int64_t Allocator::pick_slots(std::uint32_t count) {
  std::int64_t best = -1;
  std::size_t best_pages = 0;
  std::size_t pages = 0;
  std::uint32_t in_a_row = 0;
  for (std::uint32_t i = 0; i < slots_.size(); ++i) {
    if (!usable(slots_[i])) {
      in_a_row = 0;
      pages = 0;
      continue;
    }
    pages += mapped_pages(slots_[i]);
    if (++in_a_row > count) pages -= mapped_pages(slots_[i - count]);
    if (in_a_row >= count && (best < 0 || pages > best_pages)) {
      best = i + 1 - count;
      best_pages = pages;
    }
  }
  return best;
}

bool Allocator::vacate_holed(Lock& lock, std::uint32_t first, std::uint32_t count) {
  Work work;
  std::vector<Unmapping> unmappings;
  for (std::uint32_t i = first; i < first + count; ++i) {
    if (holed(slots_[i])) (void)unmap_slot_later(work, unmappings, i);
  }
  if (unmappings.empty()) return false;
  pool_->unmap_now(lock, work, unmappings);
  return true;
}

// How many freed slots the GPU, or an operation under way, is not done with.
std::size_t Allocator::late_slots() {
  return static_cast<std::size_t>(std::count_if(slots_.begin(), slots_.end(), [&](Slot& slot) {
    return slot.state == SlotState::cached && !usable(slot);
  }));
}

void Allocator::throw_out_of_slots(std::size_t wanted) {
  const std::size_t late = late_slots();
  const auto live = std::count_if(slots_.begin(), slots_.end(),
                                  [](const Slot& slot) { return slot.state == SlotState::live; });
  throw OutOfSlots((wanted == 1 ? std::string("no slot is free")
                                : "no " + std::to_string(wanted) + " free slots stand in a row") +
                   ": " + std::to_string(live) + " of " + std::to_string(config_.max_sequences) +
                   " hold live sequences" +
                   (late == 0 ? ""
                              : ", and the GPU did not finish with " + std::to_string(late) +
                                    " freed ones in time (fence_timeout_s)") +
                   "; free one, or make the allocator with more max_sequences");
}

std::vector<SequenceId> Allocator::allocate(std::size_t num_sequences, std::int64_t tokens,
                                            Stream stream, std::int64_t expected_tokens) {
  Lock lock = pool_->lock();
  require_open();
  require_length(tokens);
  require_length(expected_tokens);
  if (num_sequences == 0) throw ConfigError("allocate needs one sequence at least");
  if (num_sequences > config_.max_sequences) {
    throw OutOfSlots(std::to_string(num_sequences) + " sequences do not fit into " +
                     std::to_string(config_.max_sequences) +
                     " slots: make the allocator with more max_sequences");
  }
  const auto count = static_cast<std::uint32_t>(num_sequences);
  const auto being_emptied = [](const Slot& slot) {
    return slot.busy && slot.state != SlotState::live;
  };
  std::int64_t first = -1;
  Patience patience = this->patience();
  for (;;) {
    require_open();  // the lock may have been dropped
    patience.look(pool_->gains());
    first = count == 1 ? pick_slot(std::max(tokens, expected_tokens)) : pick_slots(count);
    if (first >= 0) {
      if (!vacate_holed(lock, static_cast<std::uint32_t>(first), count)) break;
    } else if (std::any_of(slots_.begin(), slots_.end(), being_emptied)) {
      pool_->wait_for_change(lock);
    } else if (!pool_->collect(lock)) {
      const bool hopeless = late_slots() == 0 && patience.has_seen(pool_->gains());
      if (hopeless || !wait_for_a_fence(lock, patience)) throw_out_of_slots(count);
    }
  }

  const auto begin = static_cast<std::uint32_t>(first);
  std::vector<SequenceId> ids;
  std::vector<Target> targets;
  std::vector<SlotState> states;
  ids.reserve(count);
  targets.reserve(count);
  states.reserve(count);
  for (std::uint32_t i = begin; i < begin + count; ++i) {
    targets.push_back({i, tokens});
    states.push_back(slots_[i].state);
    ids.push_back({i, slots_[i].generation + 1});
  }
  for (const SequenceId& id : ids) {
    Slot& slot = slots_[id.slot];
    slot.state = SlotState::live;
    slot.generation = id.generation;
    slot.first_token = 0;
    slot.expected = expected_tokens;
    slot.trimmed = false;
    lengths_[id.slot] = 0;
    for (Run& run : slot.runs) {
      if (run.empty()) run = Run{};  // it may have ended anywhere
      run.clean_end = pool_->config().zero ? 0 : run.end;
    }
    refresh(id.slot);
  }
  try {
    grow(lock, targets, stream, false, patience);  // the slots are quiescent
  } catch (...) {
    for (std::uint32_t i = 0; i < count; ++i) {
      Slot& slot = slots_[begin + i];
      // A broken slot stays broken. What another has now counts, not what it began with.
      if (slot.state == SlotState::live) {
        slot.state = mapped_pages(slot) == 0 ? SlotState::empty : SlotState::cached;
        slot.freed_at = ++clock_;
      }
      refresh(begin + i);
    }
    pool_->gain();
    pool_->announce();
    throw;
  }
  for (std::uint32_t i = begin; i < begin + count; ++i) {
    lengths_[i] = tokens;
    counters_.adoptions += states[i - begin] == SlotState::cached ? 1U : 0U;
    if (tokens > soft_[i]) wake_mapper();
  }
  trace(1, "allocate", begin, count, tokens);
  audit();
  return ids;
}

// ---- steps ----

bool Allocator::try_step(const std::int64_t* lengths, std::size_t count) noexcept {
  if (pool_->inherited()) return false;  // step says why
  const Lock lock = pool_->try_lock();
  return lock && step_idly(lengths, count);
}

bool Allocator::step_idly(const std::int64_t* lengths, std::size_t count) noexcept {
  if (count > slots_.size()) return false;
  if (clearing_slots_ > 0) return false;  // the stream may have to wait for that
  // Branch-free, so that the compiler makes vector code of both passes.
  std::int64_t refused = 0;
  std::int64_t ahead = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t wanted = lengths[i];
    refused |=
        static_cast<std::int64_t>(wanted > ready_[i]) |
        (static_cast<std::int64_t>(wanted < lengths_[i]) & static_cast<std::int64_t>(wanted != 0));
    ahead |= static_cast<std::int64_t>(wanted > soft_[i]);
  }
  if (refused != 0) return false;
  for (std::size_t i = 0; i < count; ++i) lengths_[i] = lengths[i] > 0 ? lengths[i] : lengths_[i];
  ++counters_.steps;
  if (ahead != 0) wake_mapper();
  return true;
}

void Allocator::step(const std::int64_t* lengths, std::size_t count, Stream stream) {
  std::vector<std::pair<SequenceId, std::int64_t>> pairs;
  {
    const Lock lock = pool_->lock();
    require_open();
    if (count > slots_.size()) {
      throw ConfigError("there are " + std::to_string(slots_.size()) +
                        " slots; lengths has an entry for each, not " + std::to_string(count));
    }
    if (step_idly(lengths, count)) return;  // try_step did not get the lock
    for (std::uint32_t i = 0; i < count; ++i) {
      if (lengths[i] == 0) continue;
      require_length(lengths[i]);
      if (slots_[i].state != SlotState::live) {
        throw StaleSequence("slot " + std::to_string(i) +
                            " holds no sequence: its length must be 0");
      }
      pairs.emplace_back(SequenceId{i, slots_[i].generation}, lengths[i]);
    }
  }
  step(pairs, stream);
}

void Allocator::step(const std::vector<std::pair<SequenceId, std::int64_t>>& lengths,
                     Stream stream) {
  Lock lock = pool_->lock();
  require_open();
  std::vector<Target> targets;
  targets.reserve(lengths.size());
  for (const auto& [id, tokens] : lengths) {
    (void)require_live(id);
    require_length(tokens);
    if (tokens < lengths_[id.slot]) {
      throw ConfigError("step cannot shorten the sequence in slot " + std::to_string(id.slot) +
                        " from " + std::to_string(lengths_[id.slot]) + " to " +
                        std::to_string(tokens) + " tokens: call trim");
    }
    targets.push_back({id.slot, tokens});
  }
  const bool ready = std::all_of(targets.begin(), targets.end(), [&](const Target& target) {
    return target.tokens <= ready_[target.slot];
  });
  bool clearing = false;
  if (clearing_slots_ > 0) {
    for (Slot& slot : slots_) (void)is_clearing(slot);
    clearing = std::any_of(targets.begin(), targets.end(),
                           [&](const Target& target) { return slots_[target.slot].clearing; });
  }
  if (!ready || clearing) ++counters_.waited_steps;
  if (clearing) {
    // Before anything is grown, since it may fail.
    for (const Target& target : targets) await_clearing(slots_[target.slot], stream);
  }
  if (!ready) {
    Patience patience = this->patience();
    grow(lock, targets, stream, true, patience);
    for (const Target& target : targets) {  // what others have begun to clear meanwhile
      const Slot& slot = slots_[target.slot];
      if (slot.cleared_on != stream || slot.cleared_by != std::this_thread::get_id()) {
        await_clearing(slot, stream);
      }
    }
  }
  bool ahead = false;
  for (const auto& [id, tokens] : lengths) {
    lengths_[id.slot] = std::max(lengths_[id.slot], tokens);
    ahead = ahead || tokens > soft_[id.slot];
  }
  ++counters_.steps;
  if (ahead) wake_mapper();
  audit();
}

// ---- giving up ----

// An idle stream has passed the fence already; what a busy one has not is left to the mapper.
void Allocator::collect_retired(Lock& lock) {
  try {
    if (pool_->collect(lock)) pool_->keep_watermarks(lock);
  } catch (const std::exception& error) {  // what has been trimmed stays trimmed
    trace(1, "retired memory was not taken back:", error.what());
  }
  if (retired_entries_ > 0) pool_->wake_mapper();
  audit();
}

void Allocator::follow_clearing(Slot& slot, Stream stream) {
  if (is_clearing(slot)) await_clearing(slot, stream);
}

// Whichever stream it is: one that has the handle of the stream that clears may be another one.
void Allocator::await_clearing(const Slot& slot, Stream stream) const {
  if (!slot.clearing) return;
  if (const Status status = backend().wait(stream, slot.cleared); !status.ok()) {
    throw_status(backend(), status);
  }
}

bool Allocator::is_clearing(Slot& slot) {
  if (slot.clearing && pool_->has_passed(slot.cleared)) note_cleared(slot);
  return slot.clearing;
}

void Allocator::note_cleared(Slot& slot) noexcept {
  if (std::exchange(slot.clearing, false)) --clearing_slots_;
  slot.tail_back = false;
}

Fence Allocator::record_fence(Slot& slot, Stream stream) {
  follow_clearing(slot, stream);
  const Fence fence = pool_->borrow_fence();
  if (const Status status = backend().record(fence, stream); !status.ok()) {
    pool_->return_fence(fence);
    throw_status(backend(), status);
  }
  return fence;
}

void Allocator::trim(SequenceId id, std::int64_t tokens, Stream stream) {
  Lock lock = pool_->lock();
  (void)require_live(id);
  wait_idle(lock, id.slot);
  Slot& slot = require_live(id);
  if (tokens > lengths_[id.slot]) {
    throw ConfigError("trim cannot lengthen a sequence from " + std::to_string(lengths_[id.slot]) +
                      " to " + std::to_string(tokens) + " tokens: call step");
  }
  require_length(tokens);
  if (tokens < slot.first_token) {
    throw ConfigError("the sequence cannot be trimmed to " + std::to_string(tokens) +
                      " tokens: those below " + std::to_string(slot.first_token) +
                      " were given back by trim_front; free it and allocate a new one");
  }
  const std::int64_t before = std::exchange(lengths_[id.slot], tokens);
  const auto kept = [&](std::uint32_t r) {
    const std::int64_t margin = tokens == 0 ? 0 : config_.lookahead_tokens;
    return slot.runs[r].first_above(surplus_from(id.slot, r, margin));
  };
  const auto copy = [&](std::uint32_t r) {
    const Run& run = slot.runs[r];
    const auto first = run.mappings.begin() + static_cast<std::ptrdiff_t>(kept(r));
    return Cut{r, run.guarded, {first, run.mappings.end()}};
  };
  const auto remove = [](Run& run, const Cut& cut) {
    run.mappings.erase(run.mappings.end() - static_cast<std::ptrdiff_t>(cut.mappings.size()),
                       run.mappings.end());
    run.guarded = false;
    run.end = cut.first();
    run.clean_end = std::min(run.clean_end, run.end);
  };
  try {
    std::vector<std::uint32_t> cut;
    for (std::uint32_t r = 0; r < slot.runs.size(); ++r) {
      if (kept(r) < slot.runs[r].mappings.size()) cut.push_back(r);
    }
    retire(slot, true, cut, stream, copy, remove);
  } catch (...) {
    lengths_[id.slot] = before;
    throw;
  }
  slot.trimmed = true;
  refresh(id.slot);
  trace(1, "trim", id.slot, tokens);
  collect_retired(lock);
}

void Allocator::trim_front(SequenceId id, std::int64_t first_token, Stream stream) {
  Lock lock = pool_->lock();
  (void)require_live(id);
  wait_idle(lock, id.slot);
  Slot& slot = require_live(id);
  if (first_token < 0 || first_token > lengths_[id.slot]) {
    throw ConfigError("trim_front needs a token of the sequence, from 0 to " +
                      std::to_string(lengths_[id.slot]) + ", not " + std::to_string(first_token));
  }
  if (first_token <= slot.first_token) return;
  const auto gone_below = [&](std::uint32_t r) {
    const std::size_t page =
        static_cast<std::size_t>(first_token) * config_.regions[r].row_bytes / page_bytes_;
    return slot.runs[r].count_below(page);
  };
  std::vector<std::uint32_t> cut;
  for (std::uint32_t r = 0; r < slot.runs.size(); ++r) {
    if (gone_below(r) > 0) cut.push_back(r);
  }
  const auto copy = [&](std::uint32_t r) {
    const auto first = slot.runs[r].mappings.begin();
    return Cut{r, false, {first, first + static_cast<std::ptrdiff_t>(gone_below(r))}};
  };
  const auto remove = [](Run& run, const Cut& gone) {
    const auto first = run.mappings.begin();
    run.mappings.erase(first, first + static_cast<std::ptrdiff_t>(gone.mappings.size()));
    run.front = gone.last();
  };
  retire(slot, false, cut, stream, copy, remove);
  slot.first_token = first_token;
  refresh(id.slot);
  trace(1, "trim_front", id.slot, first_token);
  collect_retired(lock);
}

void Allocator::free(SequenceId id, Stream stream) {
  Lock lock = pool_->lock();
  (void)require_live(id);
  wait_idle(lock, id.slot);
  Slot& slot = require_live(id);
  if (mapped_pages(slot) > 0) {
    slot.fence = record_fence(slot, stream);
    slot.fence_pending = true;
    slot.refused = false;
    slot.state = SlotState::cached;
    (void)quiescent(slot);  // an idle stream has passed the fence already
  } else {
    // What was trimmed may still be mapped.
    slot.state = slot.retired.empty() ? SlotState::empty : SlotState::cached;
  }
  slot.freed_at = ++clock_;
  pool_->gain();
  lengths_[id.slot] = 0;
  refresh(id.slot);
  trace(1, "free", id.slot);
  pool_->keep_watermarks(lock);
  audit();
}

std::int64_t Allocator::length(SequenceId id) const {
  const Lock lock = pool_->lock();
  require_open();
  if (!is_live(id)) {
    throw StaleSequence("the sequence in slot " + std::to_string(id.slot) + " has been freed");
  }
  return lengths_[id.slot];
}

bool Allocator::any_fence_pending() const noexcept {
  return retired_entries_ > 0 || std::any_of(slots_.begin(), slots_.end(), [](const Slot& slot) {
           return slot.state == SlotState::cached && slot.fence_pending;
         });
}

Patience Allocator::patience() const {
  return Patience(std::chrono::milliseconds(config_.fence_timeout_ms));
}

// Waits, without the lock, until there is something that the operation has not looked at. False
// where no fence is pending, and when it is too late.
bool Allocator::wait_for_a_fence(Lock& lock, Patience& patience) {
  while (!closed_ && patience.has_seen(pool_->gains())) {
    if (pool_->late_allocator() == nullptr) return false;
    if (pool_->collect(lock) || pool_->a_fence_passed()) continue;
    require_answers();
    if (patience.is_over()) return false;
    lock.unlock();
    std::this_thread::sleep_for(std::chrono::microseconds(20));
    lock.lock();
  }
  return closed_ || patience.looks_again();
}

void Allocator::require_answers() const {
  const auto ask = [&](Fence fence) {
    bool passed = false;
    if (const Status status = backend().query(fence, &passed); !status.ok()) {
      throw_status(backend(), status);
    }
  };
  for (const Slot& slot : slots_) {
    if (slot.state == SlotState::cached && slot.fence_pending) ask(slot.fence);
    if (!slot.retired.empty()) ask(slot.retired.front().fence);
  }
}

bool Allocator::a_fence_passed() {
  return !closed_ && std::any_of(slots_.begin(), slots_.end(), [&](Slot& slot) {
    return slot.state == SlotState::cached && slot.fence_pending && !slot.busy && quiescent(slot);
  });
}

void Allocator::close() {
  Lock lock = pool_->lock();
  if (closed_) return;
  const auto busy = [](const Slot& slot) { return slot.busy; };
  while (std::any_of(slots_.begin(), slots_.end(), busy)) pool_->wait_for_change(lock);
  closed_ = true;
  std::fill(ready_.begin(), ready_.end(), 0);
  std::fill(soft_.begin(), soft_.end(), kNever);
  trace(1, "close");
}

void Allocator::note_outlived() noexcept {
  if (pool_->inherited()) return;
  const Lock lock = pool_->lock();
  outlived_ = outlived_ || closed_;
}

// ---- looking ----

AllocatorStats Allocator::stats() const {
  const Lock lock = pool_->lock();
  AllocatorStats stats = counters_;
  stats.reserved_bytes = config_.reserved_bytes;
  stats.guard_bytes = guard_ != nullptr ? guard_->pages() * page_bytes_ : 0;
  for (std::uint32_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    const std::size_t mapped = mapped_pages(slot) * page_bytes_;
    if (slot.state == SlotState::live) {
      stats.live_bytes += mapped;
      stats.live_tokens += lengths_[i];
      ++stats.live_sequences;
      for (std::uint32_t r = 0; r < slot.runs.size(); ++r) {
        const Run& run = slot.runs[r];
        const std::size_t first = run.first_above(surplus_from(i, r, 0));
        if (first < run.mappings.size()) {
          stats.surplus_bytes += (run.end - run.mappings[first].page) * page_bytes_;
        }
      }
    } else if (slot.state == SlotState::cached) {
      const bool passed = !slot.fence_pending || pool_->has_passed(slot.fence);
      (passed ? stats.cached_bytes : stats.retired_bytes) += mapped;
    }
    if (slot.state == SlotState::empty || slot.state == SlotState::cached) ++stats.free_slots;
    for (const Retired& retired : slot.retired) {
      for (const Cut& cut : retired.cuts) {
        for (const Mapping& m : cut.mappings) {
          stats.retired_bytes += m.extent->pages() * page_bytes_;
        }
      }
    }
  }
  return stats;
}

std::vector<MappingInfo> Allocator::mappings() const {
  const Lock lock = pool_->lock();
  std::vector<MappingInfo> all;
  const auto add = [&](std::uint32_t slot, std::uint32_t region, std::size_t page,
                       const Extent& extent, Access access) {
    all.push_back({slot, region, page_address(slot, region, page), extent.pages() * page_bytes_,
                   extent.handle, access});
  };
  const auto add_guard = [&](std::uint32_t slot, std::uint32_t region, std::size_t from) {
    for (std::size_t page = 0; page < config_.guard_pages; page += guard_->pages()) {
      add(slot, region, from + page, *guard_, Access::read);
    }
  };
  for (std::uint32_t s = 0; s < slots_.size(); ++s) {
    for (std::uint32_t r = 0; r < config_.regions.size(); ++r) {
      const Run& run = slots_[s].runs[r];
      for (const Mapping& m : run.mappings) add(s, r, m.page, *m.extent, Access::read_write);
      if (run.guarded) add_guard(s, r, run.end);
    }
    for (const Retired& retired : slots_[s].retired) {
      for (const Cut& cut : retired.cuts) {
        for (const Mapping& m : cut.mappings) {
          add(s, cut.region, m.page, *m.extent, Access::read_write);
        }
        if (cut.guarded) add_guard(s, cut.region, cut.last());
      }
    }
  }
  return all;
}

}  // namespace vattention
