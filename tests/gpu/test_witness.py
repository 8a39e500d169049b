"""cuda-python, which knows nothing of this package, says what is mapped where."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

import vattention as va

driver = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")

pytestmark = pytest.mark.gpu

SEQUENCES = 6
MAX_SEQ_LEN = 16_384
MiB = 1 << 20

LAYOUTS = {
    # 2,048 bytes a row: 1,024 tokens fill a page of 2 MiB.
    "layer": va.KVLayout(
        num_layers=3, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16, order="layer"
    ),
    # 12,304 bytes a row, which do not divide a page.
    "token": va.KVLayout(
        num_layers=3,
        num_kv_heads=8,
        head_dim=128,
        dtype=torch.bfloat16,
        order="token",
        row_padding_bytes=16,
    ),
}
# More than the slack that a sequence of a few tokens can have as memory of its own.
SLACK_TOKENS = {"layer": 2_048, "token": 256}

# What the driver may answer when asked about an address that has nothing behind it. Anything else
# that is not success says that the question was wrong.
NOTHING_THERE = {"CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_NOT_MAPPED", "CUDA_ERROR_NOT_FOUND"}
ACCESS = {0: "none", 1: "read", 3: "read_write"}


class Witness:
    """The driver's own view of one device's addresses."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")  # makes the context current on this thread
        self._location = driver.CUmemLocation()
        self._location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._location.id = torch.cuda.current_device()

    @staticmethod
    def _succeeded(code: object) -> bool:
        if code == driver.CUresult.CUDA_SUCCESS:
            return True
        assert code.name in NOTHING_THERE, code
        return False

    def access(self, address: int) -> str:
        code, flags = driver.cuMemGetAccess(self._location, address)
        return ACCESS[int(flags)] if self._succeeded(code) else "none"

    def handle(self, address: int) -> int | None:
        code, handle = driver.cuMemRetainAllocationHandle(address)
        if not self._succeeded(code):
            return None
        (code,) = driver.cuMemRelease(handle)  # give up what asking took
        assert code == driver.CUresult.CUDA_SUCCESS, code
        return int(handle)

    @staticmethod
    def free_bytes() -> int:
        code, free, _ = driver.cuMemGetInfo()
        assert code == driver.CUresult.CUDA_SUCCESS, code
        return int(free)


@pytest.fixture(scope="module")
def witness() -> Witness:
    return Witness()


def regions(kv: va.KVAllocator) -> dict[int, tuple[int, int]]:
    """For each region its first address and the bytes between slots, as its tensors show them."""
    found = {}
    for layer in range(kv.layout.num_layers):
        place = kv.layout.placement(layer)
        k, v = kv.layer(layer)
        for tensor, region, offset in (
            (k, place.k_region, place.k_offset_bytes),
            (v, place.v_region, place.v_offset_bytes),
        ):
            here = (tensor.data_ptr() - offset, tensor.stride(0) * tensor.element_size())
            assert found.setdefault(region, here) == here
    assert len(found) == kv.layout.num_regions
    return found


def addresses(kv: va.KVAllocator) -> Iterator[tuple[int, int, int]]:
    """Slot, region and address of every page that is reserved."""
    for region, (base, stride) in regions(kv).items():
        assert stride % kv.pool.page_bytes == 0
        for slot in range(kv.max_sequences):
            start = base + slot * stride
            for address in range(start, start + stride, kv.pool.page_bytes):
                yield slot, region, address


