"""metrics.json of other versions, damaged or hostile: a page, or one sentence; never a traceback or a foreign file."""

import copy
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ldmlab.app.cli import dispatch
from ldmlab.errors import InputError
from ldmlab.report.evaluation_page import evaluation_page, score_lines
from ldmlab.report.line_chart import Chart
from ldmlab.report.metrics_json import read_evaluation
from ldmlab.report.page_content import Charts, Page, Section
from ldmlab.report.pages import write_comparison, write_report
from ldmlab.report.render import html, markdown, write_page

OLD = Path(__file__).parents[1] / "assets" / "format1" / "evaluation"  # written by ldmlab 0.1, every part of a record
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)> [a](b) | \\textbf{x}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "evaluation"))


def record() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((OLD / "metrics.json").read_text())
    return content


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a record, and the first entry of every list."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> dict[str, Any]:
    content: Any = record()
    part = content
    for key in path[:-1]:
        part = part[key]
    change(part, path[-1])
    return dict(content)


def test_a_record_of_the_version_before_has_its_page(folder: Path) -> None:
    page = write_report(folder).read_text()
    text = (folder / "report.md").read_text()
    for words in (
        *("Generated and real", "Memorisation", "Conditioning accuracy", "Classifier accuracy on real images"),
        *("Beside baselines without a model", "Inputs and samples", "By size of the hole", "Over guidance scale"),
        *("Over the number of samples", "By category", "What the paper leaves open", "not comparable", "val"),
    ):
        assert words in page, words
    assert "cannot be read" not in page
    assert page.count("<img") > 20
    assert "| Fréchet distance ↓ | 0.404 |" in text
    rows = (folder / "points.csv").read_text().splitlines()
    assert rows[0] == "section,chart,line,x_title,x,y,spread"
    assert "Denoiser,psnr,val,step,2.0,12.0," in rows
    assert any(row.startswith("Over guidance scale,precision and recall over guidance scale,Recall") for row in rows)
    assert page.count("<svg") == len({tuple(row.split(",")[:2]) for row in rows[1:]})
    files = [file.read_text().splitlines() for file in (folder / "points").glob("*.csv")]
    assert len(files) == page.count("<svg")
    assert sorted(row for file in files for row in file[1:]) == sorted(rows[1:])
    assert {file[0] for file in files} == {rows[0]}
    assert all(len({row.split(",")[1] for row in file[1:]}) == 1 for file in files)


def test_old_words_are_gone(folder: Path) -> None:
    content = record()
    content["judges"]["layout"] |= {"measures": "class in the box", "how": "A classifier."}  # words of that version
    (folder / "metrics.json").write_text(json.dumps(content))
    page = write_report(folder).read_text().lower()
    for word in ("judge", "drawn", "asked", "rebuilt", "told", "learned by heart", "there and back"):
        assert not re.search(rf"\b{word}", page), word


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "3", '"x"', "[" * 100_000, "{}", '{"format_version": 9}', '{"format_version": true}'),
        *('{"format_version": 1}', '{"format_version": 1, "scores": []}', '{"format_version": 1, "scores": {"a": 3}}'),
        *('{"format_version": 1, "scores": {"fid": {"value": "4"}}}', '{"format_version": 1, "scores": {}}'),
    ],
    ids=range(15),
)
def test_a_file_that_is_no_record_is_one_sentence(folder: Path, content: str) -> None:
    (folder / "metrics.json").write_text(content)
    for write in (lambda: write_report(folder), lambda: write_comparison([folder], folder / "out")):
        with pytest.raises(InputError, match=r"metrics\.json.*run the evaluation again") as caught:
            write()
        assert "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()


