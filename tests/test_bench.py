"""The benchmarks run, check their own answers, write what they promise, and can be drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
BENCHMARKS = ("map", "step", "bandwidth")


def run_bench(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    run_bench("all", "--device", "cpu", "--quick", "--out", folder, "--commit", "0123abc")
    return folder


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_report_says_what_was_measured_and_where(results, name):
    report = json.loads((results / f"{name}-host-quick.json").read_text())
    assert report["benchmark"] == name
    assert report["command"] == f"python -m bench {name} --device cpu --quick"
    assert report["environment"]["commit"] == "0123abc"
    assert {"device", "driver", "torch", "vattention", "source_sha256"} <= set(
        report["environment"]
    )
    assert report["measurements"]


def test_the_map_report_shows_fewer_mappings_for_the_same_bytes(results):
    sizes = json.loads((results / "map-host-quick.json").read_text())["measurements"]["sizes"]
    largest = sizes[0]
    assert largest["mapped_bytes"]["token, cleared"] == largest["bytes"]
    assert 20 * largest["mappings"]["token, cleared"] < largest["mappings"]["page_calls"]


def test_an_idle_step_makes_no_backend_call(results):
    idle = json.loads((results / "step-host-quick.json").read_text())["measurements"]["idle"]
    assert idle["calls"]["made_before_to_map"] > 0  # they are counted
    assert idle["calls"]["made"] == 0


def test_results_are_drawn(results, tmp_path):
    run_bench("plot", "--results", results, "--out", tmp_path)
    assert (tmp_path / "overview-host.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
