"""Every Triton kernel compiles for bf16 without a GPU, within the limits of DESIGN's cards and rules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.dispatch import LAUNCHES

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = 99 * 1024  # bytes a block may use on a 3090 or 4090, the smallest of our cards


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    program = [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))]
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_of_the_launch_table_compiles(compiled: list[dict[str, object]]) -> None:
    assert {(row["kernel"], row["arch"]) for row in compiled} == {
        (name, arch) for name in LAUNCHES for arch in (80, 90)
    }


def test_no_kernel_needs_too_much_shared_memory(compiled: list[dict[str, object]]) -> None:
    assert [row for row in compiled if int(str(row["shared"])) > SHARED_LIMIT] == []


def test_no_kernel_uses_libdevice_or_fp64(compiled: list[dict[str, object]]) -> None:
    assert [row for row in compiled if row["libdevice"] or row["fp64"]] == []
