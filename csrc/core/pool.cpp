#include "core/pool.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <string>
#include <utility>

#include "backend/traced.h"
#include "core/allocator.h"
#include "core/mapper.h"
#include "core/room.h"
#include "core/trace.h"

namespace vattention {
namespace {

std::uint8_t checked_order(std::size_t page_bytes, std::size_t extent_bytes) {
  const std::size_t pages = extent_bytes / page_bytes;
  if (extent_bytes % page_bytes != 0 || !std::has_single_bit(pages) ||
      order_within(pages) >= kOrders) {
    throw ConfigError("max_extent must be a power of two times the page size (" +
                      human_bytes(page_bytes) + "), not " + human_bytes(extent_bytes));
  }
  return order_within(pages);
}

// The first of the pools that are gone but for what cannot be buried. Linked through themselves and
// changed in one piece: nothing here needs memory, or is left locked in a forked child.
std::atomic<Pool*> left_pools{nullptr};

}  // namespace

// Keeps an allocator from going away while somebody works on it and has dropped the lock between.
class Pool::Use {
 public:
  Use(Pool& pool, Allocator& allocator) : pool_(pool), allocator_(allocator) {
    ++allocator_.users_;
  }
  ~Use() {
    --allocator_.users_;
    pool_.announce();
  }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

