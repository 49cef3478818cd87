"""How `ldmlab study make` matches images, hides methods and refuses what does not fit."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import image_folder, made_study

from ldmlab.app.cli import dispatch
from ldmlab.errors import InputError
from ldmlab.inference.grids import save_png
from ldmlab.study.answers import Answers
from ldmlab.study.design import Study, make_study, read_study
from ldmlab.study.results import write_results
from ldmlab.study.server import application
from write_kills import writes_of


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
        ([a, b, "--task", 2, "--checks", 10**12, *out], "at most 100"),
        ([a, b, "--task", 2, "--seed", -1, *out], "--seed -1 must be at least 0"),
        ([a, b, "--task", 2, "--title", "\udcff", *out], "holds half of a surrogate pair"),
        ([a, b, "--task", 2, "--names", "\udcff,b", *out], "holds half of a surrogate pair"),
        ([a, b, "--task", 2, "--question", " ", *out], "--question ' ' is empty"),
        ([a, b, "--task", 2, "--paper-table", "uncond/celebahq-256", *out], "begins with user-study/"),
        ([a, b, "--task", 2, "--port", 1, *out], "is an option of study serve"),
        ([a, b, "--task", 2, "--paper-table", "nothing", *out], "--paper-table nothing"),
    ):
        with pytest.raises(InputError, match=why.replace("|", r"\|")):
            make(*words)
        assert not (tmp_path / "study").exists()
    c = image_folder(tmp_path / "c", range(2), 9)
    with pytest.raises(InputError, match="is for two methods in task 2, not 3"):
        make(a, b, c, "--task", 2, "--paper-table", "user-study/sr-imagenet", *out)
    for folder, prompt in ((a, "an apple"), (c, "a clock")):
        save_png(folder / "000000.png", np.zeros((16, 16, 3), np.uint8), {"prompt": prompt})
    with pytest.raises(InputError, match="are of different prompts"):
        make(a, c, "--task", 2, *out)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "000000.png").write_bytes(b"%!PS")
    with pytest.raises(InputError, match="cannot be read"):
        make(a, tmp_path / "broken", "--task", 2, *out)


def test_what_a_study_of_models_cannot_use_is_refused_before_they_sample(tmp_path: Path) -> None:
    for name in ("a", "b", "full"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.yaml").write_text("")
    words = [tmp_path / "a", tmp_path / "b", "--task", 2, "--prompts", tmp_path / "p.txt", "--out"]
    for more, why in (
        ([tmp_path / "full"], "holds files already"),
        ([tmp_path / "new", "--sample", "--steps '5"], "close each quote"),
        ([tmp_path / "new", "--sample", "--steps 5 --out=x"], "holds --out, which study make sets itself"),
    ):
        with pytest.raises(InputError, match=why):
            make(*words, *more)


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
        lambda study: study.update(seed=-1),
        lambda study: study["methods"].pop("b"),
        lambda study: study["rules"].update(least_answers=0),
    ):
        bad = json.loads(json.dumps(good))
        change(bad)
        (folder / "study.json").write_text(json.dumps(bad))
        with pytest.raises(InputError, match="is damaged"):
            read_study(folder)


def test_a_copy_that_is_missing_or_damaged_is_not_served(tmp_path: Path) -> None:
    folder = made_study(tmp_path)
    study = read_study(folder)
    application(folder, study)
    copy = folder / "images" / study.items[0].images[0]
    copy.write_bytes(bytes([copy.read_bytes()[0] ^ 1]) + copy.read_bytes()[1:])
    with pytest.raises(InputError, match="missing, damaged"):
        application(folder, study)
    copy.unlink()
    with pytest.raises(InputError, match="missing, damaged"):
        application(folder, study)


def test_an_answer_that_a_full_disk_cut_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made_study(tmp_path, "--checks", "0")
    answers = Answers(folder, read_study(folder))
    name, write = answers.start(), os.write
    item = answers.session(name).order[0][0].id
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, content: write(handle, content[:20]))
        with pytest.raises(InputError, match="no space left"):
            answers.put(name, item, "left", 1.0)
    answers.put(name, item, "left", 1.0)
    again = Answers(folder, answers.study)
    assert (again.damaged, list(again.sessions[name].answers)) == (1, [item])


def test_answers_that_are_no_file_are_refused(tmp_path: Path) -> None:
    folder = made_study(tmp_path)
    os.mkfifo(folder / "answers.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        Answers(folder, read_study(folder))


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


def test_a_study_is_made_by_one_command_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one matches its images, another with other settings would mix its own in."""
    words = [tmp_path / "a", tmp_path / "b", "--task", 2, "--out", tmp_path / "other" / "study"]
    made_study(tmp_path)
    refused = list[str]()

    def meanwhile(*args: object, **settings: object) -> Study:
        with pytest.raises(InputError) as error:
            make(*words, "--seed", 7)
        refused.append(str(error.value))
        return make_study(*args, **settings)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("ldmlab.study.design.make_study", meanwhile)
        make(*words)
    assert "is being written (" in refused[0]
    assert read_study(tmp_path / "other" / "study").seed == 0
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["study"]


@pytest.mark.parametrize("every", [pytest.param(False, id="last"), pytest.param(True, marks=pytest.mark.slow)])
def test_a_study_that_was_killed_at_a_write_is_made_again(every: bool, tmp_path: Path) -> None:
    """Nothing half-written is a study, nothing that was left blocks, and nothing of it stays."""
    for number, name in enumerate(("a", "b")):
        image_folder(tmp_path / name, range(2), 100 * number)
    whole, study = tmp_path / "whole", tmp_path / "study"
    words = ["study", "make", str(tmp_path / "a"), str(tmp_path / "b"), "--task", "2", "--checks", "0", "--out"]
    writes = writes_of([*words, str(whole)], tmp_path)
    contents = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    renamed = writes - 2  # study.json gets its name
    for moment in [*range(1, renamed, 4), renamed, renamed + 1] if every else [renamed]:
        writes_of([*words, str(study)], tmp_path, moment)
        if not (study / "study.json").exists():
            writes_of([*words, str(study)], tmp_path)
        assert {path.relative_to(study): path.read_bytes() for path in study.rglob("*") if path.is_file()} == contents
        shutil.rmtree(study)
