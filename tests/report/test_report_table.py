"""Our rows in the paper's tables, in every format, and which evaluations may share a table."""

import json
import re
from copy import deepcopy
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldmlab.errors import InputError
from ldmlab.report.evaluation_page import score_lines
from ldmlab.report.metrics_json import comparable_groups
from ldmlab.report.page_content import Row, Table
from ldmlab.report.pages import comparison_tables, printed_tables, write_comparison
from ldmlab.report.paper_source import PAPER_FEATURES, PAPER_WEIGHTS
from ldmlab.report.paper_table import filled_table, paper_report
from ldmlab.report.render import FORMATS, as_latex, latex
from ldmlab.report.score_lines import ScoreLine, number_text


def result(**change: Any) -> dict[str, Any]:
    """An evaluation of FFHQ as the paper did it; `change`: reference__images=5 and the like."""
    content: dict[str, Any] = {
        "protocol": {"name": "paper_ffhq", "paper_table": "uncond/ffhq-256", "dataset": "ffhq"},
        "model": {"path": "runs/my_50%_run", "weights": "averaged", "step": 100},
        "sampling": {"images": 50_000, "steps": 200, "eta": 1.0, "guidance_scale": 1.0, "seed": 0, "sampler": "ddim"},
        "reference": {
            "split": "train",
            "images": 60_000,
            "manifest_hash": "c" * 64,
            "transform": {"rule": "short_side_bilinear_no_antialias"},
            "image_size": 256,
        },
        "features": {"name": PAPER_FEATURES, "weights_hash": PAPER_WEIGHTS + "d" * 8},
        "scores": {
            "fid": {"value": 4.5, "spread": None, "marks": []},
            "precision": {"value": 0.75, "spread": 0.01, "marks": []},
        },
        "provenance": {"command": "python evaluate.py model=x | tee", "commit": "abc", "packages": {"torch": "2"}},
    }
    content = deepcopy(content)
    for path, value in change.items():
        group, name = path.split("__")
        content[group][name] = value
    return content


def test_ours_stands_below_theirs_with_its_distance() -> None:
    (table,) = paper_report([result()])
    ours = table.rows[-1]
    assert (ours.label, ours.mark) == ("my_50%_run", "")
    assert ours.cells == ("4.50 (-0.48)", "0.75 ± 0.01 (+0.02)", "–")
    assert table.columns == ("FID ↓", "Precision ↑", "Recall ↑")
    notes = " ".join(table.notes)
    for words in ("python evaluate.py model=x", "commit abc", "steps=200", "eta=1.0", "cccccccccccc", "6726825ddddd"):
        assert words in notes
    assert "ours minus LDM-4" in notes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reference__images": 500}, "500 reference images"),
        ({"sampling__steps": 50}, "steps 50"),
    ],
)
def test_a_result_of_another_reference_is_marked(change: dict[str, Any], reason: str) -> None:
    (table,) = paper_report([result(), result(**change)])
    assert [row.mark for row in table.rows[-2:]] == ["", "†2"]
    assert any(note.startswith("†2") and reason in note for note in table.notes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reference__manifest_hash": None}, "does not record the hash"),
        ({"protocol__reference_hash": "e" * 64}, "than the protocol pins"),
    ],
)
def test_a_result_without_the_right_hash_enters_no_table(change: dict[str, Any], reason: str) -> None:
    (table,) = paper_report([result(**change, model__path="runs/wrong"), result()])
    assert [row.label for row in table.rows if row.kind == "ours"] == ["my_50%_run"]
    assert any(note.startswith("wrong is left out: ") and reason in note for note in table.notes)


def test_shards_that_changed_since_are_noticed(tmp_path: Any) -> None:
    import sys
    from pathlib import Path

    sys.path.append(str(Path(__file__).parents[1] / "data"))
    from shard_maker import write_shards

    manifest = write_shards(tmp_path / "train", [4], size=8)
    change = {"reference__folder": str(tmp_path / "train"), "reference__manifest_hash": manifest.hash}
    assert paper_report([result(**change)])[0].rows[-1].mark == ""
    write_shards(tmp_path / "other", [5], size=8)
    change["reference__folder"] = str(tmp_path / "other")
    table = paper_report([result(**change)])[0]
    assert not [row for row in table.rows if row.kind == "ours"]
    assert any("have changed since" in note for note in table.notes)


