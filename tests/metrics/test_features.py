"""Extractors: the Inception port against itself, CLIP towers, and files that are not what they should be."""

import pickle
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch_fidelity import feature_extractor_inceptionv3 as port

from ldmlab.errors import InputError
from ldmlab.metrics.features import Inception2015, InceptionAndClip, clip_of_run
from ldmlab.metrics.timm_features import TimmFeatures
from ldmlab.nn.openclip import build_clip

CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}

_UP_TO_MIXED_6 = (  # mixed is Mixed_5b, mixed_5 Mixed_6c
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"),
)


def images(size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_inception_with_drawn_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port, "load_state_dict_from_url", lambda *args, **kwargs: {})
    with monkeypatch.context() as patch:
        patch.setattr(port.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = port.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    extractor = Inception2015(path)
    found = extractor(images())
    features, logits = network(images())
    assert torch.equal(found["features"], features)
    assert torch.equal(found["logits"], logits)
    assert found["features"].shape == (3, extractor.width)
    assert found.keys() == extractor.gives
    channels_last = found["spatial"].reshape(3, 17, 17, 7)  # the layout of ADM's script
    resized = port.interpolate_bilinear_2d_like_tensorflow1x(images().float(), size=(299, 299), align_corners=False)
    x = (resized - 128) / 128
    for name in _UP_TO_MIXED_6:
        x = getattr(network, name)(x)
    assert torch.equal(channels_last.permute(0, 3, 1, 2), network.Mixed_6d.branch1x1(x)[:, :7])
    with pytest.raises(InputError, match="of uint8"):
        extractor(images().float())


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/ldmlab-should-never-exist"),))


def test_missing_damaged_and_harmful_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `ldmlab fetch inception`"):
        Inception2015(tmp_path / "none.pth")
    for name, content in (("damaged.pth", b"junk"), ("harmful.pth", pickle.dumps(Harmful()))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as a file of tensors"):
            Inception2015(tmp_path / name)
    assert not Path("/tmp/ldmlab-should-never-exist").exists()
    torch.save({"some": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="not the Inception network"):
        Inception2015(tmp_path / "other.pth")


def test_clip_features_at_any_size() -> None:
    torch.manual_seed(0)
    clip = build_clip(config=CLIP)
    extractor = clip_of_run("runs/clip-1a2b", clip)
    assert extractor.width == 24
    assert extractor.name == "clip run clip-1a2b"
    assert not extractor.training
    small = extractor(images())["features"]
    exact = clip.model.encode_image(clip.pixels(images().float() / 127.5 - 1))
    assert torch.allclose(small, exact, atol=1e-6)
    assert extractor(images(64))["features"].shape == (3, 24)
    assert torch.equal(extractor(images())["clip"], small)
    texts = clip.model.encode_text(clip.ids(["a red apple", "a cat"]))
    assert torch.allclose(extractor.texts(["a red apple", "a cat"]), texts, atol=1e-6)


def test_inception_and_clip_in_one_pass() -> None:
    torch.manual_seed(0)
    clip = clip_of_run("runs/clip-1a2b", build_clip(config=CLIP))
    found = {"features": torch.ones(3, 2048), "logits": torch.ones(3, 1008), "spatial": torch.ones(3, 2023)}
    inception = Mock(spec=Inception2015, return_value=found, width=2048, weights_hash="0")
    inception.name = Inception2015.name
    both = InceptionAndClip(inception, clip)
    seen = both(images())
    assert seen.keys() | {"text"} == both.gives
    assert torch.equal(seen["clip"], clip(images())["clip"])
    assert (both.name, both.width) == ("inception-2015-12-05", 2048)
    assert torch.equal(both.texts(["a cat"]), clip.texts(["a cat"]))


@pytest.mark.slow
def test_dinov2_of_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=28).eval()
    save_file(network.state_dict(), tmp_path / "dino.safetensors")
    extractor = TimmFeatures("vit_small_patch14_dinov2", tmp_path / "dino.safetensors", 28)
    x = torchvision.transforms.functional.normalize(images(28) / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        expected = network.forward_features(x)[:, 0]  # the class token after the last norm
    assert torch.allclose(extractor(images(28))["features"], expected, atol=1e-5)
    larger = TimmFeatures("vit_small_patch14_dinov2", tmp_path / "dino.safetensors", 42)
    assert larger(images(28))["features"].shape == (3, larger.width)
    with pytest.raises(InputError, match="did you mean vit_small_patch14_dinov2"):
        TimmFeatures("vit_small_patch14_dinov", tmp_path / "dino.safetensors")
    with pytest.raises(InputError, match=r"none\.pth does not exist"):
        TimmFeatures("vit_small_patch14_dinov2", tmp_path / "none.pth")
    with pytest.raises(InputError, match="belong to this model"):
        TimmFeatures("vit_tiny_patch16_224", tmp_path / "dino.safetensors")
