"""Sizes as people write and read them."""

import random
from fractions import Fraction

import pytest

from vattention.config import MAX_BYTES, check_int, format_bytes, parse_bytes
from vattention.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, 1),
        (4096, 4096),
        (MAX_BYTES, MAX_BYTES),
        ("4096", 4096),
        ("4096B", 4096),
        ("60GiB", 60 * 2**30),
        ("512MiB", 512 * 2**20),
        ("1.5 GB", 1_500_000_000),
        ("1KiB", 2**10),
        ("1KB", 1000),
        ("3 mb", 3_000_000),
        ("2TiB", 2**41),
        ("2TB", 2 * 10**12),
        ("4 EiB", MAX_BYTES),
        ("  1.25\tgib ", 5 * 2**28),
        (".5KiB", 512),
        ("1.", 1),
        ("1.9", 1),
        ("0.001 KiB", 1),
        # In doubles these two are 2**53 and 1_100_000_000_000_000.1...
        ("9007199254740993", 2**53 + 1),
        ("1100.000000000000001 TB", 1_100_000_000_000_000),
    ],
)
def test_parse_bytes_reads(given, expected):
    result = parse_bytes(given, name="memory")
    assert result == expected
    assert type(result) is int


@pytest.mark.parametrize(
    "given",
    [
        *(0, -1, True, False, 1.5, 1e9, None, b"1GiB", [1], MAX_BYTES + 1, 10**5000),
        *("", " ", "0", "0GiB", "0.5", "-1GiB", "+1GiB", "GiB", "1 G iB", "60G", "60Gi", "1GiBs"),
        *("1e9", "1_000", "1,000", "0x10", "nan", "inf", "1.2.3GB", ".", ".GiB", "1/2GiB"),
        *("\u0663GiB", "4.1EiB", "9" * 40, "9" * 41, "9" * 5000, "5 EiB"),
    ],
    ids=lambda given: repr(given)[:12] if not isinstance(given, int) else hex(given)[:12],
)
def test_parse_bytes_refuses_and_gives_an_example(given):
    with pytest.raises(ConfigError, match='^memory must be .*"60GiB".*; got ') as caught:
        parse_bytes(given, name="memory")
    assert len(str(caught.value)) < 300


def test_parse_bytes_reads_zero_where_it_is_allowed():
    for zero in (0, "0", "0GiB", " 0 b", "0.5"):
        assert parse_bytes(zero, name="low", minimum=0) == 0
    for given in (-1, None, "", 1.5):
        with pytest.raises(ConfigError, match="^low must be "):
            parse_bytes(given, name="low", minimum=0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (2**20 - 1, "1.00 MiB"),
        (1023 * 2**10 + 1018, "1023.99 KiB"),
        (3 * 2**29, "1.50 GiB"),
        (64 * 2**40, "64.00 TiB"),
        (MAX_BYTES, "4.00 EiB"),
        (2**80, "1048576.00 EiB"),
        (-(2**21), "-2.00 MiB"),
        (-5, "-5 B"),
    ],
)
def test_format_bytes_writes(given, expected):
    assert format_bytes(given) == expected


def test_parse_undoes_format_within_its_decimals(seed):
    rng = random.Random(seed)
    for _ in range(2_000):
        n = rng.randrange(1, 2 ** rng.randrange(1, 62))
        text = format_bytes(n)
        assert abs(parse_bytes(text, name="n") - n) <= 1 + Fraction(n, 200), (n, text)


def test_check_int_returns_what_is_in_range():
    assert [check_int(n, name="n", minimum=0, maximum=2) for n in (0, 1, 2)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "n must be an int of at least 1; got 0"),
        (True, "n must be an int of at least 1; got True"),
        (1.0, "n must be an int of at least 1; got 1.0"),
        (None, "n must be an int of at least 1; got None"),
        (MAX_BYTES + 1, f"n must be an int of at most {MAX_BYTES}; got {MAX_BYTES + 1}"),
        pytest.param(
            2**20_000,
            f"n must be an int of at most {MAX_BYTES}; got an int of 20001 bits",
            id="huge",
        ),
    ],
)
def test_check_int_refuses(given, message):
    with pytest.raises(ConfigError) as caught:
        check_int(given, name="n", minimum=1)
    assert str(caught.value) == message


def test_check_int_names_both_ends_of_a_range():
    with pytest.raises(ConfigError, match="^layer must be an int from 0 to 31; got 32$"):
        check_int(32, name="layer", minimum=0, maximum=31)
