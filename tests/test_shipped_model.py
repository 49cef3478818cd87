"""The model that comes along: it is small, has its card and figures, and samples show what captions say."""

import json
import re
from pathlib import Path

import torch
from torch.nn import functional as F

from ldmlab.app.card_facts import empty_fields, read_person
from ldmlab.app.cli import dispatch
from ldmlab.build import load, load_clip
from ldmlab.model_files import MODELS
from ldmlab.nn.pixels import to_float

FOLDER = MODELS / "emoji"
CAPTIONS = ["a blue heart, twemoji style", "a cat face, fluent flat style", "a grinning face, noto style"]


def test_it_is_small_and_whole() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 40e6
    assert {path.name for path in FOLDER.glob("*.safetensors")} == {
        *("first_stage.safetensors", "denoiser.safetensors", "conditioner.safetensors"),
    }


def test_its_card_states_what_a_person_knows_and_what_was_measured() -> None:
    assert not empty_fields(read_person(FOLDER))
    facts = json.loads((FOLDER / "card.json").read_text())
    assert len(facts["runs"]) == 3
    assert len(facts["evaluations"]) >= 2
    assert facts["audit"]
    text = (FOLDER / "README.md").read_text()
    for source in ("Apache-2.0", "CC BY 4.0", "Microsoft", "Twemoji"):
        assert source in text
    assert not re.search(r"(?<![\w.])/(tmp|home|work|root)/", text + (FOLDER / "card.json").read_text())


@torch.inference_mode()
def test_samples_are_nearest_to_their_own_captions(tmp_path: Path) -> None:
    images = load("emoji", device="cpu").sample(caption=CAPTIONS, steps=12, seed=1)
    assert images.shape == (3, 64, 64, 3)
    clip = load_clip("emoji/clip")
    pixels = clip.pixels(to_float(images.permute(0, 3, 1, 2)))
    model = clip.model
    shown = F.normalize(model.encode_image(pixels), dim=1)  # type: ignore[operator]
    said = F.normalize(model.encode_text(clip.ids(CAPTIONS)), dim=1)  # type: ignore[operator]
    assert (shown @ said.T).argmax(1).tolist() == [0, 1, 2]


def test_the_command_of_the_readme(tmp_path: Path) -> None:
    words = [
        "sample",
        "emoji",
        "a red apple, noto style",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "o"),
    ]
    assert dispatch(words) == 0
    assert (tmp_path / "o" / "000000.png").is_file()
