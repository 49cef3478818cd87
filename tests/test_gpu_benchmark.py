"""The benchmark for a GPU machine runs through on a CPU, and says why it cannot measure there."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]


@pytest.mark.slow
def test_every_section_runs_with_tiny_networks() -> None:
    result = subprocess.run([*COMMAND, "--cpu-smoke"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("times as fast, the best of each side") == 6
    assert "tensors: bit-identical" in result.stdout


@pytest.mark.slow
def test_without_a_gpu_it_says_so() -> None:
    result = subprocess.run(
        COMMAND, cwd=ROOT, capture_output=True, text=True, check=False, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert result.returncode == 1
    assert result.stderr.strip().endswith("there is nothing to measure; --cpu-smoke tries the program.")
