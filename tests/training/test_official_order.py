"""`loss.adversary.official_order` against the official program's loop, written down here once more."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy_stages import image_batch, options, train

from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.losses.adversary import Adversary
from ldmlab.losses.autoencoder_loss import AutoencoderLoss
from ldmlab.losses.patch_discriminator import PatchDiscriminator
from ldmlab.randomness import normal
from ldmlab.training.autoencoder_module import AutoencoderStage
from ldmlab.training.optim import AdamW, Constant

STEPS, RATE, BETAS = 10, 1e-3, (0.5, 0.9)


def stage(start: int, official: bool, accumulate: int = 1) -> AutoencoderStage:
    torch.manual_seed(2)
    first_stage = KLAutoencoder(channels=8, channel_mult=[1, 2], num_res_blocks=1, latent_channels=2, norm_groups=4)
    adversary = Adversary(
        discriminator=PatchDiscriminator(8, layers=1), weight=0.5, discriminator_start=start, adversary_start=start,
        official_order=official,
    )  # fmt: skip
    loss = AutoencoderLoss(penalty_weights={"kl": 1e-6}, lpips_weight=0.0, reduction="mean", adversary=adversary)
    optimizer = AdamW(RATE, betas=BETAS, weight_decay=0.0)
    chosen = options(optimizer=optimizer, lr_schedule=Constant(), gradient_clip=None, averaging_decay=None)
    return AutoencoderStage(
        first_stage=first_stage, loss=loss, **chosen | {"max_steps": STEPS, "accumulate": accumulate}
    )


def official_loop(made: AutoencoderStage, start: int, accumulate: int) -> tuple[list[Tensor], list[Tensor]]:
    """One Adam an optimizer for every batch, each with a forward pass of its own; the second is scaled by 0 or 1."""
    model = copy.deepcopy(made.first_stage)
    critic = copy.deepcopy(made.loss.adversary.discriminator)  # type: ignore[union-attr]
    first = torch.optim.Adam(model.parameters(), RATE, betas=BETAS)  # type: ignore[union-attr]
    second = torch.optim.Adam(critic.parameters(), RATE, betas=BETAS)  # type: ignore[union-attr]

    def forward(batch: dict[str, Any], purpose: str) -> tuple[Tensor, Tensor, Tensor]:
        x = batch["image"].float() / 127.5 - 1
        mean, logvar = model.encode(x).mean, model.encode(x).logvar  # type: ignore[operator, union-attr]
        noise = normal(3, purpose, batch["position"], tuple(mean.shape[1:]))
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
        return x, model.decode(mean + (logvar / 2).exp() * noise), kl  # type: ignore[operator, union-attr]

    for step in range(STEPS):
        factor = float(step >= start)
        for part in range(accumulate):
            size = 4 // accumulate
            batch = image_batch(range(step * 4 + part * size, step * 4 + (part + 1) * size))
            x, y, kl = forward(batch, "posterior")
            error = (x - y).abs().mean()
            generator = -critic(y).mean()  # type: ignore[operator]
            last = model.decoder.output.weight  # type: ignore[union-attr]
            norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (error, generator)]
            weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach() * 0.5
            critic.requires_grad_(False)  # type: ignore[union-attr]
            ((error + 1e-6 * kl + factor * weight * -critic(y).mean()) / accumulate).backward()  # type: ignore[operator]
            critic.requires_grad_(True)  # type: ignore[union-attr]
            if part == accumulate - 1:
                first.step()
                first.zero_grad()
            x, y, _ = forward(batch, "posterior of the adversary")
            hinge = F.relu(1 - critic(x)).mean() + F.relu(1 + critic(y.detach())).mean()  # type: ignore[operator]
            (factor * 0.5 * hinge / accumulate).backward()
            if part == accumulate - 1:
                second.step()
                second.zero_grad()
    return list(model.parameters()), list(critic.parameters())  # type: ignore[union-attr]


def distance(found: list[Tensor], expected: list[Tensor], start: list[Tensor]) -> float:
    """How far apart two runs end, as a fraction of the way of the second."""
    found, expected = ([p.detach() for p in parameters] for parameters in (found, expected))
    way = torch.cat([(e - s).flatten() for e, s in zip(expected, start, strict=True)]).norm()
    return float(torch.cat([(f - e).flatten() for f, e in zip(found, expected, strict=True)]).norm() / way)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("start", [0, 4])
def test_the_order_of_the_official_program(tmp_path: Path, start: int, accumulate: int) -> None:
    ends = {}
    for official in (True, False):
        made = stage(start, official, accumulate)
        before = [p.detach().clone() for p in (*made.first_stage.parameters(), *made.loss.adversary.parameters())]  # type: ignore[union-attr]
        if official:
            expected = official_loop(made, start, accumulate)
        train(made, tmp_path / f"{official}", micro=4 // accumulate)
        ends[official] = list(made.first_stage.parameters()), list(made.loss.adversary.parameters())  # type: ignore[union-attr]
    count = len(expected[0])
    begin = before[:count], before[count:]
    for part in (0, 1):
        assert distance(ends[True][part], expected[part], begin[part]) < 1e-3  # float32
        assert distance(ends[False][part], expected[part], begin[part]) > 1e-2
