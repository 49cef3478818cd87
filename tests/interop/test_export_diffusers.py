"""Exported models are the same networks in diffusers, make the same images there, and come back as they were."""

import json
import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from exported_models import MODULES, PIPELINES, Parts, Spec, model, weights
from torch import Tensor

from ldmlab.diffusion.guidance import Guidance
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.schedule import ddim_grid
from ldmlab.errors import InputError
from ldmlab.interop import diffusers, verify
from ldmlab.interop.diffusers.diffusers_export import export_folder
from ldmlab.interop.imported import assembled
from ldmlab.model_files import ModelFiles
from ldmlab.samplers.ddim import Ddim

peer = pytest.importorskip("diffusers")
STEPS, SEED = 5, 7
CAPTIONS = ["a red apple", "one of many words"]


def marked(names: Iterable[str]) -> list[Any]:
    """The names; a second and third model with CLIP's vocabulary, which takes long to read, are slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in ("sd2", "inpainting") else name for name in names]


class Exported(NamedTuple):
    """One model, exported once for all tests."""

    spec: Spec
    parts: Parts
    folder: Path
    what: str
    differences: verify.Differences

    @property
    def ours(self) -> LatentDiffusion:
        return assembled(ModelFiles(Path("ours"), self.spec, self.parts, "raw"))

    @property
    def pipeline(self) -> Any:
        pipeline = getattr(peer, self.what).from_pretrained(self.folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    @cache
    def make(name: str) -> Exported:
        folder = tmp_path_factory.mktemp(name)
        spec = model(name, folder)
        parts = weights(spec)
        if name == "inpainting":  # the pipeline draws from the posterior where we take its mean
            for leaf, value in (("weight", 0.0), ("bias", -30.0)):
                parts["first_stage"][f"to_moments.{leaf}"][4:] = value
        files = ModelFiles(folder, spec, parts, "raw")
        return Exported(spec, parts, folder / "out", *export_folder(files, folder / "out"))

    return make


@pytest.mark.parametrize("name", marked([*PIPELINES, *MODULES]))
def test_every_part_is_the_same_function(name: str, exported: Callable[[str], Exported]) -> None:
    found = exported(name)
    assert found.what.split()[0] == PIPELINES.get(name, "modules")
    assert max(found.differences.values()) < 2e-5, found.differences


def drawn(given: Exported, noise: Tensor, batch: dict[str, Any], guidance_scale: float = 1.0) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] by our DDIM from this noise."""
    found = given.ours
    found.start = lambda *_: noise  # type: ignore[method-assign, assignment]
    size, index = (given.spec["image_size"],) * 2, torch.arange(len(noise))
    grid = ddim_grid(found.schedule, STEPS)
    images = found.sample(batch, sampler=Ddim(), grid=grid, index=index, size=size, guidance=Guidance(guidance_scale))
    return (images / 2 + 0.5).clamp(0, 1)


def same(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.02  # an image, not a grey square


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("name", marked(["sd1", "sd2", "ldm_text"]))
def test_captions(name: str, guidance_scale: float, exported: Callable[[str], Exported]) -> None:
    found = exported(name)
    noise = torch.randn(2, 4, 8, 8, generator=generator())
    options = {"num_inference_steps": STEPS, "guidance_scale": guidance_scale, "output_type": "pt"}
    theirs = found.pipeline(list(CAPTIONS), latents=noise, height=64, width=64, **options).images
    same(drawn(found, noise, {"caption": list(CAPTIONS)}, guidance_scale), theirs)


@pytest.mark.parametrize("name", ["unconditional", "unconditional_kl_per_channel", "churches_like", "cosine", "pixels"])
def test_nothing_told(name: str, exported: Callable[[str], Exported]) -> None:
    found = exported(name)
    noise = torch.randn(2, *found.ours.latent_shape((found.spec["image_size"],) * 2), generator=generator())
    images = found.pipeline(batch_size=2, generator=generator(), num_inference_steps=STEPS, output_type="np").images
    same(drawn(found, noise, {}), torch.from_numpy(images).movedim(-1, 1))


def test_super_resolution(exported: Callable[[str], Exported]) -> None:
    found = exported("super_resolution")
    low = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator())
    noise = torch.randn(2, 3, 16, 16, generator=generator())
    pixels = low.float() / 127.5 - 1
    theirs = found.pipeline(pixels, generator=generator(), num_inference_steps=STEPS, output_type="pt").images
    same(drawn(found, noise, {"low_resolution": low}), theirs)


@pytest.mark.slow
def test_inpainting(exported: Callable[[str], Exported]) -> None:
    found = exported("inpainting")
    image = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8, generator=generator())
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    mask[:, :, 16:40, 24:56] = 1
    noise = torch.randn(1, 4, 8, 8, generator=generator())
    theirs = found.pipeline(
        CAPTIONS[0],
        image=image.float() / 255,
        mask_image=mask.float(),
        latents=noise,
        height=64,
        width=64,
        strength=1.0,
        guidance_scale=3.0,
        num_inference_steps=STEPS,
        output_type="pt",
    ).images
    same(drawn(found, noise, {"caption": CAPTIONS[:1], "image": image, "mask": mask}, 3.0), theirs)


@pytest.mark.parametrize("name", marked(PIPELINES))
def test_there_and_back(name: str, exported: Callable[[str], Exported]) -> None:
    given = exported(name)
    back, found = diffusers.read_folder(given.folder)
    differences = verify.compare_imports(
        ModelFiles(Path("ours"), given.spec, given.parts, "raw"), ModelFiles(Path("back"), back, found, "raw")
    )
    assert max(differences.values()) < 2e-5, differences
    assert all(torch.equal(tensor, found["denoiser"][key]) for key, tensor in given.parts["denoiser"].items())
    assert back["image_size"] == given.spec["image_size"]
    message = [[node["_target_"] for node in spec["conditioners"].values()] for spec in (back, given.spec)]
    assert message[0] == message[1]


def copied(folder: Path, out: Path, file: str, **changes: Any) -> Path:
    """The exported folder with other values in a file of settings; None takes the key away."""
    shutil.copytree(folder, out)
    settings = json.loads((out / file).read_text()) | changes
    (out / file).write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return out


def test_a_codebook_without_a_factor_is_not_rescaled(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    out = copied(exported("unconditional").folder, tmp_path / "out", "vqvae/config.json", scaling_factor=None)
    with pytest.warns(UserWarning, match="no scaling_factor"):
        spec, _ = diffusers.read_folder(out)
    assert spec["latent_scale"]["std"] == [1.0]


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "StableDiffusionXLPipeline, which is not"),
        ("model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, "has a ControlNetModel"),
        ("model_index.json", {"_class_name": "LDMSuperResolutionPipeline"}, "takes 6 channels, but this one 3"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type=sample"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule=sigmoid"),
        ("unet/config.json", {"block_out_channels": [32, 96]}, "keys"),
    ],
)
def test_folders_that_are_no_model_of_ours(
    file: str, changes: dict[str, Any], message: str, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    out = copied(exported("unconditional").folder, tmp_path / "out", file, **changes)
    with pytest.raises(InputError, match=message):
        diffusers.read_folder(out)
