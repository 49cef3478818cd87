"""A slice of the kills of `benchmarks/kills.py`: at named points and any moment, one process or all."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "processes"), [("fsdp", "2"), ("hsdp", "4"), ("ddp", "2"), ("auto", "1")], ids=lambda part: part
)
def test_killed_runs_end_bit_identical(
    strategy: str, processes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kills import main

    words = ["--strategy", strategy, "--processes", processes, "--kills", "2", "--out", str(tmp_path / "kills")]
    assert main(words) == 0, capsys.readouterr().out
    assert "| all |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_result_that_differs_is_one(tmp_path: Path) -> None:
    from kills import GOOD, Run, compare, finish

    one, other = (Run(tmp_path / name, "dropout", "auto", 1) for name in ("one", "other"))
    finish(one)
    finish(other)
    compare(one, other)
    assert one.verdict == GOOD, one.log.read_text()
    table = other.path / "metrics.csv"
    table.write_text(table.read_text().replace("0.", "1.", 1))
    compare(one, other)
    assert one.verdict.startswith("differs: /metrics.csv")
