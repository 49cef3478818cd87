"""CLIP models by configuration and by name."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

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


def test_a_smaller_vocabulary_is_the_first_merges() -> None:
    text = CONFIG["text_cfg"]
    whole, small = (make_tokenizer({"text_cfg": {**text, **size}}) for size in ({}, {"vocab_size": 2000}))
    for caption in ("a red apple, noto style", "番号 3", "<end_of_text> xyzzy"):
        pieces = [small.decoder[number] for number in small.encode(caption)]
        assert "".join(pieces) == "".join(whole.decoder[number] for number in whole.encode(caption))
        assert max(small.encode(caption)) < 2000
    assert small.encode("the")[0] == whole.encode("the")[0]
    config = {**CONFIG, "text_cfg": {**text, "vocab_size": 2000}}
    clip = build_clip(config=config, image_size=16)
    ids = clip.ids(["the apple"])
    assert (
        ids[0].argmax() == (ids[0] != 0).sum() - 1
    )  # the end token keeps the largest number, which open_clip looks for
    assert clip.model.encode_text(ids).shape == (1, 24)
    with pytest.raises(InputError, match="vocab_size=513 is less than 514"):
        build_clip(config={**CONFIG, "text_cfg": {**text, "vocab_size": 513}}, image_size=16)


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
        ({"name": "ViT-B-32", "pretrained": "no-such-tag"}, "neither a file nor a tag of ViT-B-32; there are openai"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_clip(**options)


def test_fetched_weights_are_found_by_their_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny-clip.json").write_text(
        json.dumps(CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"image_size": 16}})
    )
    open_clip.add_model_config(tmp_path)
    monkeypatch.setenv("LDMLAB_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda name: ["mine"])
    monkeypatch.setattr(
        open_clip, "get_pretrained_cfg", lambda name, tag: {"quick_gelu": True, "mean": (0.5, 0.5, 0.5)}
    )
    with pytest.raises(InputError, match="run `ldmlab fetch clip --model tiny-clip --pretrained mine`"):
        build_clip(name="tiny-clip", pretrained="mine")
    weights = build_clip(name="tiny-clip").model.state_dict()
    (tmp_path / "clip").mkdir()
    save_file(weights, tmp_path / "clip" / "tiny-clip_mine.safetensors")
    found = build_clip(name="tiny-clip", pretrained="mine")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.model.state_dict().items())
    assert found.config["quick_gelu"]
    assert found.mean == (0.5, 0.5, 0.5)


def test_only_clips_own_tokenizer() -> None:
    with pytest.raises(InputError, match="tokenizer of its own"):
        make_tokenizer({"text_cfg": {"hf_tokenizer_name": "bert"}})
