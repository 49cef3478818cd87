"""Prompts and images blocked by concepts: the scale is the neutral texts', and nothing blocked is hidden."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ldmlab.app import filters
from ldmlab.app.filters import ConceptFilter, read_filter
from ldmlab.errors import InputError
from ldmlab.inference.grids import read_settings
from ldmlab.metrics.features import OpenClipFeatures
from ldmlab.nn.openclip import build_clip
from sampling_models import CLIP, sample_command

NEUTRAL = ["a cat", "a red apple", "a clock", "two chairs", "the sea", "a house", "green grass", "a blue car"]


@pytest.fixture(scope="module")
def features() -> OpenClipFeatures:
    torch.manual_seed(0)
    return OpenClipFeatures(build_clip(config=CLIP), "tiny")


def made(features: OpenClipFeatures, **concepts: Any) -> ConceptFilter:
    return ConceptFilter(features, NEUTRAL, concepts)


def test_the_score_is_in_deviations_of_neutral_texts(features: OpenClipFeatures) -> None:
    texts = ["a gun", "a red apple"]
    embedded = {text: F.normalize(features.texts([text]).double(), dim=1)[0] for text in [*texts, *NEUTRAL]}

    def cosine(a: str, b: str) -> Tensor:
        return embedded[a] @ embedded[b]

    guard = made(features, **{"a gun": {"prompts": 1.0, "images": None}})
    for text, score in zip(texts, guard.prompt_scores(texts)[:, 0].tolist(), strict=True):
        neutral = torch.stack([cosine(text, other) for other in NEUTRAL])
        assert score == pytest.approx(float((cosine(text, "a gun") - neutral.mean()) / neutral.std()), rel=1e-3)
    images = torch.randint(0, 256, (3, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert guard.image_scores(images).shape == (3, 1)
    assert guard.blocked_images(images) == [None] * 3  # no threshold for images
    assert guard.blocked_prompts([]) == []


def test_the_concept_itself_is_blocked_and_named(features: OpenClipFeatures) -> None:
    own = float(made(features, gun={"prompts": None, "images": None}).prompt_scores(["gun"]))
    guard = made(features, **{"gun": {"prompts": own - 0.1, "images": None}, "x": {"prompts": 99.0, "images": None}})
    first, second = guard.blocked_prompts(["gun", "a cat"])
    assert first is not None
    assert (first.concept, first.score) == ("gun", pytest.approx(own, rel=1e-3))
    scores = guard.prompt_scores(["a cat"])
    assert (second is None) == bool(scores[0, 0] <= own - 0.1)


def test_a_clip_without_numbers_blocks_nothing_silently() -> None:
    broken = OpenClipFeatures(build_clip(config=CLIP), "broken")
    for parameter in broken.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(InputError, match="no numbers"):
        made(broken, gun={"prompts": 1.0, "images": 1.0}).blocked_prompts(["a gun"])


FULL = "clip: {run: r}\nneutral: [" + ", ".join(NEUTRAL) + "]\nconcepts: {gun: 3, knife: {images: 2.5}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as yaml"),
        ("clip: {run: r}", "must hold clip, neutral and concepts"),
        ("clip: {run: r}\nneutral: [a, b]\nconcepts: {gun: 3}", "at least 8 different texts"),
        (FULL.replace("{gun: 3, knife: {images: 2.5}}", "[]"), "map at least one text"),
        (FULL.replace("2.5", "high"), "threshold of knife is {'images': 'high'}"),
        (FULL.replace("{run: r}", "{runs: r}"), "clip is {'runs': 'r'}; give {run: RUN}"),
        (FULL.replace("2.5", ".nan"), "threshold of knife is {'images': nan}"),  # it would block nothing
        (FULL.replace("2.5", ".inf"), "threshold of knife"),
        (FULL.replace("2.5", "1" + "0" * 400), "threshold of knife"),
        (FULL.replace("2.5", "yes"), "threshold of knife"),
        (FULL.replace("{images: 2.5}", "{}"), "threshold of knife is {}"),
        (FULL.replace("{images: 2.5}", "null"), "threshold of knife is null"),
        (FULL.replace("gun:", "no:"), "false is no text; put it in quotes"),
        (FULL.replace("gun:", "' ':"), "is no text"),
        (FULL.replace("gun:", '"\\ud800":'), "is no text"),
        (FULL.replace("a cat", "7"), "7 is no text"),
        (FULL.replace("a cat", "a red apple"), "at least 8 different texts"),
        (FULL.replace("neutral: [", "neutral: a #"), "neutral must list texts"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_filter(tmp_path / "f.yaml", "cpu")
    assert message in str(caught.value)


PROMPTS = ["a gun", "a cat", "a gun", "a clock"]


def sampled(folder: Path, *more: str) -> Path:
    options = ["--steps", "2", "--batch-size", "2", "--device", "cpu"]
    sample_command(["runs/tiny", *PROMPTS, *options, "--out", str(folder), *more], "caption")
    return folder


@pytest.mark.slow
def test_sampling_without_what_is_blocked(
    tmp_path: Path, features: OpenClipFeatures, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(filters, "_clip", lambda path, node: features)
    file = tmp_path / "f.yaml"
    scores = made(features, gun={"prompts": None, "images": None}).prompt_scores(PROMPTS)[:, 0]
    limit = float(sum(scores.unique()[-2:]) / 2)  # weights are drawn: whichever prompt they put nearest is blocked
    file.write_text(FULL.replace("{gun: 3, knife: {images: 2.5}}", f"{{gun: {{prompts: {limit}}}, x: 1000}}"))
    lost = [number for number, score in enumerate(scores.tolist()) if score > limit]
    names = [f"{number:06d}.png" for number in range(4) if number not in lost]
    plain, kept = sampled(tmp_path / "plain"), sampled(tmp_path / "kept", "--filter", str(file))
    assert sorted(path.name for path in kept.glob("*.png")) == [*names, "grid.png"]
    for name in names:  # the same images as without a filter
        assert torch.equal(*(pixels(folder / name) for folder in (plain, kept)))
    assert "x" in read_settings(kept / names[0])["filter"]
    assert "filter" not in read_settings(plain / names[0])
    record = json.loads((kept / "filter.json").read_text())
    assert [(one["index"], one["concept"]) for one in record["blocked"]] == [(number, "gun") for number in lost]
    assert f"{len(names)} images in" in (text := capsys.readouterr().out)
    assert f"blocked: {len(lost)} by their prompts, 0 of {len(names)} images" in text
    assert not (plain / "filter.json").exists()

    file.write_text(FULL.replace("{gun: 3, knife: {images: 2.5}}", "{gun: {images: -1000}}"))
    empty = sampled(tmp_path / "empty", "--filter", str(file))
    assert sorted(path.name for path in empty.iterdir()) == ["filter.json"]
    assert "0 images in" in (text := capsys.readouterr().out)
    assert "4 of 4 images" in text
    (folder := tmp_path / "stopped").mkdir()

    def stop(*words: object) -> None:
        raise KeyboardInterrupt

    file.write_text(FULL.replace("{gun: 3, knife: {images: 2.5}}", "{gun: 1000}"))
    with monkeypatch.context() as patch:
        patch.setattr(filters.Guard, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            sampled(folder, "--filter", str(file))
    file.write_text(FULL.replace("{gun: 3, knife: {images: 2.5}}", "{gun: -1000}"))
    with pytest.raises(InputError, match="holds files already"):  # that this filter blocks
        sampled(folder, "--filter", str(file))
    with pytest.raises(InputError, match="--filter cannot check the noisy images"):
        sampled(tmp_path / "t", "--filter", str(file), "--trajectory")


def pixels(path: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(path)))
