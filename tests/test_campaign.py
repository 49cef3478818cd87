"""A slice of the fault campaign (`benchmarks/campaign.py`): nothing silent, no traceback, no hang, nothing runs."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from faults.cases import GOOD, Outcome  # noqa: E402
from faults.plant import WRONG, wrong_value  # noqa: E402


@pytest.mark.slow
def test_a_slice_of_the_campaign(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/campaign.py", "--seed", "1", "--faults", "40", "--out", str(tmp_path / "c")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    records = [json.loads(line) for line in (tmp_path / "c" / "faults.jsonl").read_text().splitlines()]
    assert len(records) >= 40, done.stdout + done.stderr
    bad = [record for record in records if record["how"] not in GOOD]
    assert not bad, json.dumps(bad, indent=1)
    assert done.returncode == 0


def test_a_fault_follows_from_its_seed() -> None:
    def planted(seed: int) -> list[str]:
        content = {"a": 1, "b": [1, 2, {"c": "x"}], "d": {"e": None}}
        return [wrong_value(json.loads(json.dumps(content)), random.Random(f"{seed}:{number}")) for number in range(20)]

    assert planted(1) == planted(1)
    assert planted(1) != planted(2)
    assert len(WRONG) > 20


def test_the_table_counts_every_outcome() -> None:
    from campaign import table

    hows = ("harmless", "named", "said", "silent", "traceback", "hang", "ran", "outside")
    text = table([Outcome("disk full", number, "", how) for number, how in enumerate(hows)])
    assert "| disk full | 8 | 3 | 2 | 1 | 1 | 1 | 2 |" in text
