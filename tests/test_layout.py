"""Layouts: every byte of many random ones is looked at, and known shapes give known numbers."""

import dataclasses
import itertools
import pickle
import random

import numpy as np
import pytest
import torch

import vattention as va
from vattention.errors import ConfigError
from vattention.layout import BALANCED_ROW_BYTES, KVLayout, TensorSpec

DTYPES = [
    torch.float32,
    torch.int32,
    torch.bfloat16,
    torch.float16,
    torch.int16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
    torch.int8,
]
PAGE = 2 * 2**20


def cases(count):
    """Run a test so many times; each case and the seed of the run make one random layout."""
    return pytest.mark.parametrize("case", range(count))


def random_layout(rng, times=1):
    """Return a small layout of any kind; half have sizes that 16 bytes do not divide.

    With heads that are `times` as large, a balanced row has no room for all layers.
    """
    num_layers = rng.randint(1, 7)
    order = rng.choice(["balanced", "layer", "token"])
    shared = order != "layer"
    odd = rng.random() < 0.5

    def dim():
        return times * (rng.randint(1, 13) if odd else 8 * rng.randint(1, 3))

    return KVLayout(
        num_layers=num_layers,
        num_kv_heads=rng.randint(1, 3),
        head_dim=dim(),
        dtype=rng.choice(DTYPES),
        order=order,
        v_head_dim=rng.choice([None, 0, dim()]),
        layers_per_row=rng.choice([None, rng.randint(1, num_layers)]) if shared else None,
        row_padding_bytes=rng.choice([0, 16, 48]) if shared else 0,
    )


def random_case(seed, case):
    """Return a layout, the sizes of a small cache, and its geometry; prints them for a failure."""
    rng = random.Random(f"{seed} {case}")
    layout = random_layout(rng)
    sizes = {"max_sequences": rng.randint(1, 3), "max_seq_len": rng.randint(1, 9)}
    page_bytes = 16 * rng.choice([1, 2, 3, 4, 16, 64])
    geometry = layout.region_geometry(
        **sizes, page_bytes=page_bytes, guard_pages=rng.choice([0, 0, 1, 3])
    )
    print(f"{layout} {sizes} page_bytes={page_bytes} {geometry}")
    return layout, sizes, page_bytes, geometry


def components(layout, geometry, max_sequences, max_seq_len):
    """Yield (start, bytes) of every component, by the definition of a placement."""
    for layer in range(layout.num_layers):
        place = layout.placement(layer)
        for region, offset, size in (
            (place.k_region, place.k_offset_bytes, layout.k_bytes),
            (place.v_region, place.v_offset_bytes, layout.v_bytes),
        ):
            for slot in range(max_sequences):
                for token in range(max_seq_len):
                    yield (
                        geometry.region_offsets_bytes[region]
                        + slot * geometry.slot_strides_bytes[region]
                        + token * layout.row_bytes[region]
                        + offset,
                        size,
                    )


def first_overlap(intervals):
    """Return the first two (start, bytes) that share a byte, or None."""
    ordered = sorted(interval for interval in intervals if interval[1])
    for (start, size), (next_start, next_size) in itertools.pairwise(ordered):
        if start + size > next_start:
            return (start, size), (next_start, next_size)
    return None


def over(flat, layout, spec):
    """Return the tensor that `spec` describes over a flat buffer of bytes."""
    start = spec.offset_bytes // layout.itemsize
    return torch.as_strided(flat.view(layout.dtype), spec.shape, spec.strides, start)


@cases(150)
def test_components_are_aligned_disjoint_and_inside_the_reservation(seed, case):
    layout, sizes, _, geometry = random_case(seed, case)
    found = list(components(layout, geometry, **sizes))
    assert len(found) == 2 * layout.num_layers * sizes["max_sequences"] * sizes["max_seq_len"]
    assert first_overlap(found) is None
    assert all(start % 16 == 0 for start, _ in found)
    assert all(start >= 0 and start + size <= geometry.reserved_bytes for start, size in found)
    own_bytes = sum(size for _, size in found)
    tokens = sizes["max_sequences"] * sizes["max_seq_len"]
    assert own_bytes == tokens * layout.token_bytes
    assert own_bytes <= tokens * layout.token_stride_bytes <= geometry.reserved_bytes


