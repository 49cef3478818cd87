"""Extractors: the Inception port against itself, CLIP towers, and files that are not what they should be."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3 as port

from ldmlab.errors import InputError
from ldmlab.metrics.features import Inception2015, clip_of_run
from ldmlab.nn.openclip import build_clip

CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def pictures(size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_inception_with_drawn_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port, "load_state_dict_from_url", lambda *args, **kwargs: {})
    with monkeypatch.context() as patch:
        patch.setattr(port.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = port.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    extractor = Inception2015(path)
    found = extractor(pictures())
    features, logits = network(pictures())
    assert torch.equal(found["features"], features)
    assert torch.equal(found["logits"], logits)
    assert found["features"].shape == (3, extractor.width)
    with pytest.raises(InputError, match="of uint8"):
        extractor(pictures().float())


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
    small = extractor(pictures())["features"]
    exact = clip.model.encode_image(clip.pixels(pictures().float() / 127.5 - 1))
    assert torch.allclose(small, exact, atol=1e-6)
    assert extractor(pictures(64))["features"].shape == (3, 24)
