"""How `ldmlab study make` matches images, hides methods and refuses what does not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import image_folder, made_study

from ldmlab.app.cli import dispatch
from ldmlab.errors import InputError
from ldmlab.inference.grids import save_png
from ldmlab.study.answers import Answers
from ldmlab.study.design import read_study
from ldmlab.study.results import write_results


def make(*words: object) -> None:
    dispatch(["study", "make", *map(str, words)])


def test_images_are_matched_by_name_and_their_files_tell_nothing(tmp_path: Path) -> None:
    study = read_study(made_study(tmp_path))
    assert [item.methods for item in study.rated] == [("a", "b")] * 8
    for number, item in enumerate(study.rated):
        for method, file in zip(item.methods, item.images, strict=True):
            copy = Image.open(tmp_path / "study" / "images" / file)
            assert copy.tobytes() == Image.open(tmp_path / method / f"{number:06d}.png").tobytes()
            assert not copy.info
            assert len(Path(file).stem) == 24


def test_samples_show_their_caption_and_their_grid_is_no_item(tmp_path: Path) -> None:
    folder, real = tmp_path / "samples", image_folder(tmp_path / "photos", range(50, 53), 0)
    image_folder(folder, range(3), 7)
    pixels = Image.open(folder / "000000.png")
    for name in ("000000.png", "grid.png"):
        save_png(folder / name, np.asarray(pixels), {"prompt": "a red apple"})
    make(folder, "--real", real, "--task", 1, "--out", tmp_path / "study")
    study = read_study(tmp_path / "study")
    assert [item.methods for item in study.rated] == [("real", "samples")] * 3  # no name is shared: at random
    assert [item.caption for item in study.rated].count("a red apple") == 1


def test_refusals(tmp_path: Path) -> None:
    a, b = image_folder(tmp_path / "a", range(2), 0), image_folder(tmp_path / "b", range(5, 7), 0)
    out = ["--out", tmp_path / "study"]
    for words, why in (
        ([a, b], "needs --task 1|2 and --out"),
        ([a, "--task", 2, *out], "give two folders or more"),
        ([a, "--task", 1, *out], "give them by --real"),
        ([a, "--task", 3, *out], "--task=3 is unknown"),
        ([a, b, "--task", 2, *out], "no file name is in all of the 2 folders"),
        ([a, a, "--task", 2, *out], "must be 2 different names"),
        ([a, b, "--task", 2, "--names", "real,b", *out], "none of them real"),
        ([a, tmp_path / "none", "--task", 2, *out], "is no folder"),
        ([a, b, "--task", 2, "--seconds", 99, *out], "outside 0 .. 60"),
        ([a, b, "--task", 2, "--prompts", "p.txt", *out], "are for models"),
        ([a, b, "--task", 2, "--port", 1, *out], "is an option of study serve"),
        ([a, b, "--task", 2, "--paper-table", "nothing", *out], "--paper-table nothing"),
    ):
        with pytest.raises(InputError, match=why.replace("|", r"\|")):
            make(*words)
        assert not (tmp_path / "study").exists()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "000000.png").write_bytes(b"%!PS")
    with pytest.raises(InputError, match="cannot be read"):
        make(a, tmp_path / "broken", "--task", 2, *out)


def test_a_row_beside_the_papers(tmp_path: Path) -> None:
    folder = made_study(tmp_path, "--paper-table", "user-study/sr-imagenet", "--checks", "0")
    study = read_study(folder)
    answers = Answers(folder, study)
    for _ in range(3):
        name = answers.start()
        while (found := answers.session(name).next) is not None:
            item, swapped = found
            answers.put(name, item.id, "right" if not swapped else "left", 1.0)  # always the second method
    raw = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(raw | {"rules": raw["rules"] | {"least_answers": 8}}))
    text = write_results([folder], tmp_path / "out")
    assert "70.6" in text  # the paper's
    assert "100.0 (100.0 .. 100.0)" in text
    record = json.loads((tmp_path / "out" / "preferences.json").read_text())[str(folder)]
    assert record["raters"] == 3
    assert record["shares"] == [{"methods": ["a", "b"], "preferred": "b", "value": 100.0, "low": 100.0, "high": 100.0}]


def test_a_folder_from_a_stranger_serves_nothing_but_its_copies(tmp_path: Path) -> None:
    folder = made_study(tmp_path)
    good = json.loads((folder / "study.json").read_text())
    for change in (
        lambda study: study["items"][0].update(images=["../study.json", "x.png"]),
        lambda study: study["items"][0].update(given="/etc/hostname"),
        lambda study: study["items"][0].update(kind="other"),
        lambda study: study.update(per_session="many"),
        lambda study: study.update(per_session=0),
        lambda study: study["rules"].update(one_side=None),
        lambda study: study.update(items=[]),
        lambda study: study.update(more=1),
    ):
        bad = json.loads(json.dumps(good))
        change(bad)
        (folder / "study.json").write_text(json.dumps(bad))
        with pytest.raises(InputError, match="is damaged"):
            read_study(folder)


def test_damaged_answers_are_counted(tmp_path: Path) -> None:
    folder = made_study(tmp_path, "--checks", "0")
    study = read_study(folder)
    answers = Answers(folder, study)
    name = answers.start()
    while (found := answers.session(name).next) is not None:
        answers.put(name, found[0].id, "left", 1.0)
    lines = (folder / "answers.jsonl").read_text().splitlines()
    first = json.loads(lines[1])
    for wrong in ({"item": "99999"}, {"chosen": "c"}, {"seconds": None}, {"side": 1}, {"session": "x"}):
        changed = [lines[0], json.dumps(first | wrong), *lines[2:]]
        (folder / "answers.jsonl").write_text("\n".join(changed) + "\n")
        again = Answers(folder, study)
        assert again.damaged == 1
        assert len(again.sessions[name].answers) == len(lines) - 2


def test_a_study_that_met_a_full_disk_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ldmlab.study.design.write_json", full)
        with pytest.raises(OSError, match="No space"):
            made_study(tmp_path)
    make(tmp_path / "a", tmp_path / "b", "--task", 2, "--out", tmp_path / "study")
    assert len(read_study(tmp_path / "study").rated) == 8
    with pytest.raises(InputError, match="holds files already"):
        make(tmp_path / "a", tmp_path / "b", "--task", 2, "--out", tmp_path / "study")