def test_the_row_that_ours_is_counted_against_can_be_chosen_and_is_checked() -> None:
    base = {"protocol__paper_table": "class-cond/imagenet-256", "protocol__dataset": "imagenet"}
    table = paper_report([result(**base, protocol__paper_row="ldm-4-g-1.5")])[0]
    assert table.rows[-1].cells[0] == "4.50 (+0.90)"
    assert any("guidance_scale 1, the table's row has 1.5" in note for note in table.notes)
    assert paper_report([result(**base)])[0].rows[-1].cells[0] == "4.50"
    with pytest.raises(InputError, match="did you mean uncond/ffhq-256"):
        paper_report([result()], "uncond/ffhq-25")


def test_a_size_of_hole_stands_in_its_own_table() -> None:
    scores = {"fid": {"value": 12.0, "spread": None}, "lpips": {"value": 0.25, "spread": 0.02}}
    given = result(
        protocol__paper_table="inpaint/places-all",
        protocol__bucket_tables={"hole_40_50": "inpaint/places-40-50", "hole_00_10": "inpaint/places-40-50"},
    )
    given["buckets"] = {
        "hole_40_50": {"hole": [0.4, 0.5], "images": 90, "scores": scores},
        "hole_00_10": {"hole": [0.0, 0.1], "images": 0, "scores": {}},
    }
    whole, part = paper_report([given])
    assert "all samples" in whole.title
    assert part.rows[-1].label == "my_50%_run, hole_40_50"
    assert part.rows[-1].cells == ("12.00", "0.250 ± 0.020")


