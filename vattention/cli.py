"""`vattention info` and `vattention bench`: what can run here, and how fast it is."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import torch

from vattention import BackendUnavailable, KVAllocator, KVLayout, Pool, __version__
from vattention.attention import Options, backends
from vattention.config import format_bytes

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    Args:
        arguments: what follows the program's name; None: those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="vattention", description="KV caches in contiguous memory that is mapped as they grow."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser(
        "info", help="devices, and which attention backends run on them, or why not"
    )
    info.add_argument("--device", help="default: the CUDA device, if there is one, and the host")
    # It reads its own arguments, help included.
    commands.add_parser("bench", add_help=False, help="measure; see `vattention bench --help`")
    if given[:1] == ["bench"]:
        return _bench(given[1:])
    return _info(parser.parse_args(given).device)


def _bench(arguments: list[str]) -> int:
    try:
        program = importlib.import_module("vattention.bench.__main__")
        status: int = program.main(arguments)
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("vattention"):
            raise
        print(
            f"vattention bench needs {missing.name}, which is not installed: "
            "pip install 'vattention[bench]'",
            file=sys.stderr,
        )
        return 1
    return status


def _info(device: str | None) -> int:
    print(f"vattention {__version__}, torch {torch.__version__}")
    wanted = [device] if device else ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    failed = False
    for each in wanted:
        try:
            pool = Pool("256MiB", each)
        except (BackendUnavailable, ValueError) as error:
            print(f"\n{each}: {error}")
            failed = True
            continue
        on_gpu = pool.device.type == "cuda"
        name = torch.cuda.get_device_name(pool.device) if on_gpu else "host memory"
        print(f"\n{pool.device}: {name}, pages of {format_bytes(pool.page_bytes)}")
        layout = KVLayout(
            num_layers=1,
            num_kv_heads=8,
            head_dim=128,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
        )
        print(f"  attention backends, for heads of 128 in {layout.dtype}:")
        with KVAllocator(layout, max_sequences=1, max_seq_len=1024, pool=pool) as kv:
            for backend, reasons in backends(kv, Options(num_heads=32)).items():
                print(f"    {backend:16} {'; '.join(reasons) or 'yes'}")
    return int(failed)
