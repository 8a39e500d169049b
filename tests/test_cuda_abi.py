"""What csrc/backend/cuda_driver.h says of the CUDA driver's ABI agrees with a real cuda.h."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def find_cuda_include() -> Path | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        homes.append(str(Path(nvcc).resolve().parents[1]))
    candidates = [Path(home) for home in homes if home]
    candidates += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    for home in candidates:
        if (home / "include" / "cuda.h").is_file():
            return home / "include"
    return None


def compile_check(*defines: str) -> subprocess.CompletedProcess[str]:
    include = find_cuda_include()
    compiler = shutil.which("c++") or shutil.which("g++")
    if include is None or compiler is None:
        pytest.skip("no CUDA toolkit headers or no C++ compiler")
    command = [compiler, "-std=c++20", "-fsyntax-only", f"-I{ROOT / 'csrc'}", f"-I{include}"]
    check = ROOT / "tests" / "cuda_abi_check.cpp"
    return subprocess.run([*command, *defines, str(check)], capture_output=True, text=True)


def test_driver_declarations_agree_with_the_toolkit():
    result = compile_check()
    assert result.returncode == 0, result.stderr


def test_check_fails_where_a_constant_differs():
    result = compile_check("-DCUDA_ERROR_NOT_READY=601")
    assert "static assertion failed" in result.stderr
