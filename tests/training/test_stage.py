"""Counters, groups, averaging, rates and the guard against numbers that are not finite."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from toy_stages import TwoGroups, diffusion_stage, image_batch, options, train

from ldmlab.checkpoints import load_checkpoint
from ldmlab.errors import InputError
from ldmlab.training.loggers import read_metrics
from ldmlab.training.optim import AdamW, Constant
from ldmlab.training.stage import Losses
from ldmlab.training.step_metrics import GradientAlarm, StepMetrics


def test_every_player_is_updated_with_every_batch_from_its_start(tmp_path: Path) -> None:
    stage = TwoGroups(max_steps=10, accumulate=2)
    content = load_checkpoint(train(stage, tmp_path / "run"))
    assert stage.updates == {"main": 20, "opponent": 14}  # micro-batches: 10 steps, and 7 from step 3 on
    assert (content["step"], content["position"]) == (10, 10 * 2 * 4)
    counts = {group: int(next(iter(o["state"].values()))["step"]) for group, o in content["optimizers"].items()}
    assert counts == {"main": 10, "opponent": 7}


def test_a_player_does_not_touch_the_other_ones_gradients(tmp_path: Path) -> None:
    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if pl_module.step < 3:
                assert all(p.grad is None for p in pl_module.groups()["opponent"])

    train(TwoGroups(max_steps=4, accumulate=2), tmp_path / "run", callbacks=[Watch()])


def test_every_trainable_parameter_has_exactly_one_optimizer() -> None:
    stage = TwoGroups()
    stage.configure_optimizers()
    owned = [p for o in stage.optimizers_by_group().values() for g in o.param_groups for p in g["params"]]
    assert {id(p) for p in owned} == {id(p) for p in stage.parameters()}
    stage.logvar = nn.Parameter(torch.zeros(()))  # declared and forgotten
    with pytest.raises(AssertionError, match="logvar"):
        stage.configure_optimizers()


def test_players_may_have_their_own_optimizers() -> None:
    stage = TwoGroups(optimizer={"main": AdamW(1e-3), "opponent": AdamW(2e-3)}, lr_schedule=Constant())
    stage.configure_optimizers()
    assert stage.rates() == {"main": 1e-3, "opponent": 2e-3}
    with pytest.raises(InputError, match="none for opponent"):
        TwoGroups(optimizer={"main": AdamW(1e-3)}).configure_optimizers()


def test_averaged_weights_count_steps_not_micro_batches(tmp_path: Path) -> None:
    plain = {"max_steps": 4, "gradient_clip": None}
    one = load_checkpoint(train(diffusion_stage(**plain), tmp_path / "one", 4))["averaged"]["denoiser"]
    four = load_checkpoint(train(diffusion_stage(accumulate=4, **plain), tmp_path / "four", 1))["averaged"]["denoiser"]
    assert one["updates"] == four["updates"] == 4
    for name, value in one["weights"].items():
        torch.testing.assert_close(value, four["weights"][name], rtol=0, atol=1e-4)


def test_the_rate_used_is_the_rate_configured(tmp_path: Path) -> None:
    seen: dict[int, float] = {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if not pl_module.step_complete:
                return
            seen[pl_module.step] = pl_module.rates()["main"]

    for stop in (5, 12):  # resumed at 5
        train(TwoGroups(accumulate=2, max_steps=stop), tmp_path / "run", callbacks=[Watch()])
    schedule = options()["lr_schedule"]
    assert seen == {step: pytest.approx(1e-3 * schedule(step - 1)) for step in range(1, 13)}


class Poisoned(TwoGroups):
    """One term becomes infinite at step 8."""

    def losses(self, group: str, batch: dict[str, Any]) -> Losses:
        losses = super().losses(group, batch)
        if self.step == 7 and group == "opponent":
            losses.metrics["opponent"] = losses.metrics["opponent"] / 0
        return losses


def test_a_number_that_is_not_finite_stops_the_run_before_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^opponent became -?inf at step 8"):
        train(Poisoned(), tmp_path / "run")
    assert max(p.name for p in (tmp_path / "run" / "checkpoints").glob("step*")) == "step_00000006.ckpt"


class Exploding(TwoGroups):
    """The gradient of a group is not finite at some steps."""

    at: ClassVar[tuple[int, ...]] = ()

    def losses(self, group: str, batch: dict[str, Any]) -> Losses:
        losses = super().losses(group, batch)
        if self.step + 1 in self.at and group == "main":
            losses.total = losses.total * float("nan")
        batch["key"] = [f"image-{int(number)}" for number in batch["position"]]
        return losses


def test_steps_without_a_finite_gradient_are_left_out_up_to_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Exploding, "at", (4, 5))
    made = Exploding(skip_nonfinite=2)
    before: dict[int, Tensor] = {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            before[pl_module.step] = torch.cat([p.detach().flatten().clone() for p in pl_module.groups()["main"]])

    train(made, tmp_path / "run", callbacks=[Watch()])
    assert torch.equal(before[3], before[4])
    assert torch.equal(before[4], before[5])
    assert not torch.equal(before[5], before[6])
    said = capsys.readouterr()
    assert "step 4 is left out: gradient_norm/main became nan. Its images here: image-" in said.out + said.err
    rows = read_metrics(tmp_path / "run" / "metrics.csv")[1]
    assert float(rows[-1]["skipped_steps"]) == 2
    assert all(math.isfinite(float(value)) for row in rows for value in row.values() if value)
    with pytest.raises(InputError, match=r"main became nan at step 5, 2 steps in a row .*skip_nonfinite=1;"):
        train(Exploding(skip_nonfinite=1), tmp_path / "stops")


def test_steps_left_out_stay_counted_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exploding, "at", (3, 4, 5))
    train(Exploding(skip_nonfinite=2, max_steps=4), tmp_path / "run")
    with pytest.raises(InputError, match=r"at step 5, 3 steps in a row .*skip_nonfinite=2;"):
        train(Exploding(skip_nonfinite=2), tmp_path / "run")
    monkeypatch.setattr(Exploding, "at", (6,))
    train(Exploding(skip_nonfinite=2), tmp_path / "run")
    assert float(read_metrics(tmp_path / "run" / "metrics.csv")[1][-1]["skipped_steps"]) == 3


@pytest.mark.parametrize(("device", "layout"), [("cuda", torch.channels_last), ("cpu", torch.contiguous_format)])
def test_convolutions_are_laid_out_for_the_device_before_they_move(device: str, layout: torch.memory_format) -> None:
    made = diffusion_stage()
    made.diffusion.first_stage = nn.Conv2d(3, 4, 3).requires_grad_(False)  # frozen, encodes on the fly
    made._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))  # type: ignore[assignment]
    assert made.device.type == "cpu"
    made.setup("fit")
    convolutions = [parameter for parameter in made.parameters() if parameter.ndim == 4]
    assert len(convolutions) == 3
    assert all(weight.is_contiguous(memory_format=layout) for weight in convolutions)


def test_a_gradient_that_jumps_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    alarm = GradientAlarm(10.0)
    steady = {"gradient_norm/main": [1.0, 1.2] * 15, "loss": [100.0]}
    assert alarm.look(steady, 30) == {}
    assert alarm.look({"gradient_norm/main": [1.1, 40.0, 1.0]}, 33) == {"alarm/gradient_norm/main": 1.0}
    said = capsys.readouterr()
    assert "gradient_norm/main jumped to 40 before step 33: its median" in said.out + said.err
    assert GradientAlarm(10.0).look({"gradient_norm/main": [1.0, 40.0]}, 2) == {}  # nothing is usual yet


def test_terms_are_means_over_micro_batches_and_steps() -> None:
    terms = StepMetrics()
    for step in (1, 2):
        for value in (1.0, 3.0):
            terms.add({"loss": torch.tensor(value * step)}, 0.5)
        terms.close(step)
    assert terms.read() == {"loss": 3.0}
    assert terms.read() == {}


def test_evaluating_leaves_no_trace(tmp_path: Path) -> None:
    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if not pl_module.step_complete:
                return
            stage = pl_module
            raw = stage.diffusion.backbone.last.weight.detach().clone()
            before = torch.get_rng_state()
            with stage.evaluating():
                average = stage.diffusion.backbone.last.weight.detach().clone()
                torch.rand(7)
                assert not any(m.training for m in stage.modules())
                assert not torch.is_grad_enabled()
            assert not torch.equal(average, raw)
            assert torch.equal(stage.diffusion.backbone.last.weight, raw)
            assert torch.equal(torch.get_rng_state(), before)
            assert stage.diffusion.backbone.training
            assert not stage.diffusion.first_stage.training

    train(diffusion_stage(max_steps=2), tmp_path / "run", callbacks=[Watch()])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_precision_is_what_its_name_says(precision: str, tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    stage = diffusion_stage(max_steps=2)
    stage.diffusion.backbone.first.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert pl_module.extras["denoiser"]["loss"].dtype == torch.float32

    train(stage, tmp_path / "run", precision=precision, callbacks=[Watch()])
    assert {p.dtype for p in stage.parameters()} == {torch.float32}
    assert {t.dtype for t in stage.average.weights().values()} == {torch.float32}
    assert set(seen) == {torch.bfloat16 if precision == "bf16-mixed" else torch.float32}


def test_a_step_without_averaging_or_clipping(tmp_path: Path) -> None:
    stage = TwoGroups(max_steps=2, averaging_decay=None, gradient_clip=None, lr_schedule=Constant())
    assert load_checkpoint(train(stage, tmp_path / "run"))["averaged"] == {}


def test_the_fixed_noise_loss_is_the_same_at_every_call_and_batch_size(tmp_path: Path) -> None:
    stage = diffusion_stage(max_steps=1)
    stage.eval()
    with torch.no_grad():
        whole = stage.validate([image_batch(range(8))])
        parts = stage.validate([image_batch(range(3)), image_batch(range(3, 8))])
    assert whole["loss"] == pytest.approx(parts["loss"], abs=1e-6)
