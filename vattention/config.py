"""Checking and reading of settings: whole numbers and sizes in bytes."""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
import re
from fractions import Fraction

from vattention.errors import ConfigError

__all__ = [
    "MAX_BYTES",
    "check_bool",
    "check_int",
    "check_number",
    "check_tokens",
    "format_bytes",
    "parse_bytes",
]

MAX_BYTES = 2**62
"""No size, count or product of them may be above this, so that all fit a signed 64-bit integer
with room for an addition. Address spaces are far smaller."""

_PREFIXES = "KMGTPE"
_UNIT_BYTES = {
    "b": 1,
    **{f"{p}B".lower(): 1000**i for i, p in enumerate(_PREFIXES, start=1)},
    **{f"{p}iB".lower(): 1024**i for i, p in enumerate(_PREFIXES, start=1)},
}

# The digits are bounded because Python refuses to convert, or to print, integers of thousands.
_SIZE = re.compile(r"([0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})\s*([a-z]*)", re.IGNORECASE)
_SIZE_ALLOWED = (
    'a whole number of bytes or a size such as "60GiB", "1.5 GB", "512MiB" or "4096" '
    "(KiB to EiB are powers of 1024, KB to EB of 1000)"
)


def check_int(value: object, *, name: str, minimum: int, maximum: int = MAX_BYTES) -> int:
    """Return `value` if it is a whole number in a range.

    Args:
        value: what the caller gave: an int, or an integer of another library, such as NumPy's. A
            bool is none.
        name: what the caller calls it; the message begins with it.
        minimum: least value allowed.
        maximum: greatest value allowed.

    Raises:
        ConfigError: it is of another type or out of range.
    """
    number: int | None = None
    if not isinstance(value, bool) and hasattr(value, "__index__"):
        # A tensor or an array has one too, which not all of them can give.
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            number = operator.index(value)
    if number is not None and minimum <= number <= maximum:
        return number
    limit = f"from {minimum} to {maximum}" if maximum != MAX_BYTES else f"of at least {minimum}"
    if minimum == -MAX_BYTES:
        limit = "of at most 63 bits"
    if number is not None and number > MAX_BYTES:
        limit = f"of at most {maximum}"
    raise ConfigError(f"{name} must be an int {limit}; got {_shown(value)}")


def check_number(value: object, *, name: str, minimum: float = -math.inf) -> float:
    """Return `value`, as Python's own, if it is a finite number of at least `minimum`.

    Raises:
        ConfigError: it is none; a bool is none.
    """
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):  # an int that no float can be
            number = float(value)
            if math.isfinite(number) and number >= minimum:
                return number
    limit = "" if minimum == -math.inf else f" of at least {minimum:g}"
    raise ConfigError(f"{name} must be a finite number{limit}; got {_shown(value)}")


def check_tokens(value: object, *, name: str) -> int:
    """Return `value` if it is a whole number; whether it fits is for the allocator to say.

    Raises:
        ConfigError: it is none, or no 64-bit one.
    """
    return check_int(value, name=name, minimum=-MAX_BYTES)


def check_bool(value: object, *, name: str) -> bool:
    """Return `value` if it is True or False.

    Raises:
        ConfigError: it is something else, also if that would count as one of them.
    """
    if isinstance(value, bool):
        return value
    raise ConfigError(f"{name} must be True or False; got {_shown(value)}")


def parse_bytes(value: int | str, *, name: str, minimum: int = 1) -> int:
    """Return a size in bytes.

    Args:
        value: bytes, or a number and a unit. ``KiB`` to ``EiB`` are powers of 1024, ``KB`` to
            ``EB`` of 1000, none or ``B`` is bytes; letter case and spaces do not matter. A part of
            a byte is dropped.
        name: what the caller calls it; messages begin with it.
        minimum: least size allowed, 0 or 1.

    Raises:
        ConfigError: it is no such size, is below `minimum`, or is above `MAX_BYTES`.
    """
    size_bytes = _read_size(value)
    if size_bytes is None:
        raise ConfigError(f"{name} must be {_SIZE_ALLOWED}; got {_shown(value)}")
    if not minimum <= size_bytes <= MAX_BYTES:
        raise ConfigError(
            f"{name} must be from {'1 byte' if minimum else '0'} to {format_bytes(MAX_BYTES)}, "
            f'for example "60GiB"; got {_shown(value)}'
        )
    return size_bytes


def format_bytes(n: int) -> str:
    """Return bytes as a person reads them: ``"512 B"``, ``"1.50 GiB"``, ``"-2.00 MiB"``.

    Units are powers of 1024; two decimals, rounded, so `parse_bytes` need not give `n` back.
    """
    sign, magnitude = ("-", -n) if n < 0 else ("", n)
    if magnitude < 1024:
        return f"{sign}{magnitude} B"
    last = _PREFIXES[-1]
    for power, prefix in enumerate(_PREFIXES, start=1):
        # Rounded first: 1,048,575 is 1.00 MiB and not 1024.00 KiB.
        hundredths = (magnitude * 100 + 1024**power // 2) // 1024**power
        if hundredths < 1024 * 100 or prefix == last:
            break
    return f"{sign}{hundredths // 100}.{hundredths % 100:02d} {prefix}iB"


def _read_size(value: object) -> int | None:
    """Return the bytes that an int or a text stands for; None if it stands for none."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    unit_bytes = _UNIT_BYTES.get(match[2].lower() or "b") if match else None
    if match is None or unit_bytes is None:
        return None
    # Not float: tenths, and sizes from 2**53 bytes, would come out inexact.
    return int(Fraction(match[1]) * unit_bytes)


def _shown(value: object) -> str:
    """Return a short repr, whatever the caller gave."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an int of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
