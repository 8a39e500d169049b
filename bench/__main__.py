"""Runs the benchmarks: `python -m bench [NAME|all]`; draws them: `python -m bench plot`.

`python -m bench attention --save` also writes what `vattention.attention` chooses backends by, and
`python -m bench save-measured REPORT` writes it from the file of such a run. Where the package is
installed the same is `vattention bench`.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from . import attention, bandwidth, generate, measured, step
from . import map as mapping
from .common import Context, write_report

BENCHMARKS: dict[str, Callable[[Context], dict[str, object]]] = {
    "map": mapping.run,
    "step": step.run,
    "bandwidth": bandwidth.run,
    "attention": attention.run,
    "generate": generate.run,
}
RESULTS = Path("bench/results")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench" if arguments is None else "vattention bench",
        description="Measures vattention and writes one JSON file for each benchmark. The host "
        "backend (--device cpu) runs all of it at small sizes, to try the code: its figures say "
        "nothing about a GPU.",
    )
    parser.add_argument(
        "benchmark",
        nargs="?",
        default="all",
        choices=[*BENCHMARKS, "all", "plot", "save-measured"],
    )
    parser.add_argument(
        "report", nargs="?", type=Path, help="of save-measured: a file that attention wrote"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"where files are written; default: {RESULTS}, figures in a folder of it",
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help="what plot draws"
    )
    parser.add_argument("--quick", action="store_true", help="few repetitions; files end in -quick")
    parser.add_argument(
        "--save",
        action="store_true",
        help=f"attention on a GPU: write its times into {measured.PATH.name}, by which backends "
        "are chosen",
    )
    parser.add_argument(
        "--no-compiled",
        action="store_true",
        help="generate: leave out the model that is compiled as a whole, which takes minutes",
    )
    parser.add_argument("--commit", help="the commit measured, for a copy that has no .git")
    args = parser.parse_args(arguments)
    if (args.benchmark == "save-measured") is not (args.report is not None):
        parser.error("save-measured takes a report, and nothing else does")
    if args.benchmark == "save-measured":
        return _save_measured(args.report)
    if args.benchmark == "plot":
        return _plot(args.results, args.out or RESULTS / "figures")

    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: use --device cpu")
    if args.save and (args.benchmark != "attention" or kind != "cuda" or args.quick):
        parser.error("--save is for attention, on a GPU, with all repetitions")
    device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else "cpu"
    names = list(BENCHMARKS) if args.benchmark == "all" else [args.benchmark]
    failed = False
    for name in names:
        # Rebuilt, so that no path of this machine gets into the file.
        command = f"python -m bench {name} --device {kind}"
        for option in ("quick", "save", "no_compiled"):
            command += f" --{option.replace('_', '-')}" if getattr(args, option) else ""
        started = time.perf_counter()
        write = functools.partial(_write, args.out or RESULTS, started)
        context = Context(
            name,
            torch.device(device),
            args.quick,
            command,
            args.commit,
            args.save,
            not args.no_compiled,
            lambda so_far: write(context, {**so_far, "unfinished": True}),  # noqa: B023
        )
        try:
            measurements = BENCHMARKS[name](context)
        except Exception:
            traceback.print_exc()
            failed = True
            continue
        path = write(context, measurements)
        print(f"\n{name}: {time.perf_counter() - started:.1f} s, written to {path}", flush=True)
        if args.save:
            measured.save_report(json.loads(path.read_text()))
    return 1 if failed else 0


def _write(
    directory: Path, started: float, context: Context, measurements: Mapping[str, object]
) -> Path:
    return write_report(context, measurements, directory, time.perf_counter() - started)


def _save_measured(path: Path) -> int:
    try:
        measured.save_report(json.loads(path.read_text()))
    except (OSError, ValueError) as error:  # no such file, no JSON, or not such a report
        print(error, file=sys.stderr)
        return 1
    return 0


def _plot(results: Path, directory: Path) -> int:
    from . import plot  # matplotlib is not needed to measure

    paths = plot.draw(results, directory)
    for path in paths:
        print(path)
    if not paths:
        print(f"there are no results in {results}", file=sys.stderr)
    return 0 if paths else 1


if __name__ == "__main__":
    sys.exit(main())
