// A batch of driver calls: prepared under the lock, run without it, settled under it again.
//
// Owns: the extents it carries, from the moment they are put in until it is settled.
// Always true: run() first unmaps and destroys, then creates, takes displaced guards away, maps,
// gives access and clears. If anything from creating on fails, all that became of the pieces is
// undone, so they are either all there or all gone; unmaps, destroys and `creates` stay done as far
// as they got, which `unmapped`, `destroyed` and the handles tell.
#pragma once

#include <cstddef>
#include <vector>

#include "backend/backend.h"
#include "core/extent.h"

namespace vattention {

struct Work {
  struct Range {
    Address address;
    std::size_t bytes;
  };
  struct Piece {
    Address address = 0;
    Extent* extent = nullptr;
    bool create = false;  // the extent has no handle yet
    bool alias = false;   // one more owner of an extent that stays with its others
    Access access = Access::read_write;
  };

  std::vector<Range> unmaps;
  std::vector<Extent*> destroys;
  std::vector<Extent*> creates;  // to be created and left unmapped
  std::vector<Piece> displaced;  // mapped now where `pieces` will be; put back on failure
  std::vector<Piece> pieces;     // neighbours in memory stand next to each other
  std::vector<Range> zeros;      // mapped ranges to clear, after mapping
  std::size_t exchanged_bytes =
      0;              // how much of `creates` and `pieces` takes the place of `destroys`
  Stream stream = 0;  // what clears is enqueued here
  bool wait = false;  // whether run() returns only when clearing is done

  // Outcome.
  std::size_t unmapped = 0;     // how many of `unmaps` were done
  std::size_t destroyed = 0;    // how many of `destroys` were done
  std::vector<Piece> stuck;     // pieces that could be neither used nor unmapped again
  bool displaced_lost = false;  // after a failure: what was displaced could not be put back

  // Requires: room in `stuck` for every piece.
  Status run(Backend& backend) noexcept;

 private:
  // How far building came, so that undoing knows what there is to undo.
  struct Progress {
    std::size_t filled = 0;     // of `pieces`, those with a handle
    std::size_t displaced = 0;  // of `displaced`
    std::size_t mapped = 0;     // of `pieces`
    bool cleared = false;
  };
  Status build(Backend& backend, Progress& progress) noexcept;
  void undo(Backend& backend, const Progress& progress) noexcept;
};

// Adds a range, merged with the last one where they touch.
void append_range(std::vector<Work::Range>& ranges, Address address, std::size_t bytes);

}  // namespace vattention
