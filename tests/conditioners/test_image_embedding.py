"""Images to the tokens of an image tower: open_clip's own numbers on open_clip's own pixels, frozen for good."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from ldmlab.checkpoints import save_tensors
from ldmlab.conditioners.image_embedding import ImageEmbedding, open_clip_image
from ldmlab.contracts import LatentSpec
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.nn.openclip import build_clip

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1},
}
RESNET = {**CONFIG, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}}
SPEC = LatentSpec(4, 8, 8, 4)


def no_encode(pixels: Tensor) -> Tensor:
    raise AssertionError("the first stage has no part in this")


def images(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    coarse = 48 + torch.randint(160, (count, 3, 5, 7), generator=generator).float()  # no resizing passes black or white
    return nn.functional.interpolate(coarse, (height, width), mode="bilinear").to(torch.uint8)


@pytest.fixture(scope="module")
def clip() -> Any:
    torch.manual_seed(0)
    return build_clip(config=CONFIG)


def made(clip: Any, **options: Any) -> ImageEmbedding:
    image = open_clip_image(config=clip.config, **options)
    image.tower.load_clip(clip.model.state_dict())
    return image


def tokens(image: ImageEmbedding, given: Any) -> Tensor:
    return image({"reference": given}, no_encode)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(16, 16), (40, 40), (30, 52), (11, 9)])
def test_the_embedding_is_open_clips_of_its_own_preprocessing(clip: Any, height: int, width: int) -> None:
    given = images(2, height, width)
    options = {"size": 16, "mean": clip.mean, "std": clip.std, "interpolation": "bicubic", "resize_mode": "shortest"}
    transform = image_transform_v2(PreprocessCfg(**options), is_train=False)
    pixels = torch.stack([transform(Image.fromarray(np.asarray(p.permute(1, 2, 0)))) for p in given])
    mine = made(clip).tower.pixels(given.float() / 127.5 - 1)
    assert mine.shape == pixels.shape
    assert (mine - pixels).abs().max() < 0.035  # theirs are rounded to bytes, twice: 2 / 255 / std
    whole = made(clip)
    expected = clip.model.eval().encode_image(mine)[:, None]
    torch.testing.assert_close(tokens(whole, given), expected, atol=1e-5, rtol=0)
    assert whole.width(SPEC) == expected.shape[2] == 24


@torch.no_grad()
def test_patches_are_the_final_states(clip: Any) -> None:
    seen: list[Tensor] = []
    given = images(3, 16, 16)
    image = made(clip, layer="patches")
    hook = clip.model.visual.transformer.register_forward_hook(lambda module, inputs, out: seen.append(out))
    clip.model.eval().encode_image(image.tower.pixels(given.float() / 127.5 - 1))
    hook.remove()
    states = tokens(image, given)
    assert states.shape == (3, 1 + 4, 32)
    assert image.width(SPEC) == 32
    torch.testing.assert_close(states, clip.model.visual.ln_post(seen[0]), atol=1e-5, rtol=0)


def test_nothing_given_is_zeros(clip: Any) -> None:
    for layer, shape in (("embedding", (3, 1, 24)), ("patches", (3, 5, 32))):
        image = made(clip, layer=layer)
        for batch in ({"reference": images(3, 20, 20)}, {"position": torch.arange(3)}):
            assert torch.equal(image.null(batch, no_encode), torch.zeros(shape))


def test_images_of_different_sizes(clip: Any) -> None:
    image = made(clip)
    first, second = images(1, 20, 30), images(1, 50, 40)
    together = tokens(image, [first[0], second[0]])
    torch.testing.assert_close(together, torch.cat([tokens(image, first), tokens(image, second)]), atol=2e-6, rtol=0)


def test_it_stays_frozen_and_in_float32(clip: Any) -> None:
    image = made(clip)
    nn.Sequential(image).train()
    assert not any(module.training for module in image.modules())
    assert not any(p.requires_grad for p in image.parameters())
    alone = tokens(image, images(2, 16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        surrounded = tokens(image, images(2, 16, 16))
    assert surrounded.dtype == torch.float32
    assert torch.equal(alone, surrounded)


@pytest.mark.parametrize("config", [CONFIG, {**CONFIG, "custom_text": True}, RESNET], ids=["vit", "custom", "resnet"])
def test_towers_and_the_node_that_rebuilds_them(config: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = build_clip(config=config)
    save_tensors(tmp_path / "clip.safetensors", whole.model.state_dict())
    image = open_clip_image(config=whole.config, weights=str(tmp_path / "clip.safetensors"))
    assert all(name.startswith("tower.visual.") for name in image.state_dict())
    given = images(2, 24, 24)
    again = instantiate(image.node, where="conditioner.image")
    again.load_state_dict(image.state_dict())
    assert torch.equal(tokens(again, given), tokens(image, given))
    expected = whole.model.eval().encode_image(image.tower.pixels(given.float() / 127.5 - 1))
    torch.testing.assert_close(tokens(image, given)[:, 0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_published_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that `name` and `pretrained` go, with drawn weights in a file, for a small architecture."""
    import open_clip.factory

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-Tiny-Drawn", CONFIG)
    torch.manual_seed(2)
    theirs = open_clip.create_model("ViT-Tiny-Drawn").eval()
    file = tmp_path / "drawn.pt"
    torch.save(theirs.state_dict(), file)
    image = open_clip_image(name="ViT-Tiny-Drawn", pretrained=str(file))
    given = images(2, 32, 32)
    expected = theirs.encode_image(image.tower.pixels(given.float() / 127.5 - 1))
    torch.testing.assert_close(tokens(image, given)[:, 0], expected, atol=1e-5, rtol=0)
    again = instantiate(image.node, where="conditioner.image")
    again.load_state_dict(image.state_dict())
    assert torch.equal(tokens(again, given), tokens(image, given))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either name or config"),
        ({"config": CONFIG, "drop": 1.0}, "conditioner.drop=1.0"),
        ({"config": CONFIG, "layer": "last"}, "conditioner.layer=last is unknown"),
        ({"config": RESNET, "layer": "patches"}, "needs a plain vision transformer"),
        ({"name": "ViT-B-33"}, "did you mean ViT-B-32"),
        ({"name": "ViT-B-32", "pretrained": "nowhere"}, "neither a file nor a tag"),
        ({"config": {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "patch_size": 7}}}, "patch_size=7"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_clip_image(**options)


def test_weights_of_another_model(clip: Any) -> None:
    other = open_clip_image(config={**CONFIG, "embed_dim": 20})
    with pytest.raises(InputError, match="do not fit the image tower"):
        other.tower.load_clip(clip.model.state_dict())
