// How memory is given up: what is retired once its fence has passed, then freed slots, then what
// live sequences hold beyond their needs. A plan chooses mappings; the pool unmaps them without
// the lock; finish_unmapping books each one that is really gone.
#include <algorithm>
#include <list>
#include <utility>

#include "core/allocator.h"

namespace vattention {

// Plans to unmap a run's mappings from the first-th on, and its guard with them.
void Allocator::unmap_later(Work& work, std::vector<Unmapping>& unmappings, std::uint32_t slot,
                            std::uint32_t region, std::size_t first) {
  const Run& run = slots_[slot].runs[region];
  const std::size_t page = run.mappings[first].page;
  const std::size_t end = run.end + (run.guarded ? config_.guard_pages : 0);
  work.unmaps.push_back({page_address(slot, region, page), (end - page) * page_bytes_});
  unmappings.push_back({this, slot, region, first, 0});
}

bool Allocator::holed(const Slot& slot) noexcept {
  return std::any_of(slot.runs.begin(), slot.runs.end(),
                     [](const Run& run) { return run.holed(); });
}

std::size_t Allocator::unmap_slot_later(Work& work, std::vector<Unmapping>& unmappings,
                                        std::uint32_t slot) {
  for (std::uint32_t r = 0; r < config_.regions.size(); ++r) {
    if (!slots_[slot].runs[r].empty()) unmap_later(work, unmappings, slot, r, 0);
  }
  return mapped_pages(slots_[slot]) * page_bytes_;
}

// Freed slots whose fences have passed, and that the driver has, or has not, refused to unmap:
// those of no use to a next sequence, then those that were freed longest ago. Returns the bytes it
// plans to free.
std::size_t Allocator::plan_eviction(Work& work, std::vector<Unmapping>& unmappings,
                                     std::size_t bytes, bool refused) {
  if (closed_) return 0;  // its tensors may be read as long as they live
  std::vector<std::uint32_t> victims;
  for (std::uint32_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].state == SlotState::cached && slots_[i].refused == refused && usable(slots_[i])) {
      victims.push_back(i);
    }
  }
  std::sort(victims.begin(), victims.end(), [&](std::uint32_t a, std::uint32_t b) {
    if (holed(slots_[a]) != holed(slots_[b])) return holed(slots_[a]);
    return slots_[a].freed_at < slots_[b].freed_at;
  });
  std::size_t planned = 0;
  for (const std::uint32_t victim : victims) {
    if (planned >= bytes) break;
    planned += unmap_slot_later(work, unmappings, victim);
  }
  return planned;
}

void Allocator::plan_retired(Work& work, std::vector<Unmapping>& unmappings) {
  if (retired_entries_ == 0 || closed_) return;
  for (std::uint32_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].busy) continue;
    for (const Retired& retired : slots_[i].retired) {
      if (!pool_->has_passed(retired.fence)) break;
      for (const Cut& cut : retired.cuts) {
        const std::size_t end = cut.last() + (cut.guarded ? config_.guard_pages : 0);
        work.unmaps.push_back(
            {page_address(i, cut.region, cut.first()), (end - cut.first()) * page_bytes_});
        unmappings.push_back({this, i, cut.region, 0, retired.fence});
      }
    }
  }
}

bool Allocator::has_retired_tail(const Slot& slot) noexcept {
  return std::any_of(slot.retired.begin(), slot.retired.end(),
                     [](const Retired& retired) { return retired.tail; });
}

// Whole extents that live sequences do not need now, but, until its fence has passed, for those
// that a retired tail touches: growth may want to put that back behind them. Where they may still
// be cleared, or be what a trim has left to running kernels, they are in use: the device has to be
// synchronized before they are unmapped.
std::size_t Allocator::plan_surplus(Work& work, std::vector<Unmapping>& unmappings,
                                    std::size_t bytes, bool in_use) {
  if (closed_) return 0;
  std::size_t planned = 0;
  for (std::uint32_t i = 0; i < slots_.size() && planned < bytes; ++i) {
    Slot& slot = slots_[i];
    if (slot.state != SlotState::live || slot.busy || has_retired_tail(slot)) continue;
    if (!in_use && (slot.trimmed || is_clearing(slot))) continue;
    for (std::uint32_t r = 0; r < slot.runs.size(); ++r) {
      const Run& run = slot.runs[r];
      const std::size_t first = run.first_above(surplus_from(i, r, 0));
      if (first == run.mappings.size()) continue;
      planned += (run.end - run.mappings[first].page) * page_bytes_;
      unmap_later(work, unmappings, i, r, first);
    }
  }
  return planned;
}

void Allocator::note_refused(std::uint32_t index) noexcept {
  slots_[index].refused = true;
  slots_[index].freed_at = ++clock_;
}