def agree(kv: va.KVAllocator, witness: Witness) -> dict[tuple[int, int], int]:
    """Every reserved page is as `mappings` says, and each sequence's tokens are mapped.

    Returns how many pages of each slot and region can be written.
    """
    page = kv.pool.page_bytes
    told = {}
    for slot, region, address, size, handle, access in kv.mappings():
        assert size % page == 0
        for at in range(address, address + size, page):
            assert (slot, region, at) not in told, "two mappings in one place"
            told[slot, region, at] = (access, handle)
    writable: dict[tuple[int, int], int] = {}
    for where in addresses(kv):
        access, handle = told.pop(where, ("none", None))
        address = where[2]
        assert witness.access(address) == access, where
        assert witness.access(address + page - 16) == access, where
        assert witness.handle(address + page // 2) == handle, where
        if access == "read_write":
            writable[where[:2]] = writable.get(where[:2], 0) + 1
    assert not told, "mappings outside of the slots"
    owned = [handle for *_, handle, access in kv.mappings() if access == "read_write"]
    assert len(set(owned)) == len(owned), "an extent has two owners"
    assert kv.pool.stats().mappings == len(kv.mappings())
    kv.check()
    return writable


def make(order: str, **options: object) -> va.KVAllocator:
    settings = {"memory": "4GiB", "lookahead_tokens": 0, "background": False} | options
    return va.KVAllocator(
        LAYOUTS[order],
        max_sequences=SEQUENCES,
        max_seq_len=MAX_SEQ_LEN,
        device="cuda",
        **settings,
    )


def lengths_of_interest(kv: va.KVAllocator) -> list[int]:
    tokens = kv.layout.tokens_per_page(kv.pool.page_bytes)
    return [0, 1, tokens - 1, tokens, tokens + 1, 5 * tokens + 3]


def expect_pages(
    kv: va.KVAllocator, writable: dict[tuple[int, int], int], sequences: list[va.Sequence]
) -> None:
    """Exactly the pages that the tokens need, which is so where there is neither slack nor trim."""
    expected = {
        (seq.slot, region): pages
        for seq in sequences
        for region, pages in enumerate(kv.layout.pages(seq.length, kv.pool.page_bytes))
        if pages
    }
    assert writable == expected


@pytest.mark.parametrize("order", LAYOUTS)
def test_allocate_and_step(order: str, witness: Witness) -> None:
    with make(order) as kv:
        assert agree(kv, witness) == {}
        lengths = lengths_of_interest(kv)
        sequences = [kv.allocate(length) for length in lengths]
        expect_pages(kv, agree(kv, witness), sequences)

        tokens = kv.layout.tokens_per_page(kv.pool.page_bytes)
        for more in (1, tokens, 3 * tokens + 1):
            kv.step({seq: seq.length + more for seq in sequences})
            expect_pages(kv, agree(kv, witness), sequences)


def test_one_handle_backs_all_pages_of_an_extent(witness: Witness) -> None:
    with make("layer") as kv:
        seq = kv.allocate(MAX_SEQ_LEN)  # 16 pages a region
        agree(kv, witness)
        page = kv.pool.page_bytes
        extents = [m for m in kv.mappings() if m[0] == seq.slot]
        assert max(size for _, _, _, size, _, _ in extents) > page
        seen = []
        for _, _, address, size, _, _ in extents:
            handles = {witness.handle(at) for at in range(address, address + size, page)}
            assert len(handles) == 1
            seen += handles
        assert len(set(seen)) == len(extents)


@pytest.mark.parametrize("order", LAYOUTS)
def test_trim_unmaps_the_tail(order: str, witness: Witness) -> None:
    with make(order, max_extent="4MiB") as kv:
        sequences = [kv.allocate(length) for length in (9_000, 5_000, 3_000)]
        before = agree(kv, witness)
        for seq in sequences:
            seq.trim(seq.length // 3)
        torch.cuda.synchronize()
        kv.reclaim()
        after = agree(kv, witness)
        for where, pages in after.items():
            needed = kv.layout.pages(sequences[where[0]].length, kv.pool.page_bytes)[where[1]]
            assert needed <= pages <= needed + 1  # extents have at most two pages
            assert pages < before[where]
        assert kv.stats().retired_bytes == 0
        assert kv.stats().held_bytes == sum(after.values()) * kv.pool.page_bytes


@pytest.mark.parametrize("order", LAYOUTS)
def test_the_background_thread_unmaps_what_was_trimmed(order: str, witness: Witness, until) -> None:
    with make(order, max_extent="2MiB", background=True) as kv:
        seq = kv.allocate(9_000)
        held = kv.stats().held_bytes
        before = agree(kv, witness)
        seq.trim(100)
        until(lambda: kv.stats().retired_bytes == 0)
        after = agree(kv, witness)
        assert sum(after.values()) < sum(before.values())
        # Unmapped, and kept for the next sequence.
        stats = kv.pool.stats()
        assert stats.held_bytes == held
        assert stats.free_bytes == held - sum(after.values()) * kv.pool.page_bytes


@pytest.mark.parametrize("order", LAYOUTS)
def test_trim_front_unmaps_the_front(order: str, witness: Witness) -> None:
    with make(order, max_extent="2MiB") as kv:
        seq = kv.allocate(9_000)
        before = agree(kv, witness)
        seq.trim_front(6_000)
        torch.cuda.synchronize()
        kv.reclaim()
        after = agree(kv, witness)
        gone = [6_000 * row // kv.pool.page_bytes for row in kv.layout.row_bytes]
        assert after == {where: pages - gone[where[1]] for where, pages in before.items()}
        for region, (base, stride) in regions(kv).items():
            start = base + seq.slot * stride
            first_byte = start + 6_000 * kv.layout.row_bytes[region]
            assert witness.access(start) == "none"
            assert witness.access(first_byte) == "read_write"


@pytest.mark.parametrize("order", LAYOUTS)
def test_freed_slots_stay_mapped_until_reclaim(order: str, witness: Witness) -> None:
    with make(order) as kv:
        sequences = [kv.allocate(length) for length in lengths_of_interest(kv)]
        before = agree(kv, witness)
        for seq in sequences:
            seq.free()
        assert agree(kv, witness) == before
        again = kv.allocate(lengths_of_interest(kv)[3])
        assert agree(kv, witness) == before
        again.free()
        torch.cuda.synchronize()
        held = kv.stats().held_bytes
        assert held > 0
        assert kv.reclaim() == held
        assert agree(kv, witness) == {}
        assert kv.mappings() == []
        assert kv.stats().held_bytes == 0


@pytest.mark.parametrize("order", LAYOUTS)
def test_guards_are_read_only_aliases_of_one_extent(order: str, witness: Witness) -> None:
    slack = SLACK_TOKENS[order]
    with make(order, tail_slack_tokens=slack) as kv:
        guard_bytes = kv.stats().guard_bytes
        assert guard_bytes > 0
        short = [kv.allocate(10) for _ in range(3)]
        empty = kv.allocate(0)
        long = kv.allocate(MAX_SEQ_LEN)
        agree(kv, witness)

        guards = [m for m in kv.mappings() if m[5] == "read"]
        assert {m[0] for m in guards} == {seq.slot for seq in short}
        assert {m[1] for m in guards} == set(range(kv.layout.num_regions))
        assert {witness.access(address) for _, _, address, *_ in guards} == {"read"}
        assert len({witness.handle(address) for _, _, address, *_ in guards}) == 1
        assert not any(m[0] in (empty.slot, long.slot) for m in guards)

        # The slack can be read, and is zero.
        for seq in short:
            for layer in range(kv.layout.num_layers):
                for tensor in kv.layer(layer):
                    tail = tensor[seq.slot, seq.length : seq.length + slack]
                    assert int((tail != 0).sum()) == 0

        # Growing turns guards into memory, and leaves the others' as they are.
        kv.step({short[1]: 5_000})
        agree(kv, witness)
        guarded = {m[0] for m in kv.mappings() if m[5] == "read"}
        assert guarded == {short[0].slot, short[2].slot}
        for tensor in kv.layer(0):
            assert int((tensor[short[1].slot, : 5_000 + slack] != 0).sum()) == 0

        for seq in (*short, empty, long):
            seq.free()
        torch.cuda.synchronize()
        kv.reclaim()
        assert agree(kv, witness) == {}
        assert kv.mappings() == []
        assert kv.stats().held_bytes == guard_bytes


def test_the_device_has_less_free_by_what_is_held(witness: Witness) -> None:
    tolerance = 64 * MiB
    with make("layer", memory="8GiB") as kv:
        before = witness.free_bytes()
        sequences = [kv.allocate(MAX_SEQ_LEN) for _ in range(SEQUENCES)]
        held = kv.stats().held_bytes
        assert held > 1_000 * MiB
        assert before - witness.free_bytes() == pytest.approx(held, abs=tolerance)

        for seq in sequences[2:]:
            seq.free()
        torch.cuda.synchronize()
        kv.reclaim()
        less = kv.stats().held_bytes
        assert 0 < less < held
        assert before - witness.free_bytes() == pytest.approx(less, abs=tolerance)
    del kv, sequences, seq
    gc.collect()
    assert before - witness.free_bytes() == pytest.approx(0, abs=tolerance)


def test_nothing_is_mapped_after_the_last_owner_has_gone(witness: Witness) -> None:
    kv = make("token")
    seq = kv.allocate(5_000)
    everywhere = list(addresses(kv))
    assert any(witness.access(address) == "read_write" for *_, address in everywhere)
    kv.close()
    del kv, seq
    gc.collect()
    assert {witness.access(address) for *_, address in everywhere} == {"none"}
    assert {witness.handle(address) for *_, address in everywhere} == {None}
