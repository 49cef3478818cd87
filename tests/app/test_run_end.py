"""The last lines of a run: folder, numbers with their direction, cost, what falls short, the next command."""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from ldmlab.app.run_end import finished

TABLE = """step,images,speed/images_per_second,memory/peak_gib,data/skipped,val/loss,val/recall_1_of_50
10,100,10,1.5,0,0.5,0.1
20,200,20,1.25,3,0.7,0.2
"""


@pytest.mark.parametrize("nested", [False, True])
def test_five_lines(tmp_path: Path, nested: bool) -> None:
    (tmp_path / "metrics.csv").write_text(TABLE)
    stage: Any = SimpleNamespace(monitor="loss", monitor_mode="min", step=20, position=200)
    config = {"stage": {"name": "diffusion"}, "data": {"train": "t", "val": "v"}}
    lines = finished(tmp_path, config, stage, nested=nested).splitlines()
    assert lines[:4] == [
        f"finished: {tmp_path}",
        "validation at step 20: loss 0.7 ↓, recall_1_of_50 0.2 ↑",
        "cost: 20 steps, 200 images, about 0:00:15 at 13.33 images/s, 1.5 GiB of memory",
        "falls short: 3 unreadable training images skipped; loss was best at step 10: 0.5, 0.7 at the end",
    ]
    assert lines[4:] == ([] if nested else [f"next: ldmlab evaluate model={tmp_path}"])


def test_the_next_command_can_be_typed(tmp_path: Path) -> None:
    run = tmp_path / "it's, a=b (1)"
    run.mkdir()
    stage: Any = SimpleNamespace(monitor="psnr", monitor_mode="max", step=5, position=40)
    data = {"train": "my images, 1", "val": "1e3"}
    command = finished(run, {"stage": {"name": "autoencoder"}, "data": data}, stage, nested=False).splitlines()[-1]
    words = shlex.split(command.removeprefix("next: ldmlab encode "))
    found = {one.key_or_group: one.value() for one in OverridesParser.create().parse_overrides(words)}
    wanted = {"data": "shards", "data.train": data["train"], "data.val": "1e3", "from_run": str(run)}
    assert found == {**wanted, "out": f"{run}-latents"}


def test_a_run_without_its_table(tmp_path: Path) -> None:
    stage: Any = SimpleNamespace(monitor="psnr", monitor_mode="max", step=5, position=40)
    config = {"stage": {"name": "clip"}, "data": {"train": "t", "val": "v"}}
    lines = finished(tmp_path, config, stage, nested=True).splitlines()
    assert lines == [f"finished: {tmp_path}", "cost: 5 steps, 40 images", "falls short: no validation"]