def test_bytes_that_are_no_text_are_one_sentence(folder: Path) -> None:
    (folder / "metrics.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(InputError, match=r"cannot be read .*run the evaluation again"):
        write_report(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "value",
    ["missing", None, -1.5, "x", [1], {"a": 1}, math.inf, 10**400, "\ud83d"],
    ids=lambda value: repr(value)[:12],
)
def test_every_part_may_be_damaged(tmp_path: Path, value: Any) -> None:
    """A page or one sentence, whatever stands where."""

    def put(part: Any, key: Any) -> None:
        if value == "missing":
            del part[key]
        else:
            part[key] = copy.deepcopy(value)

    pages, sentences = 0, []
    for path in places(record()):
        try:
            (tmp_path / "metrics.json").write_text(json.dumps(changed(path, put)))
            page = evaluation_page(read_evaluation(tmp_path))
        except InputError as error:
            sentences.append(str(error))
            continue
        if pages % 10 == 0:  # the templates take any text
            html(page).encode()
            markdown(page, tmp_path).encode()
        pages += 1
    assert not [sentence for sentence in sentences if sentence[-1] not in ".?" or "\n" in sentence]
    assert pages > 20


def test_no_text_of_a_record_becomes_markup(folder: Path) -> None:
    def poisoned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: poisoned(part, name) for name, part in value.items()}
        if isinstance(value, list):
            return [poisoned(part, key) for part in value]
        fixed = key in ("file", "split", "paper_table", "sample", "train", "held_out", "pictures", "given", "folder")
        return HOSTILE if isinstance(value, str) and not fixed else value

    (folder / "metrics.json").write_text(json.dumps(poisoned(record())))
    write_report(folder)
    write_comparison([folder], folder / "comparison")
    for place in (folder, folder / "comparison"):
        page, text = (place / "report.html").read_text(), (place / "report.md").read_text()
        assert "&lt;script&gt;" in page
        for sign in ("<script", "onerror=alert(1)>"):
            assert sign not in page
        assert "<script" not in text.replace("\\<script", "")
        assert "[a](b)" not in text


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "no image", "missing", "folder", "bomb"])
def test_only_images_of_the_folder_enter_the_page(folder: Path, tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret.png"
    shutil.copy(folder / "pictures" / "real_00000.png", secret)
    names = {
        **{"parent": "../secret.png", "absolute": str(secret), "link": "pictures/link.png", "folder": "pictures"},
        **{"no image": "metrics.json", "missing": "pictures/none.png", "bomb": "pictures/bomb.png"},
    }
    (folder / "pictures" / "link.png").symlink_to(secret)
    head = bytes.fromhex("89504e470d0a1a0a0000000d49484452" + "0000ffff" * 2 + "0802000000")
    (folder / "pictures" / "bomb.png").write_bytes(head + b"\0" * 40)
    content = record()
    content["pictures"]["samples"][0]["file"] = names[kind]
    (folder / "metrics.json").write_text(json.dumps(content))
    page = write_report(folder).read_text()
    assert page.count("cannot be read") == 2  # among the samples and beside its input
    content["curves"] = [{"title": "x", "file": "../secret.png"}]
    (folder / "metrics.json").write_text(json.dumps(content))
    assert "secret" not in write_report(folder).read_text().replace(names[kind], "")


def test_a_score_from_outside_shows_its_own_title_arrow_and_sentence(folder: Path) -> None:
    content = record()
    for name, better in (("gap", False), ("hits", True), ("size", None)):
        content["scores"][name] = {"value": 0.5, "title": f"Mean {name}", "meaning": f"all {name}"}
        content["scores"][name] |= {} if better is None else {"higher_is_better": better}
    (folder / "metrics.json").write_text(json.dumps(content))
    lines = {line.name: line for line in score_lines(read_evaluation(folder))}
    found = [(lines[name].head, lines[name].meaning) for name in ("gap", "hits", "size")]
    assert found == [("Mean gap ↓", "all gap"), ("Mean hits ↑", "all hits"), ("Mean size", "all size")]
    page = write_report(folder).read_text()
    assert "<td>Mean gap ↓</td><td>0.500</td><td>all gap</td>" in page


def test_the_page_counts_images_and_marks_scores_of_few(folder: Path) -> None:
    content = record()
    content["reference"] |= {"pictures": 13, "split_pictures": 14}
    (folder / "metrics.json").write_text(json.dumps(content))
    page = write_report(folder).read_text()
    assert "compared with 13 of 14 validation images" in page
    assert "of 13 images: below 1,000, noise reaches high values too" in page
    content["reference"]["pictures"] = content["sampling"]["pictures"] = 5000
    (folder / "metrics.json").write_text(json.dumps(content))
    assert "noise reaches high values" not in write_report(folder).read_text()


def test_the_page_names_unreadable_images_and_how_good_the_encoder_is(folder: Path) -> None:
    content = record()
    content["features"]["quality"] = {"recall_1_of_50": 0.5, "chance_recall_1_of_50": 0.02}
    content["reference"] |= {"pictures": 11, "unreadable": {"count": 1, "of": 12, "names": ["torn<b>.png"]}}
    (folder / "metrics.json").write_text(json.dumps(content))
    page, text = write_report(folder).read_text(), (folder / "report.md").read_text()
    assert "finds the caption among 50 for 50% of validation images, by chance 2%" in page
    assert "compared with 11 of 12 validation images" in page
    assert "1 of 12 images: torn&lt;b&gt;.png" in page
    assert "1 of 12 images: torn\\<b>.png" in text


def test_the_command_refuses_in_one_line(folder: Path) -> None:
    (folder / "metrics.json").write_text("[]")
    with pytest.raises(InputError, match="is not a JSON object"):
        dispatch(["report", str(folder)])
    with pytest.raises(InputError, match="is not a JSON object"):
        dispatch(["report", str(folder), "--format", "md"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["FOLDER", "FOLDER", "--out", "FILE"], "have one name; choose another path"),
        (["FOLDER", "FOLDER", "--out", "FILE/below"], "have one name; choose another path"),
        (["FILE"], "holds no metrics.json"),
        (["NONE"], "holds no metrics.json"),
        (
            ["FOLDER", "--format", "md", "--table", "text2img/coco"],
            r"--table text2img/coco is .* did you mean text2img/",
        ),
        (["--format", "md", "--table", "x"], "--table x is no published table; there are"),
        (["FOLDER", "--table", "x"], "--table x is for printing; add --format"),
        ([], "FOLDER is missing"),
        (["FOLDER", "OTHER"], "--out is missing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_be_met_are_one_sentence(folder: Path, words: list[str], sentence: str) -> None:
    (folder.parent / "file").write_text("")
    places = {"FOLDER": folder, "FILE": folder.parent / "file", "NONE": folder.parent / "none", "OTHER": folder / "x"}
    typed = [
        str(places.get(word.split("/")[0], word)) + ("/below" if word.endswith("/below") else "") for word in words
    ]
    with pytest.raises(InputError, match=sentence):
        dispatch(["report", *typed])
    assert (folder.parent / "file").read_text() == ""


def test_charts_of_one_name_have_a_file_each(tmp_path: Path) -> None:
    charts = [Chart("FID, ½ of\ud83d/../x", {"a": [(0.0, value)]}) for value in (1.0, 2.0)]
    empty = Chart("nothing", {"a": [(0.0, math.nan)]})
    write_page(tmp_path / "page.html", Page("", "", [Section("Höhe", [Charts([*charts, empty])])]))
    files = {file.name: file.read_text().splitlines() for file in (tmp_path / "points").iterdir()}
    assert sorted(files) == ["hohe-fid-12-of-x-2.csv", "hohe-fid-12-of-x.csv"]
    assert files["hohe-fid-12-of-x.csv"][1:] == ['Höhe,"FID, ½ of?/../x",a,step,0.0,1.0,']
    assert files["hohe-fid-12-of-x-2.csv"][1:] == ['Höhe,"FID, ½ of?/../x",a,step,0.0,2.0,']


def test_a_chart_that_is_gone_leaves_no_values(tmp_path: Path) -> None:
    charts = [Chart(name, {"a": [(0.0, 1.0)]}) for name in ("fid", "loss")]
    write_page(tmp_path / "page.html", Page("", "", [Section("s", [Charts(charts)])]))
    own = tmp_path / "points" / "mine.csv"
    own.write_text("a table,of the user\n")
    write_page(tmp_path / "page.html", Page("", "", [Section("s", [Charts(charts[:1])])]))
    assert sorted(file.name for file in (tmp_path / "points").iterdir()) == ["mine.csv", "s-fid.csv"]
    write_page(tmp_path / "page.html", Page("", "", []))
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["mine.csv", "page.html", "points"]
    own.unlink()
    write_page(tmp_path / "page.html", Page("", "", []))
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
