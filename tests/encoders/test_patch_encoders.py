"""Frozen encoders: patches on their grid, class tokens left out, and weights that are missing."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from ldmlab.app.compose import compose, plain
from ldmlab.app.conditioning import build_encoders
from ldmlab.build import load_clip
from ldmlab.errors import InputError

SHIPPED = str(Path(__file__).parents[2] / "models" / "emoji" / "clip")


def nodes(*words: str) -> Any:
    return plain(compose("train", ["data.train=x", "data.val=x", *words]))["encoder"]


def images(size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_patches_of_our_own_clip() -> None:
    encoder: Any = build_encoders(nodes("encoder=clip", f"encoder.clip.from_run={SHIPPED}"))["clip"]
    found = encoder(images(64))
    assert found.shape == (2, encoder.width, 8, 8)
    visual: Any = load_clip(SHIPPED).model.visual
    visual.output_tokens = True
    _, tokens = visual(load_clip(SHIPPED).pixels(images(64)))
    assert torch.allclose(found.flatten(2).transpose(1, 2), tokens, atol=1e-5)
    encoder.train()
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert len(encoder.weights_hash) == 16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(images(64)), found)


@pytest.mark.parametrize("model", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_patches_of_dinov2(tmp_path: Path, model: str) -> None:
    torch.manual_seed(0)
    network: Any = timm.create_model(model, pretrained=False, num_classes=0, img_size=28).eval()
    save_file(network.state_dict(), tmp_path / "dino.safetensors")
    words = [f"encoder.dinov2.{word}" for word in (f"model={model}", "image_size=28")]
    encoder = build_encoders(nodes("encoder=dinov2", *words, f"encoder.dinov2.weights={tmp_path}/dino.safetensors"))
    x = torchvision.transforms.functional.normalize(images(28) / 2 + 0.5, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    tokens = network.forward_features(x)[:, network.num_prefix_tokens :]
    found = encoder["dinov2"](images(28))
    assert found.shape == (2, 384, 2, 2)
    assert torch.allclose(found.flatten(2).transpose(1, 2), tokens, atol=1e-5)
    assert encoder["dinov2"](images(64)).shape == (2, 384, 2, 2)


def test_a_plan_reads_no_weights() -> None:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("error")
        encoder: Any = build_encoders(nodes("encoder=clip", f"encoder.clip.from_run={SHIPPED}"))["clip"]
    assert all(p.is_meta for p in encoder.parameters())


def test_missing_weights_are_named() -> None:
    with pytest.raises(InputError, match=r"encoder\.dinov2\.weights has no value; give the file"):
        build_encoders(nodes("encoder=dinov2"))
    with pytest.raises(InputError, match=r"give encoder\.clip\.from_run=RUN"):
        build_encoders(nodes("encoder=clip"))
    with pytest.raises(InputError, match="ldmlab fetch clip --model ViT-B-16 --pretrained openai"):
        build_encoders(nodes("encoder=clip", "encoder.clip.name=ViT-B-16", "encoder.clip.pretrained=openai"))
    with pytest.raises(InputError, match=r"encoder\.dinov2\.weights=none\.pth does not exist"):
        build_encoders(nodes("encoder=dinov2", "encoder.dinov2.weights=none.pth"))
