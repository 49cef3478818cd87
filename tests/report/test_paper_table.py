"""Our row in the paper's table, and the reasons why it may not be compared."""

from dataclasses import replace

import pytest

from ldmlab.errors import InputError
from ldmlab.interop.published_weights import WEIGHTS
from ldmlab.report.paper_conditions import PAPER_FEATURES, PAPER_WEIGHTS, Measured
from ldmlab.report.paper_table import paper_tables, place

LIKE_THE_PAPER = Measured(
    method="ours",
    values={"fid": 6.25, "precision": 0.7, "recall": 0.5},
    dataset="celebahq",
    picture_size=256,
    samples=50_000,
    features=PAPER_FEATURES,
    reference_split="train",
    reference_images=25_000,
    reference_rule="short_side_bilinear_no_antialias",
    reference_hash="a" * 64,
    current_hash="a" * 64,
    sampling={"steps": 500, "eta": 0.0, "guidance_scale": 1.0, "sampler": "ddim"},
    weights_hash=PAPER_WEIGHTS + "0" * 8,
    reference_of=25_000,
    metrics={"precision_recall": {"neighbours": 3}},
)


def test_a_measurement_like_the_papers_is_comparable() -> None:
    table = place("uncond/celebahq-256", LIKE_THE_PAPER)
    assert table.comparable
    assert table.ours == ("ours", {"fid": "6.25", "precision": "0.70", "recall": "0.50"})
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
        ({"resized": "from 512 px to 256 px"}, "reference resized again, from 512 px"),
        ({"reference_images": 30_000}, "30,000 reference images"),
        ({"sampling": {"steps": 200}}, "steps 200, the paper's row has 500"),
        ({"sampling": {"steps": 500, "sampler": "dpm"}}, "sampler dpm, the paper's row has ddim"),
        ({"sampling": {"steps": 500, "guidance_scale": 3.0}}, "guidance_scale 3, the paper's row has 1"),
        ({"guiders": {"classifier": "runs/c"}}, "guided by classifier"),
        ({"weights_hash": "0123456789abcdef"}, "features by the weights 0123456789abcdef"),
        ({"weights_hash": None}, "features by the weights None"),
        ({"reference_of": 30_000}, "25,000 of 30,000 images"),
        ({"reference_of": None, "reference_limit": 25_000}, "the first 25,000 images"),
        ({"metrics": {"precision_recall": {"neighbours": 5}}}, "neighbours=5 of precision_recall"),
    ],
)
def test_every_difference_is_a_reason(change: dict[str, object], reason: str) -> None:
    table = place("uncond/celebahq-256", replace(LIKE_THE_PAPER, **change))  # type: ignore[arg-type]
    assert not table.comparable
    assert any(reason in found for found in table.reasons)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reference_hash": None}, "does not record the hash"),
        ({"pinned_hash": "b" * 64}, "than the protocol pins"),
        ({"current_hash": "b" * 64}, "have changed since"),
    ],
)
def test_images_of_another_hash_are_barred(change: dict[str, object], reason: str) -> None:
    table = place("uncond/celebahq-256", replace(LIKE_THE_PAPER, **change))  # type: ignore[arg-type]
    assert not table.comparable
    assert reason in table.barred[0]


def test_guidance_is_compared_with_what_the_row_says() -> None:
    ours = replace(
        LIKE_THE_PAPER,
        dataset="imagenet",
        values={"fid": 4.0, "is": 200.0},
        sampling={"steps": 250, "eta": 0.0, "guidance_scale": 1.5},
        reference_of=1_281_167,
        reference_images=1_281_167,
    )
    by_row = {row: place("class-cond/imagenet-256", ours, row).reasons for row in ("ldm-4-g-1.5", "ldm-4")}
    assert by_row == {"ldm-4-g-1.5": (), "ldm-4": ("guidance_scale 1.5, the paper's row has 1",)}
    sampling = {"steps": 200, "guidance_scale": 1.0}
    (reason,) = place("class-cond/imagenet-256", replace(ours, sampling=sampling), "ldm-8-g-4.8m").reasons
    assert reason == "no guidance but classifier-free, the paper's row has classifier"
    (reason,) = place("class-cond/imagenet-256", replace(ours, metrics={"is": {"splits": 1}}), "ldm-4-g-1.5").reasons
    assert reason == "splits=1 of is, the paper's tools take 10"


def test_the_paper_s_network_is_the_one_that_is_fetched() -> None:
    assert WEIGHTS["inception"].sha256 == PAPER_WEIGHTS


@pytest.mark.parametrize("name", sorted(paper_tables()))
def test_every_table_can_be_shown(name: str) -> None:
    table = place(name, LIKE_THE_PAPER)
    assert table.rows
    assert all(set(values) <= set(table.columns) for _, _, values in table.rows)


def test_an_unknown_table_gets_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean text2img/coco-256"):
        place("text2img/coco-25", LIKE_THE_PAPER)