class Tags(HTMLParser):
    """Tags that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_every_format_holds_everything(form: str) -> None:
    tables = paper_report([result(), result(sampling__steps=50)])
    text = FORMATS[form](tables)
    for words in ("ProjectedGAN", "LDM-4", "4.50 (-0.48)", "0.73", "steps 50"):
        assert words in text
    if form == "html":
        tags = Tags()
        tags.feed(text)
        assert tags.open == []
        assert "http" not in text
    if form == "md":
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}
    if form == "text":
        body = [line for line in text.splitlines() if line.startswith(("> ", "* ", "  "))]
        assert len({len(line) for line in body if line.startswith(">")}) == 1


def test_latex_escapes_what_it_would_read() -> None:
    text = FORMATS["latex"](paper_report([result()]))
    assert r"my\_50\%\_run" in text
    assert text.count(r"\begin") == text.count(r"\end") == 2
    assert not re.search(r"[↓↑–±†]", re.sub(r"^%.*$", "", text, flags=re.MULTILINE))
    assert latex("a^b~\\") == r"a\textasciicircum{}b\textasciitilde{}\textbackslash{}"


def test_only_equal_measurements_share_a_table() -> None:
    results = [
        result(),
        result(reference__manifest_hash="f" * 64),
        result(sampling__steps=10),
        result(reference__manifest_hash=None) | {"folder": "x"},
        result(reference__manifest_hash=None) | {"folder": "y"},
        result(features__weights_hash="e" * 16),
    ]
    assert comparable_groups(results) == [[0, 2], [1], [3], [4], [5]]
    rows = [ScoreLine("fid", "FID", "4.5", "lower", "")]
    tables = comparison_tables(results, list("abcdef"), [rows] * 6)
    assert [[row.label for row in table.rows] for table in tables] == [["a", "c"], ["b"], ["d"], ["e"], ["f"]]
    assert "not recorded" in tables[2].title


def test_scores_made_by_other_options_stand_in_columns_of_their_own() -> None:
    metrics = [{"precision_recall": {"neighbours": k, "screening": k > 3}} for k in (3, 5)]
    results = [result(protocol__metrics=node) for node in metrics]
    (table,) = comparison_tables(results, ["a", "b"], [score_lines(one) for one in results])
    assert table.columns == ("FID ↓", "Precision ↑ (neighbours=3)", "Precision ↑ (neighbours=5)")
    assert [row.cells for row in table.rows] == [("4.500", "75.0% ± 1.0%", "–"), ("4.500", "–", "75.0% ± 1.0%")]


def test_seeds_of_one_configuration_get_a_mean_and_a_deviation() -> None:
    def of_seed(seed: int, configuration: str = "abc") -> dict[str, Any]:
        change = {"configuration": configuration, "training_seed": seed, "group": "ffhq"}
        score = {"fid": {"value": 4.0 + seed, "spread": None, "marks": []}}
        return result(model__path=f"runs/{seed}", scores__fid=score["fid"]) | {
            "model": result()["model"] | {"path": f"runs/{seed}"} | change
        }

    results = [of_seed(0), of_seed(1), of_seed(2), of_seed(3, "other")]
    (table,) = comparison_tables(results, list("abcd"), [score_lines(one) for one in results])
    assert [row.label for row in table.rows] == [*"abcd", "ffhq, mean ± deviation over 3 seeds"]
    assert table.rows[-1].cells == ("5.000 ± 1.0", "75.0% ± 0.0%")
    twice = [of_seed(0), of_seed(0)]  # one model scored twice says nothing about training
    (table,) = comparison_tables(twice, list("ab"), [score_lines(one) for one in twice])
    assert [row.label for row in table.rows] == ["a", "b"]


@pytest.mark.parametrize(
    ("features", "called"),
    [
        (PAPER_FEATURES, "FID"),
        ("timm vit_large_patch14_dinov2", "FD-DINOv2"),
        ("open_clip ViT-B-32 openai", "FD-CLIP"),
        ("clip run c", "Fréchet distance"),
    ],
)
def test_a_distance_is_called_by_its_network(features: str, called: str) -> None:
    assert score_lines(result(features__name=features))[0].title == called


def test_rows_of_one_name_are_told_apart_and_sources_are_heard() -> None:
    table = filled_table("class-cond/imagenet-256")
    names = [row.label for row in table.rows]
    assert len(set(names)) == len(names)
    assert any(name.startswith("LDM-4-G") and "guidance 1.5" in name for name in names)
    place = table.columns.index("Parameters")
    assert {"400M", "395M"} <= {row.cells[place] for row in table.rows}
    assert any("sources disagree on LDM-8-G at 4.8M steps" in note for note in table.notes)
    assert any("LAFITE" in note and "CogView" in note for note in filled_table("text2img/coco-256").notes)


def test_the_paper_s_tables_are_printed_without_any_run() -> None:
    text = printed_tables([], "md", "layout/coco-256")
    assert text.count("###") == 1
    assert "| LDM-4 | 40.91 |" in text
    assert printed_tables([], "latex").count(r"\begin{table}") > 15
    with pytest.raises(InputError, match="did you mean layout/coco-256"):
        printed_tables([], "md", "layout/coco-25")


def test_our_size_stands_in_its_column() -> None:
    given = result(protocol__paper_table="text2img/coco-256") | {
        "model": {"path": "ours", "parameters": 1_451_000_000, "first_stage_parameters": 84_000_000}
    }
    (table,) = paper_report([given])
    assert table.rows[-1].cells[table.columns.index("Parameters")] == "1.45B"


@pytest.mark.slow
def test_a_comparison_of_forty_runs_stays_small(tmp_path: Any) -> None:
    noise = np.random.default_rng(0)
    (tmp_path / "shared").mkdir()
    for number in range(16):
        pixels = noise.integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "shared" / f"{number}.png")
    shown = [{"file": f"{number}.png", "caption": "noise"} for number in range(16)]
    for run in range(40):
        content = result(model__path=f"runs/{run}") | {"format_version": 1, "images": {"samples": shown}}
        (tmp_path / str(run)).mkdir()
        for number in range(16):
            (tmp_path / str(run) / f"{number}.png").hardlink_to(tmp_path / "shared" / f"{number}.png")
        (tmp_path / str(run) / "metrics.json").write_text(json.dumps(content))
    page = write_comparison([tmp_path / str(run) for run in range(40)], tmp_path / "out")
    assert page.stat().st_size < 5_000_000
    assert page.read_text().count("<img") == 40 * 16


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (3.6, None, "3.600"),
        (12, 0.5, "12.00 ± 0.50"),
        (0.07, None, "0.0700"),
        (-2.25, 12.34, "-2.250 ± 12"),
        (1234.5, None, "1234"),
        (float("inf"), None, "inf"),
        (0, 0, "0.00 ± 0.0"),
    ],
)
def test_numbers_keep_their_zeros_and_never_get_an_exponent(value: float, spread: float | None, text: str) -> None:
    assert number_text(value, spread) == text


def test_latex_has_one_rule_above_ours_and_none_too_many() -> None:
    alone, beside = (
        Table("T", ("FID",), (*theirs, Row("ours", "mine", ("1.000",))), ())
        for theirs in ((), (Row("theirs", "LDM-4", ("2.00",)),))
    )
    assert [as_latex([table]).count("midrule") for table in (alone, beside)] == [1, 2]
