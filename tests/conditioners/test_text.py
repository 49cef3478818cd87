"""Captions to token states: open_clip's own numbers, frozen for good, cached without a trace."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from ldmlab.checkpoints import save_tensors
from ldmlab.conditioners.text import OpenClipText, open_clip_text
from ldmlab.contracts import LatentSpec
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.nn.openclip import build_clip
from ldmlab.nn.openclip_towers import TextTower

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
    "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 2},
}
CAPTIONS = ["a red apple", "", "ein grünes Haus", "a red apple", "苹果 🍎", "keycap 7"]
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


def no_encode(pixels: Tensor) -> Tensor:
    raise AssertionError("text needs no images")


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    torch.manual_seed(0)
    return build_clip(config=CONFIG).model.eval()


@pytest.fixture
def text(clip: nn.Module) -> OpenClipText:
    made = open_clip_text(config=CONFIG)
    made.tower.load_clip(clip.state_dict())
    return made


def states(text: OpenClipText, captions: list[str]) -> Tensor:
    return text({"caption": captions}, no_encode)


@torch.no_grad()
def test_states_are_open_clips(text: OpenClipText, clip: Any) -> None:
    ids = open_clip.SimpleTokenizer(context_length=12)(CAPTIONS)
    mine = states(text, CAPTIONS)
    assert mine.shape == (6, 12, 32)
    pooled = mine[torch.arange(6), ids.argmax(1)] @ clip.text_projection
    torch.testing.assert_close(pooled, clip.encode_text(ids), atol=1e-5, rtol=0)
    assert text.width(LatentSpec(4, 8, 8, 4)) == 32


@torch.no_grad()
def test_penultimate_layer(clip: Any) -> None:
    seen: list[Tensor] = []
    ids = open_clip.SimpleTokenizer(context_length=12)(CAPTIONS)
    hook = clip.transformer.resblocks[0].register_forward_hook(lambda module, given, out: seen.append(out))
    clip.encode_text(ids)
    hook.remove()
    text = open_clip_text(config=CONFIG, layer="penultimate")
    text.tower.load_clip(clip.state_dict())
    torch.testing.assert_close(states(text, CAPTIONS), clip.ln_final(seen[0]), atol=1e-5, rtol=0)
    assert not any("resblocks.1" in name for name in text.state_dict())


@torch.no_grad()
def test_the_other_class_of_open_clip(clip: nn.Module) -> None:
    torch.manual_seed(1)
    custom = build_clip(config={**CONFIG, "custom_text": True})
    assert isinstance(custom.model, open_clip.CustomTextCLIP)
    text = open_clip_text(config=custom.config)
    text.tower.load_clip(custom.model.state_dict())
    expected = TextTower(custom.model)(custom.ids(CAPTIONS))
    torch.testing.assert_close(states(text, CAPTIONS), expected, atol=1e-5, rtol=0)


def test_a_frozen_tower_stays_frozen(text: OpenClipText) -> None:
    nn.Sequential(text).train()
    assert not any(module.training for module in text.modules())
    assert not any(p.requires_grad for p in text.parameters())
    assert not states(text, CAPTIONS).requires_grad


def test_a_trainable_tower_learns(clip: nn.Module) -> None:
    text = open_clip_text(config=CONFIG, trainable=True).train()
    assert text.tower.training
    states(text, CAPTIONS).sum().backward()
    assert all(p.grad is not None for p in text.parameters())
    assert text.null({"caption": CAPTIONS}, no_encode).requires_grad


def test_null_is_the_empty_caption(text: OpenClipText) -> None:
    null = text.null({"caption": ["a", "b", "c"]}, no_encode)
    assert torch.equal(null, states(text, ["", "", ""]))


@pytest.fixture
def encoded(text: OpenClipText) -> Iterator[list[int]]:
    """How many captions went through the tower, by call."""
    calls: list[int] = []
    hook = text.tower.register_forward_hook(lambda module, given, out: calls.append(len(given[0])))
    yield calls
    hook.remove()


def test_every_caption_is_encoded_once(text: OpenClipText, encoded: list[int]) -> None:
    first = states(text, CAPTIONS)
    assert sum(encoded) == 5
    assert torch.equal(states(text, CAPTIONS[::-1]), first.flip(0))
    assert sum(encoded) == 5
    text.load_state_dict(text.state_dict())  # other weights could have come
    states(text, CAPTIONS[:1])
    assert sum(encoded) == 6


def test_the_cache_is_bounded_and_forgets_the_longest_unused(clip: nn.Module) -> None:
    tower = build_clip(config=CONFIG)
    text = OpenClipText(TextTower(tower.model), tower.tokenizer, cache_mib=0)
    text._capacity = 2
    assert states(text, ["a", "b", "c"]).shape[0] == 3  # a batch larger than the cache
    states(text, ["b"])
    states(text, ["d"])
    assert list(text._states) == ["b", "d"]


def test_company_and_precision_leave_no_trace(text: OpenClipText, clip: nn.Module) -> None:
    alone = states(text, ["keycap 7"])[0]
    other = open_clip_text(config=CONFIG)
    other.tower.load_clip(clip.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        together = states(other, CAPTIONS)[-1]
    assert together.dtype == torch.float32
    assert torch.equal(alone, together)


def test_states_cached_while_sampling_serve_training(text: OpenClipText) -> None:
    with torch.inference_mode():
        states(text, ["a"])
    projection = nn.Linear(32, 4)
    projection(states(text, ["a"])).sum().backward()
    assert projection.weight.grad is not None


def test_long_captions_are_cut_and_counted(text: OpenClipText) -> None:
    assert text.lost(LONG) == "eleven twelve thirteen"
    assert text.lost("a red apple") == ""
    kept = LONG.removesuffix(" eleven twelve thirteen")
    assert torch.equal(*states(text, [LONG, kept]))
    states(text, [LONG])
    assert (text.seen, text.cut) == (3, 2)


def test_the_node_rebuilds_it(text: OpenClipText) -> None:
    again = instantiate(text.node, where="conditioner.text")
    again.load_state_dict(text.state_dict())
    assert torch.equal(states(again, CAPTIONS), states(text, CAPTIONS))


def test_weights_from_a_file(text: OpenClipText, clip: nn.Module, tmp_path: Path) -> None:
    save_tensors(tmp_path / "clip.safetensors", clip.state_dict())
    read = open_clip_text(config=CONFIG, weights=str(tmp_path / "clip.safetensors"))
    assert torch.equal(states(read, CAPTIONS), states(text, CAPTIONS))
    with pytest.raises(InputError, match="do not fit"):
        open_clip_text(config={**CONFIG, "text_cfg": {"width": 48, "heads": 2, "layers": 2}}).tower.load_clip(
            clip.state_dict()
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either name or config"),
        ({"config": CONFIG, "drop": 1.0}, "conditioner.drop=1.0"),
        ({"config": CONFIG, "layer": "first"}, "conditioner.layer=first"),
        ({"name": "ViT-B-33"}, "did you mean ViT-B-32"),
        ({"name": "ViT-B-32", "config": CONFIG}, "give exactly one of them"),
        ({"config": CONFIG, "pretrained": "openai"}, "conditioner.pretrained=openai has no effect"),
        ({"name": "ViT-B-32", "weights": "file"}, "conditioner.weights=file has no effect"),
        ({"config": {**CONFIG, "text_cfg": {"widht": 3}}}, "cannot be built"),
        ({"config": {**CONFIG, "text_cfg": {"width": 30, "heads": 4}}}, "cannot be built"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_clip_text(**options)
