"""Training counts the captions that are longer than their encoder reads."""

from typing import Any

import torch
from torch import nn

from ldmlab.conditioners.text import open_clip_text
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule
from ldmlab.first_stages.identity import Identity
from ldmlab.training.diffusion_module import DiffusionStage

LONG = "one two three four five six seven eight nine ten eleven twelve"
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


class Constant(nn.Module):
    """A denoiser that takes tokens and learns one number."""

    accepts = frozenset({"tokens"})

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor, t: torch.Tensor, conditioning: Any) -> torch.Tensor:
        """The number."""
        return self.value.expand_as(x)


def stage_with(conditioners: dict[str, nn.Module]) -> DiffusionStage:
    diffusion = LatentDiffusion(Identity(), LatentScale(1.0), Constant(), conditioners, Schedule(), EpsPrediction())
    return DiffusionStage(
        diffusion=diffusion, sampler=None, grid=[], seed=0, optimizer=lambda p: torch.optim.SGD(p, 0.1),  # type: ignore
        lr_schedule=lambda step: 1.0, max_steps=1,
    )  # fmt: skip


def batch(*captions: str) -> dict[str, Any]:
    count = len(captions)
    return {
        "position": torch.arange(count),
        "image": torch.zeros(count, 3, 8, 8, dtype=torch.uint8),
        "caption": list(captions),
    }


def test_the_share_of_captions_that_were_cut_is_logged() -> None:
    stage = stage_with({"text": open_clip_text(config=CLIP)})
    shares = [
        stage.losses("denoiser", batch("a cat", LONG, "a dog", text)).metrics["captions_cut"] for text in ("a", LONG)
    ]
    assert [float(share) for share in shares] == [0.25, 0.5]
    trained = stage_with({"text": open_clip_text(config=CLIP, trainable=True)})
    assert float(trained.losses("denoiser", batch(LONG, "a")).metrics["captions_cut"]) == 0.5


def test_models_without_captions_log_nothing_of_them() -> None:
    assert stage_with({}).losses("denoiser", batch("a")).metrics.keys() == {"loss"}
