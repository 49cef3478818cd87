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


def test_a_campaign_goes_on_with_what_is_bad_or_missing(tmp_path: Path) -> None:
    from campaign import _done

    log = tmp_path / "faults.jsonl"
    assert _done(log, 7) == {}
    outcomes = [Outcome("disk full", number, "", how) for number, how in enumerate(("named", "hang", "said"))]
    lines = [{"seed": 7 + (outcome.how == "said"), **outcome.record()} for outcome in outcomes]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _done(log, 7) == {("disk full", 0): outcomes[0]}


@pytest.mark.slow
def test_a_group_of_processes_ends_together_and_what_each_said_is_kept(tmp_path: Path) -> None:
    from faults.commands import Limits, run_group

    work = tmp_path / "work"
    work.mkdir()
    each = [Limits(seconds=200, environment={"LDMLAB_PLUGINS": name}, anew=True) for name in ("", "no_such_package")]
    results = run_group(["sample", "nowhere", "1"], work, each, "pair", lambda pids: None)
    assert [result.code for result in results] == [2, 2]
    assert all(result.sentence.startswith("ldmlab: ") and not result.traceback for result in results)
