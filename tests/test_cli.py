"""The program `vattention`."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vattention as va
from vattention.attention import BACKENDS
from vattention.cli import main


def test_info_says_what_runs_on_the_host_and_why_the_rest_does_not(capsys):
    assert main(["info", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert va.__version__ in lines[0]
    said = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[-len(BACKENDS) :]}
    assert said.keys() == BACKENDS.keys()
    assert said["torch"] == "yes"
    assert all("cuda" in said[name] for name in BACKENDS if name != "torch")


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_info_of_a_device_that_is_not_there_fails_and_says_so(device, capsys):
    assert main(["info", "--device", device]) == 1
    assert device in capsys.readouterr().out


def test_bench_is_the_program_of_the_benchmarks(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--help"])
    assert ended.value.code == 0
    assert "usage: vattention bench" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["bench", "no-such-benchmark"])
    assert ended.value.code == 2


def test_the_module_is_the_program():
    done = subprocess.run(
        [sys.executable, "-m", "vattention", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == va.__version__


def test_bench_says_what_has_to_be_installed(monkeypatch, capsys) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr("importlib.import_module", missing)
    assert main(["bench", "--help"]) == 1
    told = capsys.readouterr().err
    assert "needs numpy" in told and "pip install 'vattention[bench]'" in told
