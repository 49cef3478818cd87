"""Our row in the paper's table, and the reasons why it may not be compared."""

from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest

from ldmlab.errors import InputError
from ldmlab.interop.published_weights import WEIGHTS
from ldmlab.report import paper_source
from ldmlab.report.paper_source import PAPER_FEATURES, PAPER_WEIGHTS, all_tables
from ldmlab.report.paper_table import place

LIKE_THE_PAPER: dict[str, Any] = {
    "model": {"path": "runs/ours"},
    "scores": {"fid": {"value": 6.25}, "precision": {"value": 0.7}, "recall": {"value": 0.5}},
    "protocol": {"dataset": "celebahq", "metrics": {"precision_recall": {"neighbours": 3}}},
    "sampling": {"images": 50_000, "steps": 500, "eta": 0.0, "guidance_scale": 1.0, "sampler": "ddim"},
    "reference": {
        "image_size": 256,
        "split": "train",
        "images": 25_000,
        "split_images": 25_000,
        "transform": {"rule": "short_side_bilinear_no_antialias"},
        "manifest_hash": "a" * 64,
        "folder": "celebahq/train",
    },
    "features": {"name": PAPER_FEATURES, "weights_hash": PAPER_WEIGHTS + "0" * 8},
}


@pytest.fixture(autouse=True)
def manifest(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The manifest that lies in the folder of the reference."""
    found = SimpleNamespace(hash="a" * 64)
    monkeypatch.setattr(paper_source, "read_manifest", lambda folder: found)
    return found


def but(**change: Any) -> dict[str, Any]:
    """The record above with other values; `change`: reference__images=5 and the like."""
    record = deepcopy(LIKE_THE_PAPER)
    for path, value in change.items():
        group, name = path.split("__")
        record[group][name] = value
    return record


def test_a_measurement_like_the_papers_is_comparable() -> None:
    table = place("uncond/celebahq-256", LIKE_THE_PAPER)
    assert table.comparable
    assert table.ours == ("ours", {"fid": "6.25", "precision": "0.70", "recall": "0.50"})
    rows = {method: values for method, _, values in table.rows}
    assert rows["LDM-4"] == {"fid": "5.11", "precision": "0.72", "recall": "0.49"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol__dataset": "ffhq"}, "other data"),
        ({"reference__image_size": 64}, "64 px"),
        ({"sampling__images": 300}, "300 samples"),
        ({"features__name": "clip run"}, "features of clip run"),
        ({"reference__split": "val"}, "val split"),
        ({"reference__transform": {"rule": "centre"}}, "rule centre"),
        ({"reference__resized": "from 512 px to 256 px"}, "reference resized again, from 512 px"),
        ({"reference__images": 30_000}, "30,000 reference images"),
        ({"sampling__steps": 200}, "steps 200, the table's row has 500"),
        ({"sampling__sampler": "dpm"}, "sampler dpm, the table's row has ddim"),
        ({"sampling__guidance_scale": 3.0}, "guidance_scale 3, the table's row has 1"),
        ({"model__guiders": {"classifier": "runs/c"}}, "guided by classifier"),
        ({"features__weights_hash": "0123456789abcdef"}, "features by the weights 0123456789abcdef"),
        ({"features__weights_hash": None}, "features by the weights None"),
        ({"reference__split_images": 30_000}, "25,000 of 30,000 images"),
        ({"reference__split_images": None, "protocol__reference_limit": 25_000}, "the first 25,000 images"),
        ({"protocol__metrics": {"precision_recall": {"neighbours": 5}}}, "neighbours=5 of precision_recall"),
    ],
)
def test_every_difference_is_a_reason(change: dict[str, Any], reason: str) -> None:
    table = place("uncond/celebahq-256", but(**change))
    assert not table.comparable
    assert any(reason in found for found in table.reasons)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reference__manifest_hash": None}, "does not record the hash"),
        ({"protocol__reference_hash": "b" * 64}, "than the protocol pins"),
        ({"manifest": "b" * 64}, "have changed since"),
    ],
)
def test_images_of_another_hash_are_barred(change: dict[str, Any], reason: str, manifest: SimpleNamespace) -> None:
    manifest.hash = change.pop("manifest", manifest.hash)
    table = place("uncond/celebahq-256", but(**change))
    assert not table.comparable
    assert reason in table.barred[0]


def test_guidance_is_compared_with_what_the_row_says() -> None:
    ours = but(
        protocol__dataset="imagenet",
        sampling__steps=250,
        sampling__guidance_scale=1.5,
        reference__images=1_281_167,
        reference__split_images=1_281_167,
    )
    ours["scores"] = {"fid": {"value": 4.0}, "is": {"value": 200.0}}
    by_row = {row: place("class-cond/imagenet-256", ours, row).reasons for row in ("ldm-4-g-1.5", "ldm-4")}
    assert by_row == {"ldm-4-g-1.5": (), "ldm-4": ("guidance_scale 1.5, the table's row has 1",)}
    by_classifier = ours | {"sampling": ours["sampling"] | {"steps": 200, "guidance_scale": 1.0}}
    (reason,) = place("class-cond/imagenet-256", by_classifier, "ldm-8-g-4.8m").reasons
    assert reason == "no guidance but classifier-free, the table's row has classifier"
    one_split = ours | {"protocol": {"dataset": "imagenet", "metrics": {"is": {"splits": 1}}}}
    (reason,) = place("class-cond/imagenet-256", one_split, "ldm-4-g-1.5").reasons
    assert reason == "splits=1 of is, the table's tools take 10"


def test_the_paper_s_network_is_the_one_that_is_fetched() -> None:
    assert WEIGHTS["inception"].sha256 == PAPER_WEIGHTS


@pytest.mark.parametrize("name", sorted(all_tables()))
def test_every_table_can_be_shown(name: str) -> None:
    table = place(name, LIKE_THE_PAPER)
    assert table.rows
    assert all(set(values) <= set(table.columns) for _, _, values in table.rows)


def test_an_unknown_table_gets_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean text2img/coco-256"):
        place("text2img/coco-25", LIKE_THE_PAPER)


def later(**model: Any) -> dict[str, Any]:
    """A measurement of DiT-XL/2 as its authors made it."""
    record = but(
        protocol__dataset="imagenet",
        sampling__steps=250,
        sampling__guidance_scale=1.5,
        sampling__sampler="ddpm",
        reference__images=1_281_167,
        reference__split_images=1_281_167,
        reference__transform={"rule": "adm"},
    )
    return record | {"model": {"path": "runs/ours", "backbone": "DiT", "process": "Schedule"} | model}


def test_later_systems_have_tables_of_their_own() -> None:
    table = place("published/imagenet-256", later(), "dit-xl-2-1.5")
    assert table.comparable
    assert table.deltas["fid"] == "+3.98"
    assert any("README of facebookresearch/DiT" in remark for remark in table.remarks)
    (reason,) = place("published/imagenet-256", later(), "sit-xl-2-1.5").reasons
    assert reason == "sampler ddpm, the table's row has sde"


@pytest.mark.parametrize("model", [{}, {"backbone": "UNet", "process": "LinearPath"}])
def test_later_systems_enter_no_table_of_the_paper(model: dict[str, Any]) -> None:
    table = place("class-cond/imagenet-256", later(**model), "ldm-4-g-1.5")
    assert not table.comparable
    assert "none of the paper's systems" in table.barred[0]
    assert place("class-cond/imagenet-256", later(backbone="UNet"), "ldm-4-g-1.5").barred == ()
