"""An exported model makes the same picture in diffusers' own pipeline, from the same noise; and comes back as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import PIPELINES, Parts, Spec, model, weights
from torch import Tensor

from ldmlab.diffusion.grid import ddim_grid
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.interop import diffusers, verify
from ldmlab.interop.assembly import Imported, assembled
from ldmlab.interop.diffusers_export import export_folder
from ldmlab.samplers.ddim import Ddim

peer = pytest.importorskip("diffusers")
STEPS, SEED = 5, 7
CAPTIONS = ["a red apple", "one of many words"]


def exported(name: str, folder: Path) -> tuple[LatentDiffusion, Any, Spec, Parts]:
    """Our model, diffusers' pipeline of it, and what was exported."""
    spec = model(name, folder)
    parts = weights(spec)
    if name == "inpainting":  # the pipeline draws from the posterior where we take its mean
        moments = parts["first_stage"]["to_moments.weight"], parts["first_stage"]["to_moments.bias"]
        for tensor, value in zip(moments, (0.0, -30.0), strict=True):
            tensor[4:] = value
    export_folder(spec, parts, folder / "out")
    pipeline = getattr(peer, PIPELINES[name]).from_pretrained(folder / "out")
    pipeline.set_progress_bar_config(disable=True)
    return assembled(Imported(name, spec, parts, "raw")), pipeline, spec, parts


def ours(found: LatentDiffusion, spec: Spec, noise: Tensor, batch: dict[str, Any], guidance: float = 1.0) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] by our DDIM from this noise."""
    found.start = lambda *_: noise  # type: ignore[method-assign, assignment]
    size, index = (spec["image_size"],) * 2, torch.arange(len(noise))
    grid = ddim_grid(found.schedule, STEPS)
    images = found.sample(batch, sampler=Ddim(), grid=grid, index=index, size=size, guidance=guidance)
    return (images / 2 + 0.5).clamp(0, 1)


def same(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.02  # a picture, not a grey square


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["sd1", "sd2", "ldm_text"])
def test_captions(name: str, guidance: float, tmp_path: Path) -> None:
    found, pipeline, spec, _ = exported(name, tmp_path)
    noise = torch.randn(2, 4, 8, 8, generator=generator())
    options = {"num_inference_steps": STEPS, "guidance_scale": guidance, "output_type": "pt"}
    theirs = pipeline(list(CAPTIONS), latents=noise, height=64, width=64, **options).images
    same(ours(found, spec, noise, {"caption": list(CAPTIONS)}, guidance), theirs)


@pytest.mark.parametrize("name", ["unconditional", "unconditional_kl_per_channel", "churches_like", "cosine", "pixels"])
def test_nothing_told(name: str, tmp_path: Path) -> None:
    found, pipeline, spec, _ = exported(name, tmp_path)
    noise = torch.randn(2, *found.latent_shape((spec["image_size"],) * 2), generator=generator())
    images = pipeline(batch_size=2, generator=generator(), num_inference_steps=STEPS, output_type="np").images
    same(ours(found, spec, noise, {}), torch.from_numpy(images).movedim(-1, 1))


def test_super_resolution(tmp_path: Path) -> None:
    found, pipeline, spec, _ = exported("super_resolution", tmp_path)
    low = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator())
    noise = torch.randn(2, 3, 16, 16, generator=generator())
    pixels = low.float() / 127.5 - 1
    theirs = pipeline(pixels, generator=generator(), num_inference_steps=STEPS, output_type="pt").images
    same(ours(found, spec, noise, {"low_resolution": low}), theirs)


def test_inpainting(tmp_path: Path) -> None:
    found, pipeline, spec, _ = exported("inpainting", tmp_path)
    image = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8, generator=generator())
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    mask[:, :, 16:40, 24:56] = 1
    noise = torch.randn(1, 4, 8, 8, generator=generator())
    theirs = pipeline(
        CAPTIONS[0],
        image=image.float() / 127.5 - 1,
        mask_image=mask.float(),
        latents=noise,
        height=64,
        width=64,
        strength=1.0,
        guidance_scale=3.0,
        num_inference_steps=STEPS,
        output_type="pt",
    ).images
    same(ours(found, spec, noise, {"caption": CAPTIONS[:1], "image": image, "mask": mask}, 3.0), theirs)


@pytest.mark.parametrize("name", PIPELINES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    spec = model(name, tmp_path)
    parts = weights(spec)
    export_folder(spec, parts, tmp_path / "out")
    back, found = diffusers.read_folder(tmp_path / "out")
    sides = [Imported(name, *side, "raw") for side in ((spec, parts), (back, found))]
    differences = verify.compare_imports(sides[0], sides[1])
    folded = name in ("unconditional_kl_per_channel", "super_resolution")  # their scale is inside the weights
    assert max(differences.values()) < (2e-5 if folded else 5e-7), differences
    assert back["image_size"] == spec["image_size"]
    assert [node["_target_"] for node in back["conditioners"].values()] == [
        node["_target_"] for node in spec["conditioners"].values()
    ]
