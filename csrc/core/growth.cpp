// How sequences get memory: a plan is made (pure arithmetic over the runs), the pool is asked
// whether it can be met, the driver does it without the lock, and only then is it booked.
#include <algorithm>
#include <optional>
#include <utility>

#include "core/allocator.h"
#include "core/errors.h"
#include "core/room.h"
#include "core/trace.h"

namespace vattention {
namespace {

// A sequence that grows is given up to 1/32 of what it has at once where memory allows: that bounds
// the mappings of a long decode by their logarithm and costs at most 3.1% of its memory, which goes
// back when it is needed elsewhere.
constexpr std::size_t kGrowthShare = 32;
// How many sequences the mapper grows at once: a step that needs one of them waits for them all.
constexpr std::size_t kAheadBatch = 8;

}  // namespace

// What a growth of one run amounts to. Nothing is appended where nothing is to be done.
void Allocator::plan_run(Growth& growth, const Target& target, std::uint32_t region,
                         Generosity generosity) const {
  const Slot& slot = slots_[target.slot];
  const Run& run = slot.runs[region];
  const std::int64_t slack = config_.tail_slack_tokens;
  const std::size_t low =
      static_cast<std::size_t>(slot.first_token) * config_.regions[region].row_bytes / page_bytes_;
  // Own memory behind the tokens; and memory or a guard behind the slack.
  const std::size_t owned = pages_for(region, target.tokens);
  const std::size_t covered = target.tokens == 0 ? 0 : pages_for(region, target.tokens + slack);

  // A run that is not empty begins no later than the first token: see holed().
  const std::size_t front = run.empty() ? low : run.front;
  const std::size_t end = run.empty() ? front : run.end;
  const bool guarded = run.guarded;
  std::size_t back_to = end;
  // The mapper leaves guards in their places: kernels may be reading them.
  const bool grows = !guarded || generosity != Generosity::ahead;
  if (grows && (owned > end || (covered > end && !guarded))) {
    back_to = std::max(end, owned);
    if (generosity != Generosity::exact) {
      // Slack is real memory as far as that does not cost more than the tokens themselves.
      back_to =
          std::max(back_to, pages_for(region, std::min(2 * target.tokens, target.tokens + slack)));
      if (run.pages() / kGrowthShare > 0) {
        back_to =
            std::max(back_to, end + (std::size_t{1} << order_within(run.pages() / kGrowthShare)));
      }
      const std::int64_t most = most_tokens(target.slot, target.tokens);
      back_to = std::min(back_to, pages_for(region, most + slack));
    }
    if (covered > back_to && back_to == front) ++back_to;  // a guard lies behind a mapping
  }
  Change change{target.slot, region, front, end, back_to, 0, false, false};
  change.remove_guard = guarded && back_to > end;
  change.add_guard = covered > back_to && (!guarded || change.remove_guard);
  // Clean: what the tokens and their slack need of the old part, and all of the new.
  const std::size_t clean = run.empty() ? front : std::min(run.clean_end, end);
  change.clean_to = back_to > end ? back_to : std::max(clean, std::min(end, covered));
  if (back_to == end && change.clean_to == clean && !change.add_guard) return;
  for (std::size_t pages = back_to - end; pages > 0; ++change.pieces) {
    const std::uint8_t order = std::min(max_order_, order_within(pages));
    growth.orders.push_back(order);
    pages -= std::size_t{1} << order;
  }
  growth.bytes += (back_to - end) * page_bytes_;
  growth.mappings += change.pieces + (change.add_guard ? guard_count() : 0);
  growth.removes_guard = growth.removes_guard || change.remove_guard;
  growth.changes.push_back(change);
}

Allocator::Growth Allocator::plan(const std::vector<Target>& targets, Generosity generosity) const {
  Growth growth;
  for (const Target& target : targets) {
    if (target.tokens <= ready_[target.slot]) continue;
    for (std::uint32_t r = 0; r < config_.regions.size(); ++r) {
      plan_run(growth, target, r, generosity);
    }
  }
  return growth;
}

// Turns a plan into driver work, and last takes the extents out of the pool: once it has, neither
// this nor booking it can fail.
Work Allocator::prepare(Growth& growth, Stream stream) {
  Work work;
  work.stream = stream;
  std::size_t guards_to_come = 0;
  std::size_t guards_to_go = 0;
  for (const Change& change : growth.changes) {
    guards_to_come += change.add_guard ? guard_count() : 0;
    guards_to_go += change.remove_guard ? guard_count() : 0;
    make_room(slots_[change.slot].runs[change.region].mappings, change.pieces);
  }
  work.pieces.reserve(growth.orders.size() + guards_to_come);
  work.stuck.reserve(growth.orders.size() + guards_to_come);
  work.displaced.reserve(guards_to_go);
  work.zeros.reserve(growth.changes.size() + growth.orders.size());
  pool_->take(work, growth.orders);  // one piece an order, in the order of the plan
  // Guards are aliases of one extent, so their pieces are added after those that were taken; a
  // change's own pieces keep their places.
  std::size_t next = 0;
  for (const Change& change : growth.changes) {
    const Run& run = slots_[change.slot].runs[change.region];
    const std::size_t clean = run.empty() ? change.from : std::min(run.clean_end, run.end);
    const std::size_t clean_old_to = std::min(change.clean_to, change.from);
    if (clean < clean_old_to) {
      append_range(work.zeros, page_address(change.slot, change.region, clean),
                   (clean_old_to - clean) * page_bytes_);
    }
    std::size_t page = change.from;
    for (std::size_t i = 0; i < change.pieces; ++i) {
      Work::Piece& piece = work.pieces[next++];
      piece.address = page_address(change.slot, change.region, page);
      const std::size_t bytes = piece.extent->pages() * page_bytes_;
      const bool dirty = piece.create ? !backend().fresh_memory_is_zero() : piece.extent->dirty;
      if (dirty && pool_->config().zero) append_range(work.zeros, piece.address, bytes);
      page += piece.extent->pages();
    }
  }
  for (const Change& change : growth.changes) {
    const auto guards = [&](std::vector<Work::Piece>& pieces, std::size_t from) {
      for (std::size_t page = 0; page < config_.guard_pages; page += guard_->pages()) {
        pieces.push_back({page_address(change.slot, change.region, from + page), guard_, false,
                          true, Access::read});
      }
    };
    if (change.remove_guard) guards(work.displaced, change.from);
    if (change.add_guard) guards(work.pieces, change.to);
  }
  return work;
}

void Allocator::give_up(std::uint32_t index) noexcept {
  slots_[index].state = SlotState::broken;
  lengths_[index] = 0;
}

// Books what a growth has built, or that it has not.
void Allocator::commit(const Growth& growth, const Work& work, bool built) {
  std::size_t next = 0;
  for (const Change& change : growth.changes) {
    Slot& slot = slots_[change.slot];
    Run& run = slot.runs[change.region];
    const std::size_t first = next;
    next += change.pieces;
    if (!built) {
      if (change.remove_guard && work.displaced_lost) give_up(change.slot);
      continue;
    }
    for (std::size_t i = first; i < next; ++i) {
      const std::size_t offset =
          work.pieces[i].address - page_address(change.slot, change.region, 0);
      run.mappings.push_back({offset / page_bytes_, work.pieces[i].extent});
    }
    run.front = change.front;
    run.end = change.to;
    run.clean_end = std::max(change.clean_to, run.front);
    if (change.remove_guard) run.guarded = false;
    if (change.add_guard) run.guarded = true;
  }
  for (const Work::Piece& piece : work.stuck) {
    for (const Change& change : growth.changes) {
      const RegionConfig& r = config_.regions[change.region];
      const Address slot_base = page_address(change.slot, change.region, 0);
      if (piece.address >= slot_base && piece.address < slot_base + r.slot_stride_bytes) {
        give_up(change.slot);
        break;
      }
    }
  }
}

// Runs a growth without the lock, with its slots busy. The growth is booked when it returns.
Status Allocator::execute(Lock& lock, Growth& growth, Stream stream, Caller caller) {
  for (const Change& change : growth.changes) {
    Slot& slot = slots_[change.slot];
    if (slot.cleared == 0 && pool_->config().zero) slot.cleared = pool_->borrow_fence();
    if (caller != Caller::mapper) follow_clearing(slot, stream);
  }
  Work work = prepare(growth, stream);
  work.wait = caller == Caller::mapper;
  for (const Change& change : growth.changes) slots_[change.slot].busy = true;
  pool_->begin_work();
  lock.unlock();
  // Kernels of earlier steps may be reading the guards that are to make room.
  Status status;
  if (growth.removes_guard && caller == Caller::step) status = backend().synchronize(stream);
  if (status.ok()) status = work.run(backend());
  bool clearing = status.ok() && caller != Caller::mapper && !work.zeros.empty();
  if (clearing && !record_clearings(growth, stream).ok()) {
    (void)backend().synchronize(stream);
    clearing = false;
  }
  lock.lock();
  growth.gains = pool_->gains();
  if (clearing) {
    for (const Change& change : growth.changes) note_clearing(slots_[change.slot], stream);
  }
  pool_->end_work();
  commit(growth, work, status.ok());
  pool_->settle(work, status.ok());
  for (const Change& change : growth.changes) {
    slots_[change.slot].busy = false;
    refresh(change.slot);
  }
  pool_->announce();
  return status;
}

// Without the lock; the slots are busy.
Status Allocator::record_clearings(const Growth& growth, Stream stream) noexcept {
  Fence last = 0;
  for (const Change& change : growth.changes) {
    const Fence fence = slots_[change.slot].cleared;
    if (std::exchange(last, fence) == fence) continue;
    if (const Status status = backend().record(fence, stream); !status.ok()) return status;
  }
  return {};
}

void Allocator::note_clearing(Slot& slot, Stream stream) noexcept {
  if (!std::exchange(slot.clearing, true)) ++clearing_slots_;
  slot.cleared_on = stream;
  slot.cleared_by = std::this_thread::get_id();
}

bool Allocator::any_busy(const std::vector<Target>& targets) const noexcept {
  return std::any_of(targets.begin(), targets.end(), [&](const Target& target) {
    return target.tokens > ready_[target.slot] && slots_[target.slot].busy;
  });
}

// Makes every target's tokens, and the slack behind them, mapped and clean, all at one moment,
// which lasts until the lock is dropped; or throws, and no length and no live token has changed.
// (Tails that were taken back, and what was mapped before a later attempt failed, are surplus
// then.)
void Allocator::grow(Lock& lock, const std::vector<Target>& targets, Stream stream, bool readers,
                     Patience& patience) {
  // Meanwhile nobody takes from a target what it is to have.
  struct Claims {
    std::vector<Slot>& slots;
    const std::vector<Target>& targets;
    void make() const {
      for (const Target& target : targets) slots[target.slot].claimed = target.tokens;
    }
    ~Claims() {
      for (const Target& target : targets) slots[target.slot].claimed = 0;
    }
  };
  const Claims claims{slots_, targets};
  std::vector<std::uint64_t> generations;
  for (const Target& target : targets) generations.push_back(slots_[target.slot].generation);
  // Made when the driver is full: what is given back then is not for the mapper.
  std::optional<Pool::GivingBack> driver_was_full;

  // Each time that the lock has been dropped, everything is looked at anew.
  for (;;) {
    claims.make();
    while (any_busy(targets)) pool_->wait_for_change(lock);
    claims.make();  // another operation on the same sequence may have dropped them
    patience.look(pool_->gains());
    for (std::size_t i = 0; i < targets.size(); ++i) {
      const auto [slot, tokens] = targets[i];
      (void)require_live({slot, generations[i]});
      if (tokens > ready_[slot]) {
        take_back_tails(slots_[slot], stream);
        refresh(slot);
      }
    }
    Growth growth = plan(targets, driver_was_full ? Generosity::exact : Generosity::rounded);
    if (growth.bytes > pool_->available_bytes()) growth = plan(targets, Generosity::exact);
    if (growth.changes.empty()) return;

    if (growth.bytes > pool_->available_bytes()) {
      const std::size_t missing = growth.bytes - pool_->available_bytes();
      if (missing > pool_->reclaimable_bytes()) {
        if (pool_->working()) {  // what others carry now may come back
          pool_->wait_for_change(lock);
          continue;
        }
        throw_out_of_pages(growth.bytes, pool_->available_bytes(), "the budget is used up");
      }
      if (!pool_->reclaim_some(lock, missing, &patience)) {
        if (!pool_->working()) {
          throw_out_of_pages(growth.bytes, pool_->available_bytes(),
                             "the GPU did not finish with what was freed in time");
        }
        pool_->wait_for_change(lock);
      }
      continue;
    }
    if (!pool_->has_mappings(growth.mappings)) {
      if (pool_->reclaim_some(lock, page_bytes_, &patience)) continue;
      throw BackendFailure("the " + std::string(backend().name()) +
                               " backend holds about as many "
                               "mappings as it can (" +
                               std::to_string(backend().max_mappings()) +
                               "): use larger extents, or fewer sequences",
                           "map", 0);
    }
    const Status status =
        execute(lock, growth, stream, readers ? Caller::step : Caller::allocation);
    if (status.ok()) continue;
    if (status.kind != Status::Kind::out_of_memory) throw_status(backend(), status);
    // The device has less than the budget. What others carry may come back, or has meanwhile.
    const bool news = !patience.has_seen(growth.gains);
    if ((news || pool_->working()) && patience.looks_again()) {
      if (!news) pool_->wait_for_change(lock);
      continue;
    }
    // What is idle here may help, or asking for less.
    if (!driver_was_full) driver_was_full.emplace(*pool_);
    const bool buried = pool_->bury_again(lock);
    const bool asked_for_more = plan(targets, Generosity::exact).bytes < growth.bytes;
    Status refusal;
    if (pool_->give_back_idle(lock, &refusal) == 0 && !buried && !asked_for_more) {
      throw_device_full(growth.bytes, status);
    }
  }
}

void Allocator::throw_out_of_pages(std::size_t needed, std::size_t free_bytes,
                                   const std::string& why) const {
  const std::size_t reclaimable = pool_->reclaimable_bytes();
  const std::size_t budget = pool_->config().budget_bytes;
  throw OutOfPages("out of memory for KV: " + why + ". Needed " + human_bytes(needed) + "; free " +
                       human_bytes(free_bytes) + ", reclaimable " + human_bytes(reclaimable) +
                       ", budget " + human_bytes(budget) +
                       ". Free or trim sequences, or raise the budget",
                   needed, free_bytes, reclaimable, budget);
}

void Allocator::throw_device_full(std::size_t needed, const Status& status) const {
  std::size_t device_free = 0;
  std::size_t device_total = 0;
  (void)backend().memory_info(&device_free, &device_total);
  throw_out_of_pages(needed, std::min(pool_->available_bytes(), pool_->free_bytes() + device_free),
                     "the device itself is full (" + std::string(status.call) + ": " +
                         backend().describe(status.code) +
                         "), of which torch may hold some for later (torch.cuda.empty_cache())");
}

// Growth takes back what a trim has cut off and nobody has unmapped yet. It will be cleared, where
// what was enqueued before the trim may still be read: on the stream, which is made to wait for
// that, or by the mapper, which looks at `cleared` first. Changes nothing where it throws.
void Allocator::take_back_tails(Slot& slot, Stream stream) {
  if (!has_retired_tail(slot)) return;
  for (const Retired& retired : slot.retired) {
    if (!retired.tail) continue;
    if (const Status status = backend().wait(stream, retired.fence); !status.ok()) {
      throw_status(backend(), status);
    }
  }
  for (std::uint32_t r = 0; r < slot.runs.size(); ++r) {
    std::size_t more = 0;
    for (const Retired& retired : slot.retired) {
      for (const Cut& cut : retired.cuts) more += cut.region == r ? cut.mappings.size() : 0;
    }
    make_room(slot.runs[r].mappings, more);
  }
  const bool zero = pool_->config().zero;
  if (zero) {
    follow_clearing(slot, stream);
    if (slot.cleared == 0) slot.cleared = pool_->borrow_fence();
    if (const Status status = backend().record(slot.cleared, stream); !status.ok()) {
      throw_status(backend(), status);
    }
    note_clearing(slot, stream);
    slot.tail_back = true;
  }
  for (std::size_t i = slot.retired.size(); i-- > 0;) {
    Retired& retired = slot.retired[i];
    if (!retired.tail) continue;
    for (Cut& cut : retired.cuts) {
      Run& run = slot.runs[cut.region];
      if (run.mappings.empty()) run.front = cut.first();
      run.end = cut.last();
      if (!zero) run.clean_end = run.end;
      run.guarded = cut.guarded;
      run.mappings.insert(run.mappings.end(), cut.mappings.begin(), cut.mappings.end());
    }
    pool_->return_fence(retired.fence);
    slot.retired.erase(slot.retired.begin() + static_cast<std::ptrdiff_t>(i));
    --retired_entries_;
  }
  pool_->gain();  // one fence less to wait for
}

// The mapper's part: grows the sequences that come near the end of what they have. Drops the lock.
// Returns whether anything was done; a lack of memory is not an error here.
bool Allocator::map_ahead(Lock& lock, Stream stream) {
  if (closed_ || config_.lookahead_tokens == 0 || pool_->is_giving_back()) return false;
  if (full_at_ == pool_->gains()) return false;
  std::vector<std::uint32_t> short_of_memory;
  for (std::uint32_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (slot.state == SlotState::live && !slot.busy && slot.claimed == 0 && slot.retired.empty() &&
        lengths_[i] > std::max<std::int64_t>(soft_[i], 0)) {
      short_of_memory.push_back(i);
    }
  }
  // First those that will be the first to wait.
  std::sort(short_of_memory.begin(), short_of_memory.end(), [&](std::uint32_t a, std::uint32_t b) {
    return ready_[a] - lengths_[a] < ready_[b] - lengths_[b];
  });
  Growth growth;
  std::size_t growing = 0;
  for (const std::uint32_t i : short_of_memory) {
    if (growing == kAheadBatch) break;
    Slot& slot = slots_[i];
    if (slot.tail_back && is_clearing(slot)) continue;
    const std::size_t before = growth.changes.size();
    const Target target{
        i, std::min(lengths_[i] + config_.lookahead_tokens, most_tokens(i, lengths_[i]))};
    for (std::uint32_t r = 0; r < config_.regions.size(); ++r) {
      plan_run(growth, target, r, Generosity::ahead);
    }
    growing += growth.changes.size() > before ? 1U : 0U;
  }
  if (growth.changes.empty()) return false;
  if (growth.bytes > pool_->available_bytes()) {
    // What freed sequences left behind makes room, so that no step has to wait for that either.
    const std::uint64_t gains = pool_->gains();
    if (pool_->reclaim_some(lock, growth.bytes - pool_->available_bytes(), nullptr)) return true;
    ++counters_.ahead_failures;
    // That a fence has passed is no gain before somebody has looked.
    if (pool_->late_allocator() == nullptr) full_at_ = gains;
    return false;
  }
  if (!pool_->has_mappings(growth.mappings)) {
    ++counters_.ahead_failures;
    full_at_ = pool_->gains();
    return false;
  }
  const std::size_t mappings = growth.mappings;
  const Status status = execute(lock, growth, stream, Caller::mapper);
  if (status.ok()) {
    counters_.ahead_mappings += mappings;
  } else {
    ++counters_.ahead_failures;
  }
  return status.ok();
}

// The guard: one extent of zeros, read-only, aliased behind every sequence that needs it. From when
// it is there the lock is held, so that nobody meets it without its owner.
void Allocator::make_guard(Lock& lock) {
  const std::uint8_t order = std::min(max_order_, order_within(config_.guard_pages));
  const std::size_t bytes = (std::size_t{1} << order) * page_bytes_;
  Patience patience = this->patience();
  while (bytes > pool_->available_bytes()) {
    patience.look(pool_->gains());
    const std::size_t missing = bytes - pool_->available_bytes();
    if (missing <= pool_->reclaimable_bytes() && pool_->reclaim_some(lock, missing, &patience)) {
      continue;
    }
    if (!pool_->working()) {
      throw_out_of_pages(bytes, pool_->available_bytes(), "no room for the guard");
    }
    pool_->wait_for_change(lock);
  }
  Work work;
  pool_->take(work, {order});
  work.pieces[0].address = base_;
  work.zeros.push_back({base_, bytes});
  work.wait = true;
  work.stuck.reserve(work.pieces.size());
  pool_->begin_work();
  lock.unlock();
  Status status = work.run(backend());
  if (status.ok()) {
    status = backend().unmap(base_, bytes);
    // Tried twice: what stays mapped is lost to the pool.
    if (!status.ok() && !backend().unmap(base_, bytes).ok()) work.stuck.push_back(work.pieces[0]);
  }
  lock.lock();
  pool_->end_work();
  pool_->settle(work, status.ok());
  pool_->announce();
  if (status.kind == Status::Kind::out_of_memory) throw_device_full(bytes, status);
  if (!status.ok()) throw_status(backend(), status);
  pool_->count_unmapped();
  guard_ = work.pieces[0].extent;
}

}  // namespace vattention
