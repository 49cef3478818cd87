"""Large images from whole models: parts are chosen by size, do not change what they should not, and are recorded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldmlab.backbones.unet import UNet
from ldmlab.conditioners.low_resolution import LowResolution
from ldmlab.conditioners.semantic_map import SpatialRescaler
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.inference import inputs
from ldmlab.inference.model import LoadedModel
from ldmlab.inference.sample_settings import SampleSettings
from sampling_models import sample_command


def told_model(conditioner: nn.Module) -> LoadedModel:
    """Trained, so to say, on 32 px; three channels beside a latent of two."""
    torch.manual_seed(1)
    unet = UNet(
        in_channels=5, out_channels=2, model_channels=32, channel_mult=[1, 2], num_res_blocks=1,
        attention_downsampling=[2], heads=2,
    )  # fmt: skip
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    stage = KLAutoencoder(channel_mult=[1, 2, 2], latent_channels=2, channels=8, num_res_blocks=1, norm_groups=4)
    diffusion = LatentDiffusion(
        stage, LatentScale(1.0), unet, {"told": conditioner}, Schedule(), EpsPrediction(), guidance_trained=False
    )
    return LoadedModel(diffusion, image_size=32, info={})


def semantic() -> LoadedModel:
    return told_model(SpatialRescaler(classes=5))


def super_resolution() -> LoadedModel:
    return told_model(LowResolution())


def label_map(height: int, width: int) -> torch.Tensor:
    return (torch.arange(width)[None, :] * 5 // width).expand(height, width)


def test_a_panorama_in_tiles_is_the_one_decoded_whole() -> None:
    """Sampled convolutionally at twice the height and five times the width that it was trained at."""
    model = semantic()
    fields: dict[str, Any] = {"segmentation": [label_map(64, 160)]}
    whole = model.sample(steps=2, **fields)
    tiled = model.sample(steps=2, tile=32, **fields)
    assert whole.shape == (1, 64, 160, 3)
    far = (whole.int() - tiled.int()).abs()
    assert far.float().mean() < 1 / 255
    assert far.max() <= 1
    separate = model.sample(steps=2, tile=32, tile_norms="separate", **fields)
    assert (whole.int() - separate.int()).abs().float().mean() > 1


def test_super_resolution_of_any_size_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, largest = super_resolution(), 0
    network = model.diffusion.backbone.forward

    def watched(x: torch.Tensor, *args: Any) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, x.shape[2] * x.shape[3])
        return network(x, *args)

    monkeypatch.setattr(model.diffusion.backbone, "forward", watched)
    small = torch.randint(0, 256, (33, 21, 3), dtype=torch.uint8)
    images = model.sample(steps=2, low_resolution=[small])
    assert images.shape == (1, 132, 84, 3)
    assert largest == 8 * 8  # latent pixels: windows of the size it was trained at
    whole = model.sample(steps=2, low_resolution=[small], window=0)
    assert largest == 33 * 21
    assert not torch.equal(images, whole)


def test_what_is_chosen_where_nothing_is_asked() -> None:
    small, large = SampleSettings(size=(1024, 1024)), SampleSettings(size=(1024, 1028))
    assert semantic().resolved(small).tile == 0
    assert (semantic().resolved(large).tile, semantic().resolved(large).window) == (512, 0)
    assert super_resolution().resolved(SampleSettings(size=(64, 64))).window == 0
    assert super_resolution().resolved(SampleSettings(size=(64, 68))).window == 32


def test_the_record_tells_the_parts() -> None:
    whole = semantic().resolved(SampleSettings(size=(64, 64))).as_text()
    assert not {"tile", "tile_norms", "window"} & whole.keys()
    asked = semantic().resolved(SampleSettings(size=(64, 64), tile=32, window=16)).as_text()
    assert (asked["tile"], asked["tile_norms"], asked["window"]) == (32, "shared", 16)


def test_encode_and_decode_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = semantic()
    images = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)
    latents = model.encode(images)
    torch.testing.assert_close(model.encode(images, tile=32), latents, atol=1e-4, rtol=0)
    assert (model.decode(latents, tile=32).int() - model.decode(latents).int()).abs().max() <= 1
    monkeypatch.setattr(inputs, "_LARGE", 64 * 95)
    used = []

    def watched(stage: nn.Module, *choices: Any) -> nn.Module:
        used.append(choices)
        return stage

    monkeypatch.setattr("ldmlab.inference.model.TiledFirstStage", watched)
    model.decode(latents)
    model.encode(images)
    assert used == [(512, "shared")] * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 30}, "tile=30 .* choose for instance 32"),
        ({"tile": 32, "tile_norms": "mixed"}, "tile_norms=mixed is unknown"),
        ({"window": 18}, "window=18 .* choose for instance 16"),
    ],
)
def test_refused_before_any_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        semantic().resolved(SampleSettings(**settings))


def test_boxes_belong_to_the_whole_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadedModel, "reads", frozenset({"boxes"}))
    with pytest.raises(InputError, match="window=32 would place all boxes in every window"):
        semantic().resolved(SampleSettings(size=(64, 64), window=32))


def test_the_command_takes_parts(tmp_path: Path) -> None:
    words = ["model", "3", "--steps", "2", "--size", "32x48"]
    sample_command([*words, "--out", str(tmp_path / "whole")])
    sample_command([*words, "--tile", "16", "--out", str(tmp_path / "tiles")])
    sample_command(
        [*words, "--window", "16", "--tile", "16", "--tile-norms", "separate", "--out", str(tmp_path / "all")]
    )
    whole, tiles, all_parts = (Image.open(tmp_path / name / "000000.png") for name in ("whole", "tiles", "all"))
    assert np.abs(np.asarray(whole, dtype=int) - np.asarray(tiles, dtype=int)).max() <= 1
    assert not np.array_equal(np.asarray(whole), np.asarray(all_parts))
    assert (all_parts.info["window"], all_parts.info["tile"], all_parts.info["tile_norms"]) == ("16", "16", "separate")
    assert "tile" not in whole.info
