"""Our row stands in the paper's table, and says why it may not be compared."""

from dataclasses import replace

import pytest

from ldmlab.errors import InputError
from ldmlab.evaluation.paper_conditions import PAPER_FEATURES, Measured
from ldmlab.evaluation.paper_table import paper_tables, place

LIKE_THE_PAPER = Measured(
    method="ours",
    values={"fid": 6.25, "precision": 0.7, "recall": 0.5},
    dataset="celebahq",
    picture_size=256,
    samples=50_000,
    features=PAPER_FEATURES,
    reference_split="train",
    reference_pictures=25_000,
    reference_rule="short_side_bilinear_no_antialias",
    reference_hash="a" * 64,
    current_hash="a" * 64,
    sampling={"steps": 500, "eta": 0.0},
)


def test_a_measurement_like_the_papers_is_comparable() -> None:
    table = place("uncond/celebahq-256", LIKE_THE_PAPER)
    assert table.comparable
    assert table.ours == ("ours", {"fid": "6.25", "precision": "0.7", "recall": "0.5"})
    rows = {method: values for method, _, values in table.rows}
    assert rows["LDM-4"] == {"fid": "5.11", "precision": "0.72", "recall": "0.49"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dataset": "ffhq"}, "other data"),
        ({"picture_size": 64}, "64 px"),
        ({"samples": 300}, "300 samples"),
        ({"features": "clip run"}, "features of clip run"),
        ({"reference_split": "val"}, "val split"),
        ({"reference_rule": "centre"}, "rule centre"),
        ({"reference_pictures": 30_000}, "30,000 reference pictures"),
        ({"reference_hash": None}, "does not say by hash"),
        ({"pinned_hash": "b" * 64}, "than the protocol pins"),
        ({"current_hash": "b" * 64}, "have changed since"),
        ({"sampling": {"steps": 200}}, "steps 200, the paper's row has 500"),
    ],
)
def test_every_difference_is_a_reason(change: dict[str, object], reason: str) -> None:
    table = place("uncond/celebahq-256", replace(LIKE_THE_PAPER, **change))  # type: ignore[arg-type]
    assert not table.comparable
    assert any(reason in found for found in table.reasons)


@pytest.mark.parametrize("name", sorted(paper_tables()))
def test_every_table_can_be_shown(name: str) -> None:
    table = place(name, LIKE_THE_PAPER)
    assert table.rows
    assert all(set(values) <= set(table.columns) for _, _, values in table.rows)


def test_an_unknown_table_gets_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean text2img/coco-256"):
        place("text2img/coco-25", LIKE_THE_PAPER)
