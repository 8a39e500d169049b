"""The benchmarks run, check their own answers, write what they promise, and can be drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import measured

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
BENCHMARKS = ("map", "step", "bandwidth", "attention", "generate")


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


def attention_report(results: Path) -> dict[str, Any]:
    return json.loads((results / "attention-host-quick.json").read_text())


def test_attention_compares_slots_with_packed_tensors_and_pages(results):
    measured = attention_report(results)["measurements"]
    for shape in measured["shapes"]:
        assert {row["place"] for row in shape["contest"].values()} == {
            *("balanced order", "layer order", "token order"),
            *("packed", "paged 16", "paged 64"),
        }
        assert "auto, balanced order" in shape["contest"]
        assert all(row["largest_error"] < 0.01 for row in shape["contest"].values())
    assert {shape["phase"] for shape in measured["shapes"]} == {"decode", "prefill"}
    agree = measured["claims"][-1]
    assert agree["holds"] and not agree["wrong"]
    assert "cuda" in measured["absent"]["fa2"]


def test_generate_compares_our_steps_with_those_of_other_caches(results):
    report = json.loads((results / "generate-host-quick.json").read_text())["measurements"]
    assert "unfinished" not in report
    for shape in report["shapes"]:
        assert {"ours", "dynamic", "static"} <= set(shape["variants"])
        assert shape["tokens_as_ours"]["ours"] == 1
        ours = shape["variants"]["ours"]
        assert shape["own_bytes"] <= ours["kv_bytes"]
        assert ours["repetitions"] == shape["new_tokens"] - 2
    assert report["logits"]["relative_error"]["ratio"] < 1.5


def test_a_report_of_a_gpu_becomes_what_auto_chooses_by(results, tmp_path):
    report = attention_report(results)
    path = tmp_path / "measured.json"
    with pytest.raises(ValueError, match="full runs on a GPU"):
        measured.save_report(report, path)
    report["quick"] = False
    report["measurements"]["capability"] = [9, 0]
    path.write_text(json.dumps({"devices": [{"name": "another"}]}))
    for name in ("some GPU", "a third", "some GPU"):
        report["environment"]["device"] = name
        measured.save_report(report, path)
    devices = json.loads(path.read_text())["devices"]
    assert [device["name"] for device in devices] == ["another", "a third", "some GPU"]
    assert devices[2]["capability"] == [9, 0]
    assert devices[2]["from"]["torch"] == report["environment"]["torch"]
    for shape in devices[2]["shapes"]:
        assert set(shape) == {"phase", "rows", "length", "us"}
        assert shape["us"]["torch"] > 0


@pytest.mark.parametrize("name", ["overview", "attention", "generate"])
def test_results_are_drawn(results, tmp_path, name):
    run_bench("plot", "--results", results, "--out", tmp_path)
    assert (tmp_path / f"{name}-host.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
