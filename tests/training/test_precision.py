"""Every precision of training: what has it, what stays exact, and that a resumed run is the run without a stop."""

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import test_autoencoder_module
import test_clip_module
import torch
from test_compiled import denoiser
from toy_stages import options, settings, train

from ldmlab.build import moments_of
from ldmlab.checkpoints import load_checkpoint
from ldmlab.diffusion.latent_space import LatentScale, LatentSpace
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.model_files import read_model
from ldmlab.nn.openclip import OpenClip
from ldmlab.nn.pixels import to_float
from ldmlab.report.score_curves import read_curves
from ldmlab.training import precision
from ldmlab.training.classifier_module import ClassifierStage
from ldmlab.training.engine import make_trainer
from ldmlab.training.settings import TrainerSettings
from ldmlab.training.stage import Stage

TRUE = {"64-true": torch.float64, "bf16-true": torch.bfloat16}


class Stopped(Exception):
    """In place of a kill."""


class Stop(pl.Callback):
    """After a step of which a checkpoint was saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.step == self.step:
            raise Stopped


def codebook(**changes: Any) -> Stage:
    return test_autoencoder_module.stage(start=2, vq=16, **changes)


def first_stage(**changes: Any) -> Stage:
    return test_autoencoder_module.stage(start=2, **changes)


def equal_after_a_stop(make: Any, tmp_path: Path, **options: Any) -> dict[str, Any]:
    """The last checkpoint of a run, which is that of a run stopped at step 4 and resumed."""
    paths = [train(make(max_steps=6), tmp_path / "whole", checkpoint_every=2, **options)]
    with pytest.raises(Stopped):
        train(make(max_steps=6), tmp_path / "stopped", checkpoint_every=2, callbacks=[Stop(4)], **options)
    paths.append(train(make(max_steps=6), tmp_path / "stopped", checkpoint_every=2, **options))
    whole, stopped = map(load_checkpoint, paths)
    for part in ("modules", "averaged", "optimizers", "metrics", "MixedPrecision"):
        torch.testing.assert_close(stopped.get(part), whole.get(part), rtol=0, atol=0)
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUE)
@pytest.mark.parametrize("make", [denoiser, first_stage, codebook])
def test_true_precisions_resume_bit_for_bit(make: Any, name: str, tmp_path: Path) -> None:
    content = equal_after_a_stop(make, tmp_path, precision=name)
    exact = {"quantiser.codebook.weight", "std", "shift"}
    for module in content["modules"].values():
        for key, tensor in module.items():
            assert tensor.dtype == (torch.float32 if key in exact else TRUE[name]), key
    main = next(iter(content["averaged"].values()))["weights"]
    assert {t.dtype for t in main.values()} <= {torch.promote_types(TRUE[name], torch.float32), torch.float32}


@pytest.mark.parametrize("name", TRUE)
def test_frozen_encoders_of_the_data_keep_their_precision(name: str) -> None:
    stage = test_clip_module.make()
    losses = []
    for _ in range(2):
        assert isinstance(stage.open_clip, OpenClip)
        losses.append(stage.losses("clip", test_clip_module.pairs()).total)
        precision.plugin(name).convert_module(stage)  # type: ignore[arg-type, union-attr]
    assert {p.dtype for p in stage.clip.parameters()} == {TRUE[name]}
    torch.testing.assert_close(losses[1].float(), losses[0], rtol=0.05, atol=0.05)
    made = denoiser()
    made.diffusion.first_stage.register_parameter("frozen", torch.nn.Parameter(torch.zeros(1), requires_grad=False))
    precision.plugin(name).convert_module(made)  # type: ignore[arg-type, union-attr]
    assert made.diffusion.first_stage.frozen.dtype == torch.float32


@pytest.mark.parametrize("name", TRUE)
def test_what_was_trained_is_read_in_float32(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = train(denoiser(max_steps=1), tmp_path, precision=name)
    monkeypatch.setattr("ldmlab.model_files.read_description", lambda folder: {"kind": "latent_diffusion"})
    for weights in ("averaged", "raw"):
        parts = read_model(path, weights).parts
        assert {t.dtype for part in parts.values() for t in part.values()} == {torch.float32}


class Scales(pl.Callback):
    """The factor of the loss after each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append(trainer.precision_plugin.scaler.get_scale())


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """16-mixed without a GPU: the same scaler and the same code, float16 by emulation."""
    monkeypatch.setattr(precision, "SCALED_ON", "cpu")
    monkeypatch.setattr(TrainerSettings, "check_device", lambda _: None)


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("make", [denoiser, first_stage])
def test_the_scale_of_float16_is_saved_and_the_same_for_all_groups(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    growth = torch.amp.GradScaler.__init__
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", partialmethod(growth, growth_interval=2))
    scales = Scales()
    train(make(max_steps=6), tmp_path / "scales", precision="16-mixed", callbacks=[scales])
    assert len(set(scales.seen)) > 1
    content = equal_after_a_stop(make, tmp_path, precision="16-mixed")
    assert content["MixedPrecision"]["scale"] == scales.seen[-1]


@pytest.mark.usefixtures("on_cpu")
def test_an_overflow_leaves_out_the_update_and_halves_the_scale(tmp_path: Path) -> None:
    scales = Scales()

    class Overflow(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if pl_module.step == 3:
                trainer.precision_plugin.scaler._scale.fill_(2.0**120)
                self.before = [p.detach().clone() for p in pl_module.first_stage.parameters()]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if pl_module.step == 4:
                assert all(map(torch.equal, self.before, pl_module.first_stage.parameters()))

    path = train(first_stage(max_steps=6), tmp_path, precision="16-mixed", callbacks=[Overflow(), scales], log_every=1)
    assert scales.seen[3] == 2.0**119
    assert (path.parents[1] / "metrics.csv").read_text().splitlines()[0].count("overflow/") == 2
    gradients = load_checkpoint(path)["optimizers"]["generator"]["state"][0]
    assert int(gradients["step"]) < 6


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_groups_see_the_gradients_that_they_would_without_a_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of plain descent under a factor that doubles at every step, clipped."""
    growth = torch.amp.GradScaler.__init__
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", partialmethod(growth, init_scale=256.0, growth_interval=1))

    norm_names = ("generator", "discriminator")

    def descent(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05)

    for optimizer in ({"optimizer": descent}, {}):  # and the fused one, which Lightning hands scaled gradients
        runs, norms = [], []
        for name in ("16-mixed", "32-true"):
            folder = tmp_path / f"{name}-{len(optimizer)}"
            made = first_stage(max_steps=4, gradient_clip=0.5, **optimizer)
            runs.append(load_checkpoint(train(made, folder, precision=name, log_every=1))["modules"])
            columns = read_curves(folder / "metrics.csv")
            norms.append([value for name in norm_names for _, value in columns[f"gradient_norm/{name}"]])
        assert norms[0] == pytest.approx(norms[1], rel=0.05, abs=1e-3)
        for part in runs[1] if optimizer else ():
            for key, value in runs[1][part].items():
                torch.testing.assert_close(runs[0][part][key], value, rtol=0.05, atol=2e-3)


def test_lightning_says_what_is_missing_for_transformer_engine(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Lightning refuses these options: .*transformer[-_]engine"):
        make_trainer(first_stage(), settings(precision="transformer-engine"))


def test_the_encoder_of_the_data_runs_in_bfloat16_by_option() -> None:
    torch.manual_seed(0)
    network = KLAutoencoder(channels=8, channel_mult=[1, 2], num_res_blocks=1, latent_channels=2, norm_groups=4)
    seen: list[torch.dtype] = []
    network.encoder.output.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = []
    for name in ("float32", "bfloat16"):
        space = LatentSpace(network, LatentScale())
        ClassifierStage(
            space=space, schedule=Schedule(), classifier=torch.nn.Linear(1, 1), encoder_precision=name, **options()
        )
        found += [space.encode(to_float(images)), moments_of(network, images, name)[:, :2]]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(space.encode(to_float(images)), found[-2])  # whatever the precision of training
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3
    assert {part.dtype for part in found} == {torch.float32}
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])
    assert 0 < (found[2] - found[0]).abs().max() < 0.05
    with pytest.raises(InputError, match=r"stage\.encoder_precision=int8 is unknown; choose one of float32, bfloat16"):
        ClassifierStage(space=space, schedule=Schedule(), classifier=network, encoder_precision="int8", **options())
