"""A conditioner nobody has heard of: one class, one node, no existing file changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ldmlab
from ldmlab.app.conditioning import build_conditioners, context_widths
from ldmlab.build import build_latent_diffusion
from ldmlab.contracts import LatentSpec
from ldmlab.errors import InputError
from ldmlab.model_files import write_model_folder

LATENT = LatentSpec(channels=3, height=8, width=8, downsampling=1)


class Weather(nn.Module):
    """Measurements as one token; nothing given is a learned token."""

    reads = frozenset({"weather"})
    slot = "tokens"

    def __init__(self, measurements: int, size: int = 8, drop: float = 0.1) -> None:
        super().__init__()
        self.drop = drop
        self.layer = nn.Linear(measurements, size)
        self.nothing = nn.Parameter(torch.randn(size))

    def width(self, latent: LatentSpec) -> int:
        return self.layer.out_features

    def forward(self, batch: dict[str, Any], encode: Any) -> Tensor:
        weather = torch.as_tensor(batch["weather"], dtype=torch.float32, device=self.nothing.device)
        return self.layer(weather)[:, None]

    def null(self, batch: dict[str, Any], encode: Any) -> Tensor:
        return self.nothing.expand(len(batch["weather"]), 1, -1)


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """model.yaml of a model with it; this file is an allowed plugin."""
    monkeypatch.setenv("LDMLAB_PLUGINS", __name__)
    node = {"_target_": f"{__name__}.Weather", "measurements": 2, "drop": 0.5}
    conditioners, nodes = build_conditioners({"weather": node}, LATENT)
    unet = {
        "_target_": "ldmlab.backbones.unet.UNet",
        **{"in_channels": 3, "out_channels": 3, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1},
        **{"attention_downsampling": [1], "heads": 2},
        "context_width": context_widths(conditioners, LATENT)["tokens"],
    }
    return {
        "kind": "latent_diffusion",
        "image_size": 8,
        "first_stage": {"_target_": "ldmlab.first_stages.identity.Identity"},
        "latent_scale": {"_target_": "ldmlab.diffusion.latent_space.LatentScale"},
        "backbone": unet,
        "conditioners": nodes,
        "diffusion": {
            "_target_": "ldmlab.diffusion.latent_diffusion.LatentDiffusion",
            "prediction": {"_target_": "ldmlab.diffusion.parameterization.EpsPrediction"},
            "schedule": {"_target_": "ldmlab.diffusion.schedule.Schedule"},
        },
        "guidance_trained": True,
        "sampler": {"_target_": "ldmlab.samplers.ddim.Ddim"},
    }


@pytest.mark.slow
def test_it_trains_is_saved_and_samples(spec: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_latent_diffusion(spec)
    for parameter in model.backbone.parameters():  # a fresh U-Net ends in zeros and gives no gradient
        nn.init.normal_(parameter, std=0.1)
    images = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8)
    batch = {"position": torch.arange(8), "image": images, "weather": torch.randn(8, 2)}
    model.train().loss(batch, seed=0)[0].mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.conditioners.parameters())

    parts = {"denoiser": model.backbone.state_dict(), "conditioner": model.conditioners.state_dict()}
    write_model_folder(tmp_path / "model", spec, parts)
    loaded = ldmlab.load(tmp_path / "model", device="cpu")
    samples = loaded.sample(weather=[[0.0, 1.0], [5.0, -5.0]], steps=2, guidance_scale=2.0)
    assert samples.shape == (2, 8, 8, 3)
    with pytest.raises(InputError, match="takes weather"):
        loaded.sample(wether=[[0.0, 1.0]], steps=2)


def test_it_may_not_come_from_anywhere(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LDMLAB_PLUGINS")
    with pytest.raises(InputError, match=rf"outside ldmlab and could run any code; .* plugins=\[{__name__}\]"):
        build_latent_diffusion(spec)