void Allocator::finish_unmapping(const Unmapping& unmapping) {
  Slot& slot = slots_[unmapping.slot];
  if (unmapping.retired != 0) {
    const auto entry = std::find_if(slot.retired.begin(), slot.retired.end(),
                                    [&](const Retired& r) { return r.fence == unmapping.retired; });
    const auto cut = std::find_if(entry->cuts.begin(), entry->cuts.end(),
                                  [&](const Cut& c) { return c.region == unmapping.region; });
    for (const Mapping& mapping : cut->mappings) pool_->release(mapping.extent);
    if (cut->guarded) release_guard();
    entry->cuts.erase(cut);
    if (entry->cuts.empty()) {
      pool_->return_fence(entry->fence);
      slot.retired.erase(entry);
      --retired_entries_;
    }
    settle_cached(slot);
    return;
  }
  slot.refused = false;
  Run& run = slot.runs[unmapping.region];
  if (std::exchange(run.guarded, false)) release_guard();
  const auto first = run.mappings.begin() + static_cast<std::ptrdiff_t>(unmapping.first);
  run.end = first->page;
  run.clean_end = std::min(run.clean_end, run.end);
  for (auto mapping = first; mapping != run.mappings.end(); ++mapping) {
    pool_->release(mapping->extent);
  }
  run.mappings.erase(first, run.mappings.end());
  settle_cached(slot);
}

void Allocator::release_guard() {
  for (std::size_t i = 0; i < guard_count(); ++i) pool_->release(guard_);
}

void Allocator::settle_cached(Slot& slot) const noexcept {
  if (slot.state == SlotState::cached && mapped_pages(slot) == 0 && slot.retired.empty()) {
    slot.state = SlotState::empty;
  }
}

std::size_t Allocator::cached_bytes() const {
  if (closed_) return 0;
  std::size_t pages = 0;
  for (const Slot& slot : slots_) {
    if (slot.state == SlotState::cached && !slot.busy) pages += mapped_pages(slot);
  }
  return pages * page_bytes_;
}

std::size_t Allocator::reclaimable_bytes() const {
  if (closed_) return 0;
  std::size_t bytes = cached_bytes();
  for (std::uint32_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (slot.busy) continue;
    for (const Retired& retired : slot.retired) {
      for (const Cut& cut : retired.cuts) {
        for (const Mapping& m : cut.mappings) bytes += m.extent->pages() * page_bytes_;
      }
    }
    if (slot.state != SlotState::live) continue;
    for (std::uint32_t r = 0; r < slot.runs.size(); ++r) {
      const Run& run = slot.runs[r];
      const std::size_t first = run.first_above(surplus_from(i, r, 0));
      if (first == run.mappings.size()) continue;
      bytes += (run.end - run.mappings[first].page) * page_bytes_;
    }
  }
  return bytes;
}

// Whether the device is known to be done with all that the slot has: with what a live sequence has
// it may not be, whatever was enqueued where.
bool Allocator::is_quiet(Slot& slot) {
  if (mapped_pages(slot) > 0 && slot.state != SlotState::cached) return false;
  return !is_clearing(slot) && (!slot.fence_pending || pool_->has_passed(slot.fence)) &&
         std::all_of(slot.retired.begin(), slot.retired.end(),
                     [&](const Retired& retired) { return pool_->has_passed(retired.fence); });
}

// The last owner is gone: everything goes back.
void Allocator::tear_down() noexcept {
  try {
    std::list<Remains> one(1);
    Remains& remains = one.front();
    remains.reservation = {base_, config_.reserved_bytes};
    const auto add = [&](std::uint32_t slot, std::uint32_t region, std::size_t first,
                         std::size_t last, bool guarded, const std::vector<Mapping>& mappings) {
      const std::size_t end = last + (guarded ? config_.guard_pages : 0);
      Remains::Part& part = remains.parts.emplace_back();
      part.range = {page_address(slot, region, first), (end - first) * page_bytes_};
      for (const Mapping& mapping : mappings) part.extents.push_back(mapping.extent);
      if (guarded) part.extents.insert(part.extents.end(), guard_count(), guard_);
    };
    for (std::uint32_t s = 0; s < slots_.size(); ++s) {
      const Slot& slot = slots_[s];
      remains.whole = remains.whole && slot.state != SlotState::broken;
      for (std::uint32_t r = 0; r < slot.runs.size(); ++r) {
        const Run& run = slot.runs[r];
        if (!run.empty()) add(s, r, run.front, run.end, run.guarded, run.mappings);
      }
      for (const Retired& retired : slot.retired) {
        for (const Cut& cut : retired.cuts) {
          add(s, cut.region, cut.first(), cut.last(), cut.guarded, cut.mappings);
        }
      }
    }
    remains.guard = guard_;
    remains.quiet = !outlived_ || remains.parts.empty();
    {
      const Lock lock = pool_->lock();
      for (Slot& slot : slots_) {
        remains.quiet = remains.quiet && is_quiet(slot);
        for (const Retired& retired : slot.retired) pool_->return_fence(retired.fence);
        if (slot.fence != 0) pool_->return_fence(slot.fence);
        if (slot.cleared != 0) pool_->return_fence(slot.cleared);
      }
    }
    if (pool_->bury(std::move(one))) (void)Pool::bury_left_pools();
  } catch (...) {
    // Nothing can be reported from a destructor; the memory stays accounted as held.
  }
}

}  // namespace vattention
