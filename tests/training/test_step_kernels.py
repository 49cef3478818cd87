"""Kernels and waits of one micro-batch outside the networks, counted as torch hands them to a device."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import toy_stages
from test_autoencoder_module import stage as autoencoder_stage
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toy_stages import diffusion_stage, image_batch, train

from ldmlab.training.callbacks.noise_levels import NoiseLevels
from ldmlab.training.diffusion_module import DiffusionStage

# what a GPU makes the host wait for: a number read, an unknown size, numbers copied from the host
WAITS = {"_local_scalar_dense", "nonzero", "bincount", "lift_fresh", "_unique2", "masked_select", "equal"}
VIEWS = {"empty", "empty_like", "new_empty", "detach", "_unsafe_view", "_reshape_alias", "lift_fresh"}


class Outside(TorchDispatchMode):
    """Counts what runs outside the calls of these modules, and of methods besides forward, as `Stage.networks` says."""

    def __init__(self, *networks: nn.Module, methods: Sequence[tuple[nn.Module, tuple[str, ...]]] = ()) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.waits: list[str] = []
        self._depth = 0
        for network in networks:
            network.register_forward_pre_hook(lambda *_: self._move(1))
            network.register_forward_hook(lambda *_: self._move(-1))
        for network, names in methods:
            for name in names:
                setattr(network, name, partial(self.uncounted, getattr(network, name)))

    def uncounted(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._move(1)
        result = function(*arguments)
        self._move(-1)
        return result

    def _move(self, by: int) -> None:
        self._depth += by

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in WAITS:
            self.waits.append(name)  # in the networks too
        if self._depth == 0 and name not in VIEWS and not func.is_view and "::" not in name:  # profiler:: computes none
            self.kernels.append(name)
        return func(*args, **(kwargs or {}))


def counted(run: Callable[[], Any], *networks: nn.Module) -> Outside:
    """Of the second time: the first fills caches."""
    run()
    with Outside(*networks) as outside:
        run()
    return outside


def test_denoiser() -> None:
    made = diffusion_stage()
    images = image_batch(range(8))
    batch = {**images, "moments": torch.cat([images["image"] / 127.5 - 1, torch.full((8, 3, 8, 8), -6.0)], dim=1)}
    made.train()
    networks = made.diffusion.backbone, *made.diffusion.conditioners.values()
    found = counted(lambda: made.losses("denoiser", batch), *networks)
    assert found.waits == []
    assert len(found.kernels) <= 60, " ".join(found.kernels)
    assert len([name for name in found.kernels if name == "addcmul"]) == 9  # one Philox call


class OneStep(pl.Callback):
    """Counts a whole step but for the passes of networks, backward and the optimizer; no row is due in it."""

    def __init__(self, stage: DiffusionStage) -> None:
        networks = stage.networks()
        self.outside = Outside(*(network for network, _ in networks), methods=networks)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.step == 6:
            (optimizer,) = pl_module.optimizers_by_group().values()
            step = type(optimizer).step.__wrapped__
            optimizer.step = lambda closure: (closure() and None) or self.outside.uncounted(step, optimizer)
            pl_module.manual_backward = partial(self.outside.uncounted, pl_module.manual_backward)
            self.outside.__enter__()
        elif pl_module.step == 7:
            self.outside.__exit__(None, None, None)


def test_a_whole_step_of_a_denoiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With losses by noise level, clipping and averages; 33 of them draw the random numbers."""
    made = diffusion_stage(max_steps=8)
    images = image_batch(range(8))
    batch = {**images, "moments": torch.cat([images["image"] / 127.5 - 1, torch.full((8, 3, 8, 8), -6.0)], dim=1)}
    monkeypatch.setattr(toy_stages, "endless", lambda *_: iter(lambda: batch, None))
    counted = OneStep(made)
    train(made, tmp_path / "run", callbacks=[counted, NoiseLevels()], log_every=9, validate_every=9, checkpoint_every=9)
    found = counted.outside
    assert found.waits == []
    assert {"_foreach_lerp_", "linalg_vector_norm", "_foreach_mul_"} <= set(found.kernels)  # averages, norm, clipping
    assert len(found.kernels) <= 60, " ".join(found.kernels)


def test_kl_autoencoder() -> None:
    made = autoencoder_stage(adversary=False)
    part, batch = made.first_stage, image_batch(range(4))
    networks = part.encoder, part.decoder, part.to_moments, part.from_latent
    found = counted(lambda: made.losses("generator", batch), *networks)
    assert found.waits == []
    assert len(found.kernels) <= 60, " ".join(found.kernels)


def test_vq_autoencoder() -> None:
    made = autoencoder_stage(adversary=False, vq=16, network={"codebook_decay": 0.9, "restart_below": 0.9})
    part, batch = made.first_stage, image_batch(range(4))

    def step() -> None:
        made.losses("generator", batch)
        assert made.codebook is not None
        made.codebook.end_step(1, 4)
        made._update_codebook()

    found = counted(step, part.encoder, part.decoder, part.to_latent, part.from_latent, part.quantiser)
    assert found.waits == []
    assert "bitwise_xor" not in found.kernels  # no noise is drawn
    assert len(found.kernels) <= 60, " ".join(found.kernels)
