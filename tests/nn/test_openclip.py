"""CLIP models by configuration and by name."""

from typing import Any

import pytest
import torch

from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.nn.openclip import build_clip, make_tokenizer

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1},
}


@torch.no_grad()
def test_the_node_rebuilds_the_model() -> None:
    clip = build_clip(config=CONFIG, image_size=16)
    again = instantiate(clip.node, where="clip")
    again.model.load_state_dict(clip.model.state_dict())
    images, captions = torch.rand(2, 3, 40, 40) * 2 - 1, ["a", "an apple"]
    for one, two in (("encode_image", clip.pixels(images)), ("encode_text", clip.ids(captions))):
        assert torch.equal(getattr(clip.model.eval(), one)(two), getattr(again.model.eval(), one)(two))
    assert again.image_size == 16


def test_pixels_are_normalised_as_open_clip_does() -> None:
    clip = build_clip(config=CONFIG, image_size=16)
    white = clip.pixels(torch.ones(1, 3, 16, 16))[0, :, 0, 0]
    expected = [(1 - m) / s for m, s in zip((0.48145466, 0.4578275, 0.40821073), clip.std, strict=True)]
    assert white.tolist() == pytest.approx(expected)


def test_published_architecture_by_name() -> None:
    clip = build_clip(name="RN50")
    assert clip.image_size == 224
    assert clip.config["text_cfg"]["width"] == 512


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one"),
        ({"name": "ViT-B-33"}, "did you mean ViT-B-32"),
        ({"config": CONFIG, "image_size": 20}, "patch_size=8 does not divide"),
        ({"name": "ViT-B-32", "pretrained": "no-such-tag"}, "cannot be loaded"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_clip(**options)


def test_only_clips_own_tokenizer() -> None:
    with pytest.raises(InputError, match="tokenizer of its own"):
        make_tokenizer({"text_cfg": {"hf_tokenizer_name": "bert"}})