def test_the_search_for_overlaps_finds_a_byte_that_is_shared():
    assert first_overlap([(0, 16), (16, 16), (32, 0), (32, 1)]) is None
    assert first_overlap([(16, 16), (0, 17)]) == ((0, 17), (16, 16))


@cases(200)
def test_rows_hold_whole_layers_in_order_without_waste(seed, case):
    """Place components one after another, as the definition says, and compare."""
    layout = random_layout(random.Random(f"{seed} {case}"), times=100 if case % 2 else 1)
    print(layout)
    k_size, v_size = (-(-size // 16) * 16 for size in (layout.k_bytes, layout.v_bytes))
    apart = layout.order != "token" and v_size > 0
    rows = []
    expected = []
    layers = 0  # in the row, or in the two rows, at the end
    for _ in range(layout.num_layers):
        if layout.order == "layer":
            full = layers == 1
        elif layout.layers_per_row is not None:
            full = layers == layout.layers_per_row
        else:
            larger = (layers + 1) * max(k_size, v_size)
            full = layout.order == "balanced" and layers > 0 and larger > BALANCED_ROW_BYTES
        if full or not rows:
            rows += [0, 0] if apart else [0]
            layers = 0
        layers += 1
        v_region = len(rows) - 1
        k_region = v_region - 1 if apart else v_region
        k_offset = rows[k_region]
        rows[k_region] += k_size
        expected.append((k_region, k_offset, v_region, rows[v_region]))
        rows[v_region] += v_size
    assert layout.row_bytes == tuple(row + layout.row_padding_bytes for row in rows)
    assert layout.num_regions == len(rows)
    for layer, place in enumerate(expected):
        assert dataclasses.astuple(layout.placement(layer)) == place


@cases(150)
def test_geometry_puts_slots_on_pages_and_regions_back_to_back(seed, case):
    layout, sizes, page_bytes, _ = random_case(seed, case)
    for guard_pages in (0, 1, 3):
        geometry = layout.region_geometry(**sizes, page_bytes=page_bytes, guard_pages=guard_pages)
        ends = [
            offset + stride * sizes["max_sequences"]
            for offset, stride in zip(
                geometry.region_offsets_bytes, geometry.slot_strides_bytes, strict=True
            )
        ]
        assert geometry.region_offsets_bytes == (0, *ends[:-1])
        assert geometry.reserved_bytes == ends[-1]
        for stride, row in zip(geometry.slot_strides_bytes, layout.row_bytes, strict=True):
            whole_pages, rest = divmod(sizes["max_seq_len"] * row, page_bytes)
            least = whole_pages + (rest > 0) + guard_pages
            # The first number of pages, up to twice as many, that is one of rows too.
            whole_rows = [n for n in range(least, 2 * least + 1) if n * page_bytes % row == 0]
            assert stride == page_bytes * (whole_rows or [least])[0]


@cases(100)
def test_tensors_keep_what_is_written_at_the_bytes_of_their_components(seed, case):
    layout, sizes, _, geometry = random_case(seed, case)
    torch.manual_seed(seed)
    flat = torch.zeros(geometry.reserved_bytes, dtype=torch.uint8)
    written = []
    for layer in range(layout.num_layers):
        specs = layout.tensor_specs(
            layer,
            region_offsets_bytes=geometry.region_offsets_bytes,
            slot_strides_bytes=geometry.slot_strides_bytes,
            **sizes,
        )
        for spec, dim in zip(specs, (layout.head_dim, layout.v_dim), strict=True):
            assert spec.shape == (*sizes.values(), layout.num_kv_heads, dim)
            view = over(flat, layout, spec)
            # Made flat: torch views no tensor with a last dimension of 0 as a wider dtype.
            raw = torch.randint(0, 256, (view.numel() * layout.itemsize,)).to(torch.uint8)
            view.copy_(raw.view(layout.dtype).view(spec.shape))
            written.append((view, raw))
    for view, raw in written:
        read = view.clone(memory_format=torch.contiguous_format).flatten()
        assert torch.equal(read.view(torch.uint8), raw)

    # The same bytes again, now by the placements alone; whatever lies between must be untouched.
    expected = torch.zeros_like(flat)
    rows = torch.cat([raw for _, raw in written])
    position = 0
    for start, size in components(layout, geometry, **sizes):
        expected[start : start + size] = rows[position : position + size]
        position += size
    assert torch.equal(flat, expected)


@cases(150)
def test_pages_are_those_that_the_bytes_of_the_rows_touch(seed, case):
    layout, sizes, page_bytes, _ = random_case(seed, case)
    for tokens in range(sizes["max_seq_len"] + 1):
        touched = [
            {(token * row + byte) // page_bytes for token in range(tokens) for byte in range(row)}
            for row in layout.row_bytes
        ]
        assert layout.pages(tokens, page_bytes) == tuple(len(pages) for pages in touched)
        assert layout.mapped_bytes(tokens, page_bytes) == sum(map(len, touched)) * page_bytes


@cases(50)
def test_tokens_per_page_is_the_most_that_one_page_in_each_region_holds(seed, case):
    layout, _, page_bytes, _ = random_case(seed, case)
    tokens = layout.tokens_per_page(page_bytes)
    assert all(pages <= 1 for pages in layout.pages(tokens, page_bytes))
    assert any(pages > 1 for pages in layout.pages(tokens + 1, page_bytes))


def llama(**changes):
    """Return the layout of Llama-3-8B."""
    given = {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": torch.bfloat16}
    return KVLayout(**{**given, **changes})


@pytest.mark.parametrize(
    ("layout", "regions", "tokens_per_page", "least_bytes"),
    [
        (llama(), 16, 256, 16 * PAGE),
        (llama(layers_per_row=8), 8, 128, 8 * PAGE),
        (llama(layers_per_row=32), 2, 32, 2 * PAGE),
        (llama(row_padding_bytes=2048), 16, 204, 16 * PAGE),
        (llama(num_layers=3), 2, 341, 2 * PAGE),
        (llama(num_layers=10), 6, 256, 6 * PAGE),
        (llama(dtype=torch.float8_e4m3fn), 8, 256, 8 * PAGE),
        (llama(v_head_dim=0), 8, 256, 8 * PAGE),
        (llama(v_head_dim=64), 16, 256, 16 * PAGE),
        (llama(v_head_dim=256), 32, 256, 32 * PAGE),
        (llama(head_dim=512), 64, 256, 64 * PAGE),
        (llama(head_dim=520), 64, 252, 64 * PAGE),
        (llama(order="layer"), 64, 1024, 64 * PAGE),
        (llama(order="token"), 1, 16, PAGE),
        (llama(order="token", layers_per_row=8), 4, 64, 4 * PAGE),
        (llama(order="token", v_head_dim=0), 1, 32, PAGE),
        (llama(order="token", dtype=torch.float8_e4m3fn), 1, 32, PAGE),
        (llama(order="token", row_padding_bytes=2048), 1, 15, PAGE),
        (llama(order="token", num_layers=10, layers_per_row=4), 3, 128, 3 * PAGE),
    ],
)
def test_known_model_has_known_granularity(layout, regions, tokens_per_page, least_bytes):
    assert layout.num_regions == len(layout.row_bytes) == regions
    assert layout.tokens_per_page(PAGE) == tokens_per_page
    assert layout.mapped_bytes(1, PAGE) == least_bytes


def test_known_model_has_known_sizes():
    layout = llama(order="token", layers_per_row=24, row_padding_bytes=32)
    assert (layout.itemsize, layout.k_bytes, layout.v_bytes) == (2, 2048, 2048)
    assert layout.token_bytes == 131_072
    assert layout.row_bytes == (24 * 4096 + 32, 8 * 4096 + 32)
    assert layout.token_stride_bytes == 131_072 + 64
    balanced = dataclasses.replace(layout, order="balanced")
    assert balanced.token_bytes == 131_072
    assert balanced.row_bytes == (24 * 2048 + 32,) * 2 + (8 * 2048 + 32,) * 2
    assert balanced.token_stride_bytes == 131_072 + 128


def test_balanced_order_is_the_default_and_puts_four_layers_of_a_known_model_into_a_row():
    layout = llama()
    assert layout == llama(order="balanced")
    assert layout.row_bytes == (8192,) * 16
    assert [dataclasses.astuple(layout.placement(layer)) for layer in (0, 3, 4, 31)] == [
        (0, 0, 1, 0),
        (0, 6144, 1, 6144),
        (2, 0, 3, 0),
        (14, 6144, 15, 6144),
    ]


def test_balanced_rows_have_as_many_layers_where_k_and_v_differ():
    layout = llama(num_layers=10, v_head_dim=64)
    assert layout.row_bytes == (8192, 4096, 8192, 4096, 4096, 2048)
    assert dataclasses.astuple(layout.placement(9)) == (4, 2048, 5, 1024)
    assert llama(num_layers=3, v_head_dim=256).row_bytes == (4096, 8192, 2048, 4096)


def test_odd_sizes_are_rounded_to_16_bytes_each():
    layout = KVLayout(
        num_layers=2, num_kv_heads=1, head_dim=3, v_head_dim=9, dtype=torch.bfloat16, order="token"
    )
    assert (layout.k_bytes, layout.v_bytes, layout.token_bytes) == (6, 18, 48)
    assert layout.row_bytes == (2 * (16 + 32),)
    assert dataclasses.astuple(layout.placement(1)) == (0, 48, 0, 64)
    balanced = dataclasses.replace(layout, order="balanced")
    assert balanced.row_bytes == (2 * 16, 2 * 32)
    assert dataclasses.astuple(balanced.placement(1)) == (0, 16, 1, 32)


def test_latent_has_keys_only():
    layout = KVLayout.latent(num_layers=61, latent_dim=576, dtype=torch.bfloat16)
    assert (layout.num_kv_heads, layout.head_dim, layout.v_dim) == (1, 576, 0)
    assert layout.is_latent
    assert (layout.order, layout.v_bytes, layout.token_bytes) == ("balanced", 0, 61 * 1152)
    assert layout.row_bytes == (7 * 1152,) * 8 + (5 * 1152,)
    assert dataclasses.astuple(layout.placement(60)) == (8, 4 * 1152, 8, 5 * 1152)
    assert dataclasses.replace(layout, order="token").row_bytes == (61 * 1152,)
    by_layer = dataclasses.replace(layout, order="layer")
    assert by_layer.num_regions == 61
    assert dataclasses.astuple(by_layer.placement(60)) == (60, 0, 60, 1152)


@pytest.mark.parametrize(
    ("tokens", "guard_pages", "slot_pages"),
    [
        (1, 0, 1),  # three would be more than twice as many
        (341, 0, 1),
        (342, 0, 3),
        (341, 1, 3),
        (1024, 0, 3),
        (1024, 1, 6),
        (1025, 0, 6),
        (1025, 2, 6),
        (1025, 3, 9),
    ],
)
def test_slots_of_rows_of_6_kib_are_6_mib_apart_where_that_at_most_doubles_them(
    tokens, guard_pages, slot_pages
):
    layout = llama(num_layers=3)
    assert layout.row_bytes == (6144, 6144)
    geometry = layout.region_geometry(4, tokens, PAGE, guard_pages)
    assert geometry.slot_strides_bytes == (slot_pages * PAGE,) * 2
    assert geometry.region_offsets_bytes == (0, 4 * slot_pages * PAGE)
    assert geometry.reserved_bytes == 8 * slot_pages * PAGE


def test_each_region_has_slots_of_its_own_whole_rows():
    layout = llama(num_layers=5, layers_per_row=3)
    assert layout.row_bytes == (6144, 6144, 4096, 4096)
    geometry = layout.region_geometry(2, 1025, PAGE)
    assert geometry.slot_strides_bytes == (6 * PAGE, 6 * PAGE, 3 * PAGE, 3 * PAGE)
    assert geometry.region_offsets_bytes == (0, 12 * PAGE, 24 * PAGE, 30 * PAGE)


def test_addresses_of_slots_are_doubled_for_whole_rows_and_no_more():
    layout = KVLayout.latent(num_layers=1, latent_dim=32, dtype=torch.uint8)
    assert layout.region_geometry(1, 1, 48).slot_strides_bytes == (96,)
    assert layout.region_geometry(1, 1, 80).slot_strides_bytes == (160,)
    layout = KVLayout.latent(num_layers=1, latent_dim=48, dtype=torch.uint8)
    assert layout.region_geometry(1, 1, 64).slot_strides_bytes == (64,)


def test_millions_of_tokens_are_counted_exactly():
    layout = llama(num_layers=127, dtype=torch.float32, order="layer")
    tokens = 10_000_001
    assert layout.pages(tokens, PAGE) == (-(-tokens * 4096 // PAGE),) * 254
    geometry = layout.region_geometry(1024, tokens, PAGE)
    assert geometry.reserved_bytes == 1024 * layout.mapped_bytes(tokens, PAGE) > 2**53
    k, v = layout.tensor_specs(
        126,
        region_offsets_bytes=geometry.region_offsets_bytes,
        slot_strides_bytes=geometry.slot_strides_bytes,
        max_sequences=1024,
        max_seq_len=tokens,
    )
    stride = -(-tokens * 4096 // PAGE) * PAGE
    assert k == TensorSpec(
        offset_bytes=252 * 1024 * stride,
        shape=(1024, tokens, 8, 128),
        strides=(stride // 4, 1024, 128, 1),
    )
    assert v == dataclasses.replace(k, offset_bytes=253 * 1024 * stride)


def test_addresses_are_refused_only_beyond_their_limit():
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=16, v_head_dim=0, dtype=torch.uint8)
    assert layout.region_geometry(2**29, 2**29, 2**20).reserved_bytes == 2**62
    with pytest.raises(ConfigError, match=r"max_seq_len=536870913 need \d+ bytes of .*4.00 EiB"):
        layout.region_geometry(2**29, 2**29 + 1, 2**20)
    with pytest.raises(ConfigError, match="4.00 EiB"):
        layout.region_geometry(2**62, 2**62, 2**62 - 16, 2**62)


def test_integers_of_32_bits_do_not_wrap():
    small = np.int32
    layout = llama(
        num_layers=small(32), num_kv_heads=small(8), head_dim=small(128), v_head_dim=small(128)
    )
    same = llama(v_head_dim=128)
    assert layout == same
    args = small(4), small(131_072), small(2**21)
    assert layout.region_geometry(*args) == same.region_geometry(*map(int, args))
    assert layout.pages(small(131_072), small(2**21)) == same.pages(131_072, 2**21)
    with va.KVAllocator(
        layout, max_sequences=small(4), max_seq_len=small(131_072), device="cpu", memory="1MiB"
    ) as kv:
        assert kv._geometry.reserved_bytes == 64 * 2**30
        assert type(kv.max_seq_len) is int


def test_layout_is_a_value():
    layout, other = llama(), llama()
    assert layout.row_bytes and layout == other and hash(layout) == hash(other)
    assert pickle.loads(pickle.dumps(layout)) == layout
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.num_layers = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[
            ({name: bad}, f"{name} must be an int .*; got {bad!r}")
            for name in ("num_layers", "num_kv_heads", "head_dim", "layers_per_row")
            for bad in (0, -1, True, 1.0, "8")
        ],
        ({"num_layers": None}, "num_layers must be an int from 1 to 1048576; got None"),
        ({"num_layers": 2**20 + 1}, "num_layers must be an int from 1 to 1048576; got 1048577"),
        ({"head_dim": 2**62 + 1}, "head_dim must be an int of at most"),
        ({"v_head_dim": -1}, "v_head_dim must be an int of at least 0; got -1"),
        ({"v_head_dim": False}, "v_head_dim must be an int of at least 0; got False"),
        ({"dtype": torch.float64}, "dtype must be one of torch.float32, .*; got torch.float64"),
        ({"dtype": torch.bool}, "dtype must be one of .*; got torch.bool"),
        ({"dtype": torch.complex32}, "dtype must be one of"),
        ({"dtype": "bfloat16"}, "dtype must be one of .*; got 'bfloat16'"),
        ({"order": "head"}, r"order must be one of \('balanced', 'layer', 'token'\); got 'head'"),
        ({"order": ["token"]}, "order must be"),
        ({"layers_per_row": 33}, "layers_per_row must be an int from 1 to 32; got 33"),
        ({"order": "layer", "layers_per_row": 4}, "layers_per_row must be None with order"),
        ({"row_padding_bytes": 8}, "row_padding_bytes must be a multiple of 16; got 8"),
        ({"row_padding_bytes": -16}, "row_padding_bytes must be an int of at least 0; got -16"),
        ({"row_padding_bytes": False}, "row_padding_bytes must be an int"),
        ({"order": "layer", "row_padding_bytes": 16}, "row_padding_bytes must be 0 with order"),
    ],
)
def test_layout_refuses(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        llama(**changes)


def specs_of(layout, **changes):
    given = {
        "region_offsets_bytes": [0],
        "slot_strides_bytes": [10 * layout.token_stride_bytes],
        "max_sequences": 4,
        "max_seq_len": 10,
    }
    return layout.tensor_specs(0, **{**given, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: a.placement(-1), "layer must be an int from 0 to 31; got -1"),
        (lambda a: a.placement(32), "layer must be an int from 0 to 31; got 32"),
        (lambda a: a.placement(True), "layer must be an int"),
        (lambda a: a.pages(-1, PAGE), "tokens must be an int of at least 0; got -1"),
        (lambda a: a.pages(1, 0), "page_bytes must be an int of at least 1; got 0"),
        (lambda a: a.mapped_bytes(1, 24), "page_bytes must be a multiple of 16; got 24"),
        (lambda a: a.tokens_per_page(-PAGE), "page_bytes must be an int of at least 1"),
        (lambda a: a.region_geometry(0, 1, PAGE), "max_sequences must be an int"),
        (lambda a: a.region_geometry(1, 0, PAGE), "max_seq_len must be an int"),
        (lambda a: a.region_geometry(1, 1, True), "page_bytes must be an int"),
        (lambda a: a.region_geometry(1, 1, PAGE, -1), "guard_pages must be an int"),
        (lambda a: specs_of(a, max_sequences=0), "max_sequences must be an int"),
        (lambda a: specs_of(a, max_seq_len=0), "max_seq_len must be an int"),
        (lambda a: specs_of(a, max_seq_len=11), r"slot_strides_bytes\[0\] must be an int of at"),
        (lambda a: specs_of(a, slot_strides_bytes=[PAGE + 8]), r"slot_strides_bytes\[0\] must be"),
        (lambda a: specs_of(a, region_offsets_bytes=[8]), r"region_offsets_bytes\[0\] must be a"),
        (lambda a: specs_of(a, region_offsets_bytes=[]), "region_offsets_bytes must have one .* 1"),
        (lambda a: specs_of(a, slot_strides_bytes=[0, 0]), "slot_strides_bytes must have one"),
        (lambda _: specs_of(llama()), "region_offsets_bytes must have one .* 16 regions; got 1"),
        (
            lambda _: KVLayout.latent(num_layers=1, latent_dim=0, dtype=torch.uint8),
            "latent_dim must be an int of at least 1; got 0",
        ),
    ],
)
def test_methods_refuse(call, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        call(llama(order="token"))
