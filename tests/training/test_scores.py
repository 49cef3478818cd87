"""Scores in training: when, where they go, which checkpoint they keep, and that training does not notice them."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from toy_stages import TwoGroups, diffusion_stage, train

from ldmlab import distributed
from ldmlab.checkpoints import load_checkpoint
from ldmlab.errors import InputError
from ldmlab.training.callbacks.keep_checkpoints import improves
from ldmlab.training.callbacks.scores import Scores

VALUES = {2: 9.0, 4: 3.5, 6: 5.0, 8: 4.0}


class Rigged:
    """Known distances by step; draws from every random stream and reads the weights, as a real one does."""

    def __init__(self, stage: Any, images: str = "same") -> None:
        self.stage, self.images = stage, images
        self.weights: dict[int, torch.Tensor] = {}

    def check(self, device: torch.device) -> frozenset[str]:
        self._draw()
        return frozenset({"fid", "kid"})

    def _draw(self) -> None:
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002

    def score(self, step: int, model: dict[str, Any]) -> dict[str, Any]:
        self._draw()
        assert not self.stage.training
        assert not torch.is_grad_enabled()
        self.weights[step] = next(iter(self.stage.saved().values())).state_dict()["first.weight"].clone()
        scores = {"fid": {"value": VALUES[step], "spread": None}, "kid": {"value": -VALUES[step], "spread": 0.1}}
        return {
            "scores": scores, "model": model, "in_training": {"step": step, "samples": 16}, "sampling": {"steps": 2},
            "features": self.images, "reference": {"manifest_hash": "abc"},
        }  # fmt: skip


def scored(folder: Path, *, steps: int = 8, monitor: str | None = "fid", images: str = "same") -> Rigged:
    """A run of eight steps whose held-out loss is best somewhere else."""
    stage = diffusion_stage(dropout=0.3, max_steps=steps)
    scorer = Rigged(stage, images)
    watchers = [Scores(every=2, scorer=scorer, monitor=monitor)]
    train(stage, folder, callbacks=watchers, validate_every=1, log_every=3, checkpoint_every=2)
    return scorer


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def best(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").glob("best*")]


def test_scores_stand_in_the_row_of_their_step_and_in_a_record(tmp_path: Path) -> None:
    scored(tmp_path)
    found = {int(row["step"]): row["in_training/fid"] for row in rows(tmp_path)}
    assert [step for step in found if found[step]] == [2, 4, 6, 8]
    assert len(found) == len(rows(tmp_path))  # one row a step
    record = json.loads((tmp_path / "in_training" / "step_00000004" / "metrics.json").read_text())
    assert record["in_training"] == {"step": 4, "samples": 16}
    assert record["model"] == {"path": str(tmp_path), "weights": "averaged"}


def test_the_best_checkpoint_is_that_of_the_smallest_distance_under_a_telling_name(tmp_path: Path) -> None:
    scored(tmp_path)
    assert best(tmp_path) == ["best_step_00000004_fid_3.5.ckpt"]
    kept = load_checkpoint(tmp_path / "checkpoints" / "best_step_00000004_fid_3.5.ckpt")
    assert (kept["step"], kept["notes"]["best"]["value"]) == (4, 3.5)
    scored(tmp_path / "kid", monitor="kid")
    assert best(tmp_path / "kid") == ["best_step_00000002_kid_-9.ckpt"]
    scored(tmp_path / "none", monitor=None)
    (name,) = best(tmp_path / "none")
    assert "_loss_" in name  # held-out numbers decide


def test_what_is_scored_are_the_averaged_weights(tmp_path: Path) -> None:
    seen = scored(tmp_path).weights
    for step in (6, 8):  # two checkpoints are kept
        content = load_checkpoint(tmp_path / "checkpoints" / f"step_{step:08d}.ckpt")
        assert torch.equal(seen[step], content["averaged"]["denoiser"]["weights"]["first.weight"])
        assert not torch.equal(seen[step], content["modules"]["denoiser"]["first.weight"])


def test_training_is_bit_identical_with_and_without(tmp_path: Path) -> None:
    scored(tmp_path / "with")
    train(diffusion_stage(dropout=0.3, max_steps=8), tmp_path / "without", validate_every=1, log_every=3)
    one, other = (load_checkpoint(tmp_path / run / "checkpoints" / "step_00000008.ckpt") for run in ("with", "without"))
    for content in (one, other):
        content.pop("inventory")
        content.pop("notes")  # which step was the best, and by what
    forked.same(one, other)


def test_a_resumed_run_knows_the_best_and_forgets_it_when_measured_otherwise(tmp_path: Path) -> None:
    scored(tmp_path, steps=4)
    scored(tmp_path, steps=8)
    assert best(tmp_path) == ["best_step_00000004_fid_3.5.ckpt"]
    scored(tmp_path / "other", steps=4)
    scored(tmp_path / "other", steps=8, images="of another network")
    assert best(tmp_path / "other") == ["best_step_00000008_fid_4.ckpt"]


def test_a_number_that_is_not_finite_is_never_the_best() -> None:
    notes: dict[str, Any] = {}
    assert not improves(notes, 3, "fid", float("nan"), "min")
    assert improves(notes, 3, "fid", 2.0, "min")
    assert not improves(notes, 3, "fid", 2.0, "min")
    assert improves(notes, 3, "psnr", 1.0, "max")


def test_choices_that_cannot_work_are_refused_before_the_first_step(tmp_path: Path) -> None:
    stage = diffusion_stage()
    with pytest.raises(InputError, match=r"callbacks\.scores\.every=0 must be at least 1"):
        Scores(every=0, scorer=Rigged(stage))
    with pytest.raises(InputError, match=r"monitor=loss is no distance to real images; choose fid, sfid, kid, cmmd"):
        Scores(every=2, scorer=Rigged(stage), monitor="loss")
    with pytest.raises(InputError, match=r"monitor=cmmd is not among the scores .*\(fid, kid\)"):
        train(stage, tmp_path, callbacks=[Scores(every=2, scorer=Rigged(stage), monitor="cmmd")])
    assert stage.step == 0


def scored_together(rank: int, world: int, folder: Path) -> None:
    """All processes are asked; what one of them says decides nothing only_trainable."""
    distributed.join()
    stage = TwoGroups(max_steps=4)
    asked = []

    class Counting(Rigged):
        def score(self, step: int, model: dict[str, Any]) -> dict[str, Any]:
            asked.append(distributed.gather(rank))
            return {**_RESULT, "scores": {"fid": {"value": VALUES[step]}}}

    train(stage, folder, micro=2, world=world, rank=rank, callbacks=[Scores(every=2, scorer=Counting(stage))])
    assert asked == [[0, 1], [0, 1]]


_RESULT = {"in_training": {"samples": 4}, "sampling": {}, "features": {}, "reference": {"manifest_hash": ""}}


def test_all_processes_score_together_and_one_writes(tmp_path: Path) -> None:
    assert forked.finish(*forked.group(2, scored_together, tmp_path)) == [0, 0]
    assert best(tmp_path) == ["best_step_00000004_fid_3.5.ckpt"]
    assert len(list((tmp_path / "in_training").glob("step_*/metrics.json"))) == 2
