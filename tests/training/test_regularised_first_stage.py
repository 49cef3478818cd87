"""A first stage with regularisers: off it is the plain one, on it resumes and splits over processes as that does."""

import copy
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy_stages import autoencoder, image_batch, options, train

from ldmlab import distributed
from ldmlab.checkpoints import load_checkpoint
from ldmlab.errors import InputError
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.first_stages.vq import VQModel
from ldmlab.losses.autoencoder_loss import AutoencoderLoss
from ldmlab.losses.latent_regularisers import LatentRegularisers
from ldmlab.losses.vision_alignment import VisionAlignment
from ldmlab.training.autoencoder_module import AutoencoderStage
from ldmlab.training.optimizer_groups import MeanGradients

EVERYTHING: dict[str, Any] = {
    "equivariance": 0.5, "low_resolution": 0.5, "least_scale": 0.75, "noise": 0.3, "masked": 0.5
}  # fmt: skip


class Averages:
    """A frozen encoder whose patches' features are means and their squares."""

    name, weights_hash, width = "averages", "none", 6

    def __call__(self, images: Tensor) -> Tensor:
        means = F.avg_pool2d(images, 2)
        return torch.cat([means, means.square()], dim=1)


def regularised(**changes: Any) -> AutoencoderStage:
    """The toy first stage with its adversary, every regulariser, and alignment."""
    torch.manual_seed(4)
    alignment = VisionAlignment(encoder=Averages(), latent_channels=2, cosine_margin=0.0, distance_margin=0.0)
    made = autoencoder(**changes)
    made.loss.regularisers, made.loss.alignment = LatentRegularisers(**EVERYTHING), alignment
    return AutoencoderStage(first_stage=made.first_stage, loss=made.loss, **options(accumulate=2, **changes))


def checkpoint(made: AutoencoderStage, folder: Path, step: int) -> dict[str, Any]:
    train(made, folder, micro=2)
    return load_checkpoint(folder / "checkpoints" / f"step_{step:08d}.ckpt")["modules"]


def test_switched_off_it_is_the_plain_stage() -> None:
    made, plain = regularised(), autoencoder()
    made.step = plain.step = 9
    made.loss.alignment = None
    totals = {}
    for name, options_ in (("on", EVERYTHING), ("off", {})):
        made.loss.regularisers = LatentRegularisers(**options_)
        totals[name] = [made.losses(group, image_batch(range(4))).total for group in made.groups()]
    expected = [plain.losses(group, image_batch(range(4))).total for group in plain.groups()]
    assert torch.equal(torch.stack(totals["off"]), torch.stack(expected))
    assert not any(map(torch.equal, totals["on"], expected))


@pytest.mark.slow
def test_it_resumes_to_the_bit(tmp_path: Path) -> None:
    straight = checkpoint(regularised(max_steps=6), tmp_path / "straight", 6)
    checkpoint(regularised(max_steps=3), tmp_path / "stopped", 3)
    forked.same(checkpoint(regularised(max_steps=6), tmp_path / "stopped", 6), straight)


def gradients(rank: int, world: int, out: Path) -> None:
    """Of eight images, the adversary's second pass included, at four steps."""
    if world > 1:
        distributed.join()
    made, found = regularised(), []
    made.step, made.one_by_one, size = 9, True, 8 // world
    for step in range(4):
        made.position = 8 * step
        for group, parameters in made.groups().items():
            means = MeanGradients(parameters) if world > 1 else None
            batch = image_batch(range(8 * step + rank * size, 8 * step + (rank + 1) * size))
            with made._only(group):
                total = made.losses(group, batch).total
                if means is None:
                    total.backward()
                else:
                    with means.during():
                        total.backward()
                    means.wait()
            found += [None if p.grad is None else p.grad.clone() for p in parameters]
            for parameter in parameters:
                parameter.grad = None
    torch.save(found, out / f"{world}_{rank}.pt")


@pytest.mark.slow
def test_gradients_do_not_depend_on_processes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.finish(*forked.group(2, gradients, tmp_path, log=log)) == [0, 0], log.read_text()
    gradients(0, 1, tmp_path)
    one, two, other = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    for alone, shared, again in zip(one, two, other, strict=True):
        assert torch.equal(shared, again)
        torch.testing.assert_close(alone, shared, atol=1e-5, rtol=1e-3)


def test_a_vector_quantiser_sees_the_changed_latents() -> None:
    network = VQModel(
        channels=8, channel_mult=[1, 2], num_res_blocks=1, latent_channels=2, norm_groups=4, codebook_size=8
    )
    loss = AutoencoderLoss(penalty_weights={"codebook": 1.0}, lpips_weight=0.0, reduction="mean")
    loss.regularisers = LatentRegularisers(equivariance=1.0, least_scale=0.5, noise=0.1)
    made = AutoencoderStage(first_stage=network, loss=loss, **options())
    assert made.codebook is not None
    made.losses("generator", image_batch(range(4)))
    assert int(made.codebook._step.sum()) in (4 * 2 * 2, 4 * 3 * 3)


def test_what_does_not_fit_is_refused() -> None:
    class Fixed(KLAutoencoder):
        def reconstruct(self, images: Any, noise: Any) -> Any:  # type: ignore[override]
            return super().reconstruct(images, noise)

    loss = copy.copy(autoencoder().loss)
    loss.regularisers = LatentRegularisers(noise=0.1)
    network = Fixed(channels=8, channel_mult=[1, 1], num_res_blocks=1, latent_channels=2, norm_groups=4)
    with pytest.raises(InputError, match="takes no `change` of its latents"):
        AutoencoderStage(first_stage=network, loss=loss, **options())
    made = autoencoder()
    made.loss.regularisers = LatentRegularisers(equivariance=0.5)
    with pytest.raises(InputError, match="where the loss needs 6 px"):
        made.losses("generator", image_batch(range(2)))
