#include "core/work.h"

namespace vattention {
namespace {

Status create_extent(Backend& backend, Extent& extent) noexcept {
  const Status status = backend.create(extent.pages() * backend.page_bytes(), &extent.handle);
  if (status.ok()) extent.dirty = !backend.fresh_memory_is_zero();
  return status;
}

// An extent that cannot be destroyed keeps its handle, and is settled as one that exists.
void destroy_extent(Backend& backend, Extent& extent) noexcept {
  if (backend.destroy(extent.handle).ok()) extent.handle = 0;
}

// Gives access with one call to each stretch of neighbours.
Status give_access(Backend& backend, const std::vector<Work::Piece>& pieces) noexcept {
  for (std::size_t first = 0; first < pieces.size();) {
    std::size_t bytes = 0;
    std::size_t next = first;
    while (next < pieces.size() && pieces[next].address == pieces[first].address + bytes &&
           pieces[next].access == pieces[first].access) {
      bytes += pieces[next].extent->pages() * backend.page_bytes();
      ++next;
    }
    const Status status = backend.set_access(pieces[first].address, bytes, pieces[first].access);
    if (!status.ok()) return status;
    first = next;
  }
  return {};
}

Status map_piece(Backend& backend, const Work::Piece& piece) noexcept {
  return backend.map(piece.address, piece.extent->pages() * backend.page_bytes(),
                     piece.extent->handle);
}

Status unmap_piece(Backend& backend, const Work::Piece& piece) noexcept {
  return backend.unmap(piece.address, piece.extent->pages() * backend.page_bytes());
}

}  // namespace

void append_range(std::vector<Work::Range>& ranges, Address address, std::size_t bytes) {
  if (!ranges.empty() && ranges.back().address + ranges.back().bytes == address) {
    ranges.back().bytes += bytes;
  } else {
    ranges.push_back({address, bytes});
  }
}

Status Work::run(Backend& backend) noexcept {
  for (; unmapped < unmaps.size(); ++unmapped) {
    const Range& range = unmaps[unmapped];
    if (const Status status = backend.unmap(range.address, range.bytes); !status.ok())
      return status;
  }
  for (; destroyed < destroys.size(); ++destroyed) {
    if (const Status status = backend.destroy(destroys[destroyed]->handle); !status.ok()) {
      return status;
    }
    destroys[destroyed]->handle = 0;
  }
  Progress progress;
  const Status status = build(backend, progress);
  if (!status.ok()) undo(backend, progress);
  return status;
}

Status Work::build(Backend& backend, Progress& progress) noexcept {
  for (Extent* extent : creates) {
    if (const Status status = create_extent(backend, *extent); !status.ok()) return status;
  }
  for (; progress.filled < pieces.size(); ++progress.filled) {
    Piece& piece = pieces[progress.filled];
    if (!piece.create) continue;
    if (const Status status = create_extent(backend, *piece.extent); !status.ok()) return status;
  }
  for (; progress.displaced < displaced.size(); ++progress.displaced) {
    const Status status = unmap_piece(backend, displaced[progress.displaced]);
    if (!status.ok()) return status;
  }
  for (; progress.mapped < pieces.size(); ++progress.mapped) {
    const Status status = map_piece(backend, pieces[progress.mapped]);
    if (!status.ok()) return status;
  }
  if (const Status status = give_access(backend, pieces); !status.ok()) return status;
  for (const Range& range : zeros) {
    const Status status = backend.zero(range.address, range.bytes, stream);
    if (!status.ok()) return status;
    progress.cleared = true;
  }
  if (wait && progress.cleared) return backend.synchronize(stream);
  return {};
}

// Failures are not reported from here: the first one, which the caller has, is the one that counts.
void Work::undo(Backend& backend, const Progress& progress) noexcept {
  // Nothing may be unmapped under a clear that is still running.
  const bool quiet = !progress.cleared || backend.synchronize(stream).ok();
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const Piece& piece = pieces[i];
    if (i < progress.mapped && (!quiet || !unmap_piece(backend, piece).ok())) {
      stuck.push_back(piece);
    } else if (piece.create && i < progress.filled) {
      destroy_extent(backend, *piece.extent);
    }
  }
  for (std::size_t i = 0; i < progress.displaced; ++i) {
    const Piece& piece = displaced[i];
    const std::size_t bytes = piece.extent->pages() * backend.page_bytes();
    if (!map_piece(backend, piece).ok() ||
        !backend.set_access(piece.address, bytes, piece.access).ok()) {
      displaced_lost = true;
    }
  }
}

}  // namespace vattention
