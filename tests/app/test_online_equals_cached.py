"""A denoiser sees the same latents and the same loss from latent shards and from images encoded on the fly."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from walk import SMALL, TINY_UNET, Flow

from ldmlab.app.compose import compose, plain
from ldmlab.app.plans import diffusion
from ldmlab.app.wiring import stage_options
from ldmlab.instantiate import instantiate
from ldmlab.training.random_state import seed_process

TOLERANCE = 1e-4  # latents of unit size in float32; encoding in batches of other sizes moves them by about 1e-6


def latents_and_loss(flow: Flow, *options: str, scale: float = 1.0) -> tuple[list[str], Tensor, Tensor]:
    """Keys, normalised latents and losses of the first two batches, for a network without zero weights."""
    given = [*SMALL, *flow.data, *TINY_UNET, f"conditioner.text.from_run={flow.root}/clip", "data.flip=true"]
    config = plain(compose("train", ["experiment=mine/text_to_image", *given, *options]))
    settings = instantiate(config["trainer"], where="trainer")
    data = instantiate(config["data"], where="data", seed=0)
    plan = diffusion(config, data, stage_options(config, settings))
    stage: Any = plan.stage
    seed_process(0, 0)  # the same weights for both, none of them zero
    for module in stage.diffusion.backbone.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.nn.init.normal_(stage.diffusion.backbone.conv_out.weight, std=0.2)
    stage.diffusion.latent_scale.std *= scale
    stage.diffusion.train()
    loader = iter(replace(data, workers=0).train_loader(8, kind=plan.reads))
    batches = [next(loader) for _ in range(2)]
    latents = torch.cat([stage.diffusion.latents(batch, 0) for batch in batches])
    with torch.no_grad():
        losses = torch.cat([stage.diffusion.loss(batch, 0)[0] for batch in batches])
    return [key for batch in batches for key in batch["key"]], latents, losses


@pytest.fixture(scope="module")
def cached(flow: Flow) -> list[str]:
    """Latent shards in full precision, with mirrored views."""
    if not (flow.root / "full" / "train" / "manifest.json").exists():
        flow.encode("dtype=float32", "mirror=true", out="full")
    return [f"data.latents={flow.root}/full"]


def test_latents_and_loss_agree(flow: Flow, cached: list[str]) -> None:
    keys, latents, losses = latents_and_loss(flow, *cached)
    online_keys, online, online_losses = latents_and_loss(flow, f"from_run={flow.root}/first_stage")
    assert keys == online_keys
    torch.testing.assert_close(latents, online, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(losses, online_losses, atol=TOLERANCE, rtol=0)
    assert losses.std() > 0.01


@pytest.mark.slow
def test_a_scale_five_percent_off_does_not_pass(flow: Flow, cached: list[str]) -> None:
    _, latents, losses = latents_and_loss(flow, *cached)
    _, online, online_losses = latents_and_loss(flow, f"from_run={flow.root}/first_stage", scale=1.05)
    assert (latents - online).abs().max() > 100 * TOLERANCE
    assert (losses - online_losses).abs().max() > 10 * TOLERANCE


@pytest.mark.slow
def test_half_precision_shards_cost_little(flow: Flow) -> None:
    """What is stored by default: moments in float16, whose rounding is 2^-11 of their size."""
    if not (flow.root / "half" / "train" / "manifest.json").exists():
        flow.encode("mirror=true", out="half")
    _, latents, losses = latents_and_loss(flow, f"data.latents={flow.root}/half")
    _, online, online_losses = latents_and_loss(flow, f"from_run={flow.root}/first_stage")
    torch.testing.assert_close(latents, online, atol=5e-3, rtol=0)
    assert abs(float(losses.mean() - online_losses.mean())) < TOLERANCE * 5
