"""Averages of several lengths in a run: kept, resumed to the bit, and read as weights of the model."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import forked
import pytest
import pytorch_lightning as pl
import torch
from toy_stages import TwoGroups, diffusion_stage, train

from ldmlab.averaging import snapshots
from ldmlab.checkpoints import load_checkpoint
from ldmlab.errors import InputError
from ldmlab.training.callbacks.average_snapshots import PowerAverages


class NotAveraged(TwoGroups):
    averaged = None


def test_a_resumed_run_has_the_same_averages_and_snapshots(tmp_path: Path) -> None:
    options = {"keep": 10, "checkpoint_every": 6}
    train(diffusion_stage(dropout=0.3), tmp_path / "straight", callbacks=[PowerAverages(4)], **options)
    shutil.copytree(tmp_path / "straight", tmp_path / "killed")
    for path in [*(tmp_path / "killed").rglob("*00000012*"), *(tmp_path / "killed" / "averages").glob("*08_*")]:
        path.unlink()
    train(diffusion_stage(dropout=0.3), tmp_path / "killed", callbacks=[PowerAverages(4)], **options)
    straight, killed = (
        load_checkpoint(tmp_path / name / "checkpoints/step_00000012.ckpt") for name in ("straight", "killed")
    )
    forked.same(straight, killed)
    assert straight["power_averages"].keys() == {"0.050", "0.100"}
    files = [snapshots(tmp_path / name) for name in ("straight", "killed")]
    assert [one.step for one in files[0]] == [4, 4, 8, 8, 12, 12]
    for one, other in zip(*files, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()


class Stopped(pl.Callback):
    """Asked to stop in step 5, and killed when that state is on disk, before the step has ended."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.step == 5:
            trainer.strategy.checkpoint_io.wait()
            os._exit(9)


def test_a_stop_saves_what_the_step_has_changed(tmp_path: Path) -> None:
    def run(folder: Path, callbacks: list[pl.Callback]) -> None:
        train(diffusion_stage(max_steps=8), folder, callbacks=[*callbacks, PowerAverages(4)], log_every=8)

    assert forked.finish(forked.start(run, tmp_path / "stopped", [Stopped()])) == [9]
    assert load_checkpoint(tmp_path / "stopped/checkpoints/step_00000005.ckpt")["step"] == 5
    for name in ("straight", "stopped"):
        run(tmp_path / name, [])
    forked.same(*(load_checkpoint(tmp_path / n / "checkpoints/step_00000008.ckpt") for n in ("straight", "stopped")))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    train(diffusion_stage(max_steps=2), tmp_path / "run")
    with pytest.raises(InputError, match="has these lengths: none; others cannot start in the middle"):
        train(diffusion_stage(max_steps=4), tmp_path / "run", callbacks=[PowerAverages(4)])
    with pytest.raises(InputError, match=r"lengths=\[0\.1\]: an average of another length needs at least two"):
        PowerAverages(4, [0.1])
    with pytest.raises(InputError, match="every=0 must be at least 1 step"):
        PowerAverages(0)
    with pytest.raises(InputError, match="has no averaged weights; leave it out"):
        train(NotAveraged(), tmp_path / "other", callbacks=[PowerAverages(4)])


def test_the_first_update_is_the_live_weights(tmp_path: Path) -> None:
    train(diffusion_stage(max_steps=1), tmp_path, callbacks=[PowerAverages(1)])
    content = load_checkpoint(tmp_path / "checkpoints/step_00000001.ckpt")
    for average in content["power_averages"].values():
        for name, tensor in average["weights"].items():
            assert torch.equal(tensor, content["modules"]["denoiser"][name])
