// What must always be true, recomputed from scratch. Costs time in proportion to everything held.
#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

#include "core/allocator.h"
#include "core/pool.h"
#include "core/trace.h"

namespace vattention {
namespace {

void always(bool holds, const char* what) {
  if (!holds) throw std::logic_error(std::string("vattention invariant broken: ") + what);
}

}  // namespace

void Pool::audit() const {
  if (debug_level() >= 2) check_locked();
}

void Pool::check() const {
  const Lock guard = lock();
  check_locked();
}

void Allocator::check() const { pool_->check(); }

void Pool::check_locked() const {
  always(held_bytes_ <= config_.budget_bytes, "physical bytes exceed the budget");
  std::map<const Extent*, std::size_t> owners;
  for (const Allocator* allocator : allocators_) allocator->check_locked(&owners);
  for (const Remains& remains : unburied_) {
    if (remains.guard != nullptr) ++owners[remains.guard];
    for (const Remains::Part& part : remains.parts) {
      for (const Extent* extent : part.extents) ++owners[extent];
    }
  }
  if (working_ > 0) return;  // what is carried is in no list now

  std::size_t free_total = 0;
  for (std::size_t order = 0; order < kOrders; ++order) {
    for (const Extent* extent = free_[order].top(); extent != nullptr; extent = extent->below) {
      always(extent->order == order, "an extent is in another size's free list");
      always(extent->handle != 0 && extent->owners == 0, "a free extent is owned or not created");
      always(owners.count(extent) == 0, "a free extent is mapped");
      owners[extent] = 0;
      free_total += bytes(*extent);
    }
  }
  always(free_total == free_bytes_, "free bytes are not what the free lists hold");
  std::size_t held_total = 0;
  for (const auto& [extent, count] : owners) {
    always(extent->handle != 0, "a mapped extent has no handle");
    always(extent->owners == count || (stuck_bytes_ > 0 && extent->owners > count),
           "an extent's owners are not its mappings");
    held_total += bytes(*extent);
  }
  if (stuck_bytes_ == 0) {
    always(held_total == held_bytes_, "held bytes are not what exists");
    always(extents_.size() == owners.size() + spare_records_.size(), "an extent was lost");
  }
}

void Allocator::check_locked(std::map<const Extent*, std::size_t>* owners) const {
  std::size_t retired_entries = 0;
  if (guard_ != nullptr) (*owners)[guard_] += 1;  // the allocator itself
  const auto own = [&](const Mapping& mapping) {
    always(++(*owners)[mapping.extent] == 1, "an extent has two places");
  };
  for (std::uint32_t s = 0; s < slots_.size(); ++s) {
    const Slot& slot = slots_[s];
    retired_entries += slot.retired.size();
    if (slot.busy) continue;
    for (const Retired& retired : slot.retired) {
      always(!retired.cuts.empty(), "a retired entry is empty");
      for (const Cut& cut : retired.cuts) {
        std::for_each(cut.mappings.begin(), cut.mappings.end(), own);
        if (cut.guarded) (*owners)[guard_] += guard_count();
      }
    }
    for (std::uint32_t r = 0; r < slot.runs.size(); ++r) {
      const Run& run = slot.runs[r];
      std::size_t page = run.front;
      for (const Mapping& mapping : run.mappings) {
        always(mapping.page == page, "a run has a gap");
        page += mapping.extent->pages();
        own(mapping);
      }
      always(page == run.end || (run.mappings.empty() && run.empty()), "a run ends elsewhere");
      if (run.guarded) (*owners)[guard_] += guard_count();
      always(!run.guarded || !run.empty(), "a guard has lost its run");
      always(slot.state != SlotState::empty || run.empty(), "an empty slot has memory");
      if (slot.state == SlotState::live && lengths_[s] > slot.first_token) {
        const std::size_t low =
            static_cast<std::size_t>(slot.first_token) * config_.regions[r].row_bytes / page_bytes_;
        always(run.front <= low, "a live token is not mapped (front)");
        always(pages_for(r, lengths_[s]) <= std::min(run.end, run.clean_end),
               "a live token is not mapped and clean");
      }
    }
    if (slot.state != SlotState::live) {
      always(ready_[s] == 0 && lengths_[s] == 0, "a slot without a sequence has a length");
    } else if (!closed_) {
      always(slot.state == SlotState::broken || lengths_[s] <= ready_[s] ||
                 config_.tail_slack_tokens > 0,
             "a live sequence is longer than what is ready");
    }
  }
  always(retired_entries == retired_entries_, "retired entries are miscounted");
}

}  // namespace vattention