 private:
  Pool& pool_;
  Allocator& allocator_;
};

std::shared_ptr<Pool> Pool::create(std::shared_ptr<Backend> backend, const PoolConfig& config) {
  const auto destroy = [](Pool* pool) { (void)end(pool); };
  (void)bury_left_pools();
  std::shared_ptr<Pool> pool(new Pool(traced_if_asked(std::move(backend)), config), destroy);
  if (config.background) {
    pool->mapper_ = std::make_unique<Mapper>(*pool);
    const Lock lock = pool->lock();
    if (pool->below_low()) pool->wake_mapper();
  }
  return pool;
}

Pool::Pool(std::shared_ptr<Backend> backend, const PoolConfig& config)
    : backend_(std::move(backend)),
      page_bytes_(backend_->page_bytes()),
      max_order_(checked_order(page_bytes_, config.max_extent_bytes)),
      config_(config) {
  require_a_page(config.budget_bytes);
  config_.low_bytes -= config_.low_bytes % page_bytes_;  // whole pages are what there is
  if (config.low_bytes > config.high_bytes) {
    throw ConfigError("the low watermark is above the high one");
  }
}

bool Pool::end(Pool* pool) noexcept {
  // In a forked child a pool is left as it is: destroying it would wait for a thread that is not
  // there, and undo mappings of memory that the parent uses.
  if (pool->inherited()) return false;
  pool->stop();
  try {
    Lock guard(pool->mutex_);
    (void)pool->bury_own_again(guard);
    if (!pool->unburied_.empty()) (void)pool->shrink(guard, 0);
  } catch (const std::exception& error) {
    trace(1, "a pool was not given back:", error.what());
  }
  if (pool->unburied_.empty()) {
    delete pool;
    return true;
  }
  pool->next_left_ = left_pools.load();
  while (!left_pools.compare_exchange_weak(pool->next_left_, pool)) {
  }
  return false;
}

bool Pool::bury_left_pools() noexcept {
  bool any = false;
  for (Pool* pool = left_pools.exchange(nullptr); pool != nullptr;) {
    Pool* const next = pool->next_left_;
    any = end(pool) || any;
    pool = next;
  }
  return any;
}

Pool::~Pool() {
  stop();
  for (ExtentStack& list : free_) {
    while (!list.empty()) (void)backend_->destroy(list.pop()->handle);
  }
  for (const Fence fence : spare_fences_) (void)backend_->destroy_fence(fence);
}

void Pool::require_a_page(std::size_t budget) const {
  if (budget < page_bytes_) {
    throw ConfigError("the budget of " + std::to_string(budget) +
                      " bytes is less than one page of " + std::to_string(page_bytes_));
  }
}

void Pool::stop() noexcept {
  if (mapper_ != nullptr && !inherited()) mapper_->stop();
}

void Pool::throw_inherited() {
  throw Closed(
      "this pool was made before the process forked and belongs to the parent: make a new one in "
      "the child, or start it with multiprocessing's 'spawn'");
}

void Pool::wake_mapper() noexcept {
  if (mapper_ != nullptr) mapper_->wake();
}

// ---- extents ----

std::uint8_t Pool::order_of(std::size_t extent_bytes) const {
  const std::uint8_t order = checked_order(page_bytes_, extent_bytes);
  if (order > max_order_) {
    throw ConfigError("max_extent " + human_bytes(extent_bytes) + " is more than the pool's");
  }
  return order;
}

void Pool::reserve_records(std::size_t count) {
  while (spare_records_.size() < count) {
    extents_.push_back(std::make_unique<Extent>());
    spare_records_.push(extents_.back().get());
  }
}

Extent* Pool::new_extent(std::uint8_t order) noexcept {
  Extent* extent = spare_records_.pop();
  *extent = Extent{.order = order};
  return extent;
}

void Pool::drop_extent(Extent* extent) noexcept {
  extent->handle = 0;
  extent->owners = 0;
  spare_records_.push(extent);
}

void Pool::put_free(Extent* extent) noexcept {
  extent->owners = 0;
  gain();
  free_[extent->order].push(extent);
  free_bytes_ += bytes(*extent);
}

void Pool::release(Extent* extent) noexcept {
  --mappings_;
  disown(extent);
}

void Pool::disown(Extent* extent) noexcept {
  if (--extent->owners > 0) return;
  extent->dirty = true;
  put_free(extent);
  if (config_.high_bytes < config_.budget_bytes) wake_mapper();  // it may be too much now
}

void Pool::take(Work& work, const std::vector<std::uint8_t>& orders) {
  make_room(work.pieces, orders.size());
  std::array<std::size_t, kOrders> wanted{};
  std::size_t created = 0;
  std::size_t created_bytes = 0;
  for (const std::uint8_t order : orders) {
    if (++wanted[order] <= free_[order].size()) continue;
    ++created;
    created_bytes += (std::size_t{1} << order) * page_bytes_;
  }
  reserve_records(created);
  if (held_bytes_ + created_bytes > config_.budget_bytes) make_room(work.destroys, count_free());
  // From here on nothing fails.
  for (const std::uint8_t order : orders) {
    Work::Piece piece;
    if (free_[order].empty()) {
      piece.extent = new_extent(order);
      piece.create = true;
    } else {
      piece.extent = free_[order].pop();
      free_bytes_ -= bytes(*piece.extent);
    }
    piece.extent->owners = 1;
    work.pieces.push_back(piece);
  }
  held_bytes_ += created_bytes;
  exchange(work, created_bytes);
  peak_held_bytes_ = std::max(peak_held_bytes_, held_bytes_);
  if (below_low()) wake_mapper();
}

// Where what is to be created goes over the budget, free extents of other sizes make room for it.
// What they free beyond that is nobody's before they are destroyed.
void Pool::exchange(Work& work, std::size_t created_bytes) noexcept {
  for (std::size_t order = kOrders; order-- > 0;) {
    while (held_bytes_ > config_.budget_bytes && !free_[order].empty()) {
      const std::size_t gone = destroy_later(work, free_[order]);
      const std::size_t exchanged = std::min(gone, created_bytes - work.exchanged_bytes);
      work.exchanged_bytes += exchanged;
      held_bytes_ -= exchanged;
    }
  }
}

std::size_t Pool::count_free() const noexcept {
  std::size_t count = 0;
  for (const ExtentStack& list : free_) count += list.size();
  return count;
}

// Moves a free extent to those that the work destroys, which have room for it. It counts as held
// until that is done.
std::size_t Pool::destroy_later(Work& work, ExtentStack& list) noexcept {
  Extent* extent = list.pop();
  work.destroys.push_back(extent);
  free_bytes_ -= bytes(*extent);
  return bytes(*extent);
}

void Pool::settle(const Work& work, bool built) noexcept {
  held_bytes_ += work.exchanged_bytes;
  for (std::size_t i = 0; i < work.destroys.size(); ++i) {
    Extent* extent = work.destroys[i];
    if (i < work.destroyed) {
      held_bytes_ -= bytes(*extent);
      drop_extent(extent);
      ++counters_.destroys;
    } else {
      put_free(extent);
    }
  }
  const auto back_to_pool = [&](Extent* extent, bool is_new) {
    if (extent->handle != 0) {
      counters_.creates += is_new ? 1U : 0U;
      put_free(extent);
    } else {
      held_bytes_ -= bytes(*extent);
      drop_extent(extent);
    }
  };
  for (Extent* extent : work.creates) back_to_pool(extent, true);
  const auto is_stuck = [&](const Work::Piece& piece) {
    return std::any_of(work.stuck.begin(), work.stuck.end(),
                       [&](const Work::Piece& s) { return s.address == piece.address; });
  };
  for (const Work::Piece& piece : work.pieces) {
    if (built) {
      ++mappings_;
      ++counters_.maps;
      counters_.creates += piece.create ? 1U : 0U;
      piece.extent->owners += piece.alias ? 1U : 0U;
    } else if (is_stuck(piece)) {
      ++mappings_;
      ++counters_.maps;
      counters_.creates += piece.create ? 1U : 0U;
      piece.extent->owners += piece.alias ? 1U : 0U;
      stuck_bytes_ += bytes(*piece.extent);
    } else if (!piece.alias) {
      back_to_pool(piece.extent, piece.create);
    }
  }
  for (const Work::Piece& piece : work.displaced) {
    if (!built) break;
    release(piece.extent);
    ++counters_.unmaps;
  }
  counters_.unmaps += work.unmapped;
  // What could not be unmapped is no news: who waits would try it again at once.
  if (work.unmapped + work.destroyed > 0 || !work.pieces.empty() || !work.creates.empty()) gain();
}

bool Pool::has_mappings(std::size_t more) const noexcept {
  return mappings_ + more <= backend_->max_mappings();
}

// ---- fences ----

Fence Pool::borrow_fence() {
  if (!spare_fences_.empty()) {
    const Fence fence = spare_fences_.back();
    spare_fences_.pop_back();
    return fence;
  }
  make_room(spare_fences_, fences_ + 1);  // there is none in it
  Fence fence = 0;
  require(backend_->create_fence(&fence));
  ++fences_;
  return fence;
}

void Pool::return_fence(Fence fence) noexcept { spare_fences_.push_back(fence); }

bool Pool::has_passed(Fence fence) const noexcept {
  bool passed = false;
  return backend_->query(fence, &passed).ok() && passed;
}

// ---- allocators ----

void Pool::attach(Allocator* allocator) { allocators_.push_back(allocator); }

void Pool::detach(Allocator* allocator, Lock& lock) {
  while (allocator->users_ > 0) changed_.wait(lock);
  std::erase(allocators_, allocator);
}

bool Pool::bury(std::list<Remains> one) noexcept {
  Remains& remains = one.front();
  if (!remains.quiet && !backend_->synchronize_device().ok()) {
    const Lock guard = lock();
    unburied_.splice(unburied_.end(), one);
    return false;
  }
  for (Remains::Part& part : remains.parts) {
    part.unmapped = backend_->unmap(part.range.address, part.range.bytes).ok();
    remains.whole = remains.whole && part.unmapped;
  }
  {
    Lock guard = lock();
    for (const Remains::Part& part : remains.parts) {
      counters_.unmaps += part.unmapped ? 1U : 0U;
      for (Extent* extent : part.extents) {
        if (part.unmapped) {
          release(extent);
        } else {
          stuck_bytes_ += bytes(*extent);
        }
      }
    }
    if (remains.guard != nullptr) disown(remains.guard);
    keep_watermarks(guard);
    announce();
  }
  const Work::Range& reservation = remains.reservation;
  if (remains.whole && reservation.address != 0) {
    (void)backend_->unreserve(reservation.address, reservation.bytes);
  }
  return true;
}

bool Pool::bury_again(Lock& lock) noexcept {
  const bool any = bury_own_again(lock);
  if (left_pools.load() == nullptr) return any;
  begin_work();
  lock.unlock();
  const bool any_left = bury_left_pools();
  lock.lock();
  end_work();
  announce();
  return any || any_left;
}

bool Pool::bury_own_again(Lock& lock) noexcept {
  std::list<Remains> tried;
  tried.swap(unburied_);
  if (tried.empty()) return false;
  bool any = false;
  begin_work();
  lock.unlock();
  while (!tried.empty()) {
    std::list<Remains> one;
    one.splice(one.end(), tried, tried.begin());
    any = bury(std::move(one)) || any;
  }
  lock.lock();
  end_work();
  announce();
  return any;
}

std::size_t Pool::bytes_of(const Remains& remains) const noexcept {
  std::size_t total = remains.guard == nullptr ? 0 : bytes(*remains.guard);
  for (const Remains::Part& part : remains.parts) {
    for (const Extent* extent : part.extents) {
      if (extent != remains.guard) total += bytes(*extent);
    }
  }
  return total;
}

std::size_t Pool::reclaimable_bytes() const {
  std::size_t total = 0;
  for (const Remains& remains : unburied_) total += bytes_of(remains);
  for (const Allocator* allocator : allocators_) total += allocator->reclaimable_bytes();
  return total;
}

// Whether there is something for the background thread to do as soon as a fence has passed.
bool Pool::waits_for_fences() const noexcept {
  const bool lowers = config_.high_bytes < config_.budget_bytes;
  return std::any_of(allocators_.begin(), allocators_.end(), [&](const Allocator* a) {
    return !a->closed_ && (a->retired_entries_ > 0 || (lowers && a->any_fence_pending()));
  });
}

void Pool::require(const Status& status) const {
  if (!status.ok()) throw_status(*backend_, status);
}

// ---- giving up ----

// Runs planned unmappings without the lock, with their slots busy, and books those that were done.
Status Pool::unmap(Lock& lock, Work& work, const std::vector<Unmapping>& unmappings,
                   bool synchronize) {
  if (unmappings.empty()) return {};
  const auto mark = [&](bool busy) {
    for (const Unmapping& u : unmappings) {
      u.owner->slots_[u.slot].busy = busy;
      u.owner->users_ += busy ? 1U : static_cast<std::size_t>(-1);
      if (!busy) {
        u.owner->refresh(u.slot);
      } else if (u.retired == 0) {
        u.owner->hold_back(u.slot);
      }
    }
  };
  mark(true);
  begin_work();
  lock.unlock();
  Status status;
  if (synchronize) status = backend_->synchronize_device();
  if (status.ok()) status = work.run(*backend_);
  lock.lock();
  end_work();
  for (std::size_t i = 0; i < work.unmapped; ++i) {
    unmappings[i].owner->finish_unmapping(unmappings[i]);
  }
  settle(work, status.ok());
  mark(false);
  announce();
  return status;
}

Status Pool::run(Lock& lock, Work& work) {
  begin_work();
  lock.unlock();
  const Status status = work.run(*backend_);
  lock.lock();
  end_work();
  settle(work, status.ok());
  announce();
  return status;
}

// One of those that wait for a fence; who waits with it looks at the fences of all.
Allocator* Pool::late_allocator() const noexcept {
  const auto late = std::find_if(allocators_.begin(), allocators_.end(), [](const Allocator* a) {
    return !a->closed_ && a->any_fence_pending();
  });
  return late == allocators_.end() ? nullptr : *late;
}

bool Pool::a_fence_passed() {
  return std::any_of(allocators_.begin(), allocators_.end(),
                     [](Allocator* allocator) { return allocator->a_fence_passed(); });
}

bool Pool::collect(Lock& lock) {
  Work work;
  std::vector<Unmapping> unmappings;
  for (Allocator* allocator : allocators_) allocator->plan_retired(work, unmappings);
  (void)unmap(lock, work, unmappings, false);
  return work.unmapped > 0;
}

// What the driver will not unmap is left for last, so that it is in the way of nothing else.
Pool::Eviction Pool::evict(Lock& lock, std::size_t bytes) {
  Eviction eviction;
  for (const bool refused : {false, true}) {
    for (;;) {
      Work work;
      std::vector<Unmapping> unmappings;
      std::size_t planned = 0;
      for (Allocator* allocator : allocators_) {
        if (planned >= bytes) break;
        planned += allocator->plan_eviction(work, unmappings, bytes - planned, refused);
      }
      if (unmappings.empty()) break;
      const Status status = unmap(lock, work, unmappings, false);
      eviction.came_forward = work.unmapped > 0;
      if (status.ok()) return eviction;
      eviction.refusal = status;
      unmappings[work.unmapped].owner->note_refused(unmappings[work.unmapped].slot);
      if (eviction.came_forward || refused) return eviction;
    }
    if (!eviction.refusal.ok()) break;
  }
  return eviction;
}

Patience Pool::patience() const {
  std::int64_t longest_ms = 0;
  for (const Allocator* allocator : allocators_) {
    longest_ms = std::max(longest_ms, allocator->config_.fence_timeout_ms);
  }
  return Patience(std::chrono::milliseconds(longest_ms));
}

bool Pool::reclaim_some(Lock& lock, std::size_t bytes, Patience* patience) {
  if (collect(lock)) return true;
  const Eviction eviction = evict(lock, bytes);
  if (eviction.came_forward) return true;
  if (patience == nullptr) return false;
  if (take_surplus(lock, bytes, false) > 0 || bury_again(lock)) return true;
  if (Allocator* allocator = late_allocator(); allocator != nullptr) {
    const Use use(*this, *allocator);
    if (allocator->wait_for_a_fence(lock, *patience)) return true;
  }
  if (take_surplus(lock, bytes, true) > 0) return true;
  require(eviction.refusal);
  return false;
}

std::size_t Pool::take_surplus(Lock& lock, std::size_t bytes, bool in_use) {
  Work work;
  std::vector<Unmapping> unmappings;
  std::size_t planned = 0;
  for (Allocator* allocator : allocators_) {
    if (planned >= bytes) break;
    planned += allocator->plan_surplus(work, unmappings, bytes - planned, in_use);
  }
  require(unmap(lock, work, unmappings, in_use));
  return planned;
}

std::size_t Pool::shrink(Lock& lock, std::size_t keep_bytes) {
  Work work;
  make_room(work.destroys, count_free());
  std::size_t gone = 0;
  for (std::size_t order = kOrders; order-- > 0;) {
    while (!free_[order].empty() && free_bytes_ >= keep_bytes + bytes(*free_[order].top())) {
      gone += destroy_later(work, free_[order]);
    }
  }
  // What is left of the excess is less than the smallest extent that is left, which goes too.
  if (free_bytes_ > keep_bytes) {
    gone +=
        destroy_later(work, *std::find_if(free_.begin(), free_.end(),
                                          [](const ExtentStack& list) { return !list.empty(); }));
  }
  if (work.destroys.empty()) return 0;
  require(run(lock, work));
  return gone;
}

std::size_t Pool::give_back_idle(Lock& lock, Status* refusal) {
  while (collect(lock)) {
  }
  Eviction eviction;
  do {
    eviction = evict(lock, SIZE_MAX);
  } while (eviction.came_forward);
  *refusal = eviction.refusal;
  return shrink(lock, 0);
}

std::size_t Pool::reclaim() {
  Lock guard = lock();
  const GivingBack giving_back(*this);
  while (working_ > 0) wait_for_change(guard);  // what others carry may be idle memory
  (void)bury_again(guard);
  Patience patience = this->patience();
  std::size_t gone = 0;
  Status refusal;
  for (bool waits = true; waits;) {
    patience.look(gains_);
    gone += give_back_idle(guard, &refusal);
    Allocator* late = late_allocator();
    if (late == nullptr) break;
    const Use use(*this, *late);
    waits = late->wait_for_a_fence(guard, patience);
  }
  require(refusal);
  audit();
  return gone;
}

void Pool::keep_watermarks(Lock& lock) {
  if (config_.high_bytes >= config_.budget_bytes && config_.low_bytes == 0) return;
  if (mapper_ != nullptr) {
    mapper_->wake();
  } else {
    lower(lock);
  }
}

// Idle memory is what is free and what freed slots still hold; above the high watermark it goes.
// What the driver refuses to take stays, and is tried again at the next occasion.
void Pool::lower(Lock& lock) noexcept {
  if (config_.high_bytes >= config_.budget_bytes) return;
  const auto idle = [&] {
    std::size_t total = free_bytes_;
    for (const Allocator* allocator : allocators_) total += allocator->cached_bytes();
    return total;
  };
  try {
    while (idle() > config_.high_bytes) {
      const std::size_t excess = idle() - config_.high_bytes;
      const std::size_t keep = std::max(std::min(free_bytes_, config_.low_bytes),
                                        free_bytes_ > excess ? free_bytes_ - excess : 0);
      if (shrink(lock, keep) == 0 && !evict(lock, excess).came_forward && !collect(lock)) return;
    }
  } catch (const std::exception& error) {
    trace(1, "idle memory was not given back:", error.what());
  }
}

bool Pool::refill(Lock& lock) {
  if (!below_low()) return false;
  Work work;
  const std::size_t missing =
      std::min((config_.low_bytes - free_bytes_ + page_bytes_ - 1) / page_bytes_,
               (config_.budget_bytes - held_bytes_) / page_bytes_);
  make_room(work.creates, missing);
  reserve_records(missing);
  for (std::size_t i = 0; i < missing; ++i) work.creates.push_back(new_extent(0));
  held_bytes_ += missing * page_bytes_;
  peak_held_bytes_ = std::max(peak_held_bytes_, held_bytes_);
  return run(lock, work).ok();
}

// One round of the background thread; returns whether there may be more to do at once.
bool Pool::background_pass(Lock& lock, Stream stream) {
  bool more = false;
  for (std::size_t i = 0; i < allocators_.size(); ++i) {
    Allocator* allocator = allocators_[i];
    const Use use(*this, *allocator);
    more = allocator->map_ahead(lock, stream) || more;
  }
  (void)collect(lock);
  (void)a_fence_passed();  // so that nobody polls for one that has
  (void)refill(lock);
  lower(lock);  // last: what was created may make too much of what freed slots keep
  return more;
}

// ---- settings and looking ----

void Pool::set_budget(std::size_t budget) {
  Lock guard = lock();
  const GivingBack giving_back(*this);
  require_a_page(budget);
  Patience patience = this->patience();
  while (held_bytes_ > budget) {
    patience.look(gains_);
    const std::size_t excess = held_bytes_ - budget;
    const std::size_t reclaimable = reclaimable_bytes();
    if (excess > free_bytes_ + reclaimable && working_ == 0) {
      throw OutOfPages(
          "the budget cannot be lowered to " + human_bytes(budget) + ": live sequences hold " +
              human_bytes(held_bytes_ - free_bytes_ - reclaimable) + ". Free or trim some first",
          held_bytes_ - free_bytes_ - reclaimable, free_bytes_, reclaimable, config_.budget_bytes);
    }
    if (shrink(guard, free_bytes_ > excess ? free_bytes_ - excess : 0) > 0) continue;
    if (reclaim_some(guard, excess, &patience)) continue;
    if (working_ > 0) {
      wait_for_change(guard);
      continue;
    }
    throw OutOfPages("the budget cannot be lowered yet: the GPU did not finish in time", excess,
                     free_bytes_, reclaimable, config_.budget_bytes);
  }
  config_.budget_bytes = budget;
  gain();
  announce();
  audit();
}

void Pool::set_watermarks(std::size_t low_bytes, std::size_t high_bytes) {
  Lock guard = lock();
  if (low_bytes > high_bytes) throw ConfigError("the low watermark is above the high one");
  config_.low_bytes = low_bytes - low_bytes % page_bytes_;
  config_.high_bytes = high_bytes;
  if (mapper_ != nullptr) {
    mapper_->wake();
  } else {
    lower(guard);
  }
}

PoolStats Pool::stats() const {
  const Lock guard = lock();
  PoolStats stats = counters_;
  stats.budget_bytes = config_.budget_bytes;
  stats.held_bytes = held_bytes_;
  stats.peak_held_bytes = peak_held_bytes_;
  stats.free_bytes = free_bytes_;
  stats.mappings = mappings_;
  return stats;
}

}  // namespace vattention
