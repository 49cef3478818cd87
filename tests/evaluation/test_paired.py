"""Samples beside their originals, whole and by size of the hole, against numbers written out here."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answering_models import Answers
from test_reference_statistics import Means
from torch import Tensor

from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.breakdowns import PairedPass
from ldmlab.evaluation.model_evaluation import Evaluation
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.real_images import conditions
from ldmlab.inference.sample_settings import SampleSettings
from ldmlab.metrics.frechet import FrechetDistance
from ldmlab.report.pages import write_report
from ldmlab.report.paper_table import paper_report
from ldmlab.tasks.inpainting import Inpainting
from ldmlab.values import Solver

sys.path.append(str(Path(__file__).parents[1] / "data"))
from shard_maker import write_shards

SIZE, IMAGES = 32, 9
PROTOCOL = Protocol(
    name="holes",
    reference="val",
    metrics={},
    samples=IMAGES,
    steps=1,
    guidance_scale=1.0,
    pairs=True,
    mask_buckets={"small": [0.0, 0.2], "large": [0.2, 0.5], "none": [0.9, 1.0]},
    bucket_tables={"large": "inpaint/places-40-50", "none": "inpaint/places-40-50"},
    paper_table="inpaint/places-all",
    leaves_open={"masks": "thin ones"},
    shown=4,
)


class Darkener:
    """In place of a model: gives back the image, darker inside the hole."""

    reads = frozenset({"image", "mask"})
    info: Mapping[str, Any] = {"path": "runs/darkener", "weights": "averaged"}
    image_size = (SIZE, SIZE)
    precision, diffusion = "float32", Answers.diffusion

    def resolved(self, settings: SampleSettings, requests: Sequence[Any] = ()) -> SampleSettings:
        return settings.filled(solver=Solver("ddim", "uniform", 5), guidance_scale=1.0, size=(SIZE, SIZE), levels=10)

    def sample_batch(self, requests: Sequence[Mapping[str, Any]], *rest: Any) -> Tensor:
        return torch.stack([torch.from_numpy(darkened(one["image"], one["mask"])) for one in requests])


def darkened(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask[..., None] > 0, image // 2, image).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardData:
    folder = tmp_path_factory.mktemp("shards")
    for split, count in (("train", 3), ("val", IMAGES)):
        write_shards(folder / split, [count], size=SIZE, split=split)
    given = ShardData(str(folder / "train"), str(folder / "val"), image_size=SIZE, fields=("caption",), workers=0)
    return given.with_task(Inpainting(SIZE, held_out_masks="thin_256"))


def evaluation(data: ShardData, out: Path, protocol: Protocol = PROTOCOL) -> Evaluation:
    metrics = {"fid": FrechetDistance(6, small_sample=True)}
    kept = out.parent / "kept"
    return Evaluation(Darkener(), data, protocol, Means(), metrics, out, 4, reference_folder=kept)  # type: ignore[arg-type]


def test_pairs_and_sizes_of_hole(data: ShardData, tmp_path: Path) -> None:
    result = evaluation(data, tmp_path / "out").run()
    known = conditions(data, "val", ["image", "mask"])
    images = [np.asarray(one["image"]) for one in known]
    masks = [np.asarray(one["mask"]) for one in known]
    drawn = [darkened(image, mask) for image, mask in zip(images, masks, strict=True)]
    psnr = [
        10 * np.log10(255**2 / max(np.mean((a.astype(float) - b.astype(float)) ** 2), 255**2 * 1e-10))
        for a, b in zip(images, drawn, strict=True)
    ]
    assert result["scores"]["psnr"]["value"] == pytest.approx(np.mean(psnr), rel=1e-4)
    share = np.array([(mask > 0).mean() for mask in masks])
    for name, (low, high) in PROTOCOL.mask_buckets.items():
        inside = np.flatnonzero((share >= low) & (share < high))
        found = result["buckets"][name]
        assert found["images"] == len(inside)
        if len(inside) == 0:
            assert found["scores"] == {}
            continue
        assert found["scores"]["psnr"]["value"] == pytest.approx(np.mean(np.array(psnr)[inside]), rel=1e-4)
        metric = FrechetDistance(6, small_sample=True)
        for shown, real in ((images, True), (drawn, False)):
            chosen = torch.from_numpy(np.stack([shown[i] for i in inside])).permute(0, 3, 1, 2)
            metric.update(Means()(chosen)["features"], real=real)
        assert found["scores"]["fid"]["value"] == pytest.approx(float(metric.compute()["fid"]), rel=1e-6, abs=1e-12)
    assert sum(found["images"] for found in result["buckets"].values()) == IMAGES
    assert len([found for found in result["buckets"].values() if found["images"] > 1]) >= 1


def test_the_second_evaluation_reads_kept_features_and_says_so(data: ShardData, tmp_path: Path) -> None:
    first, second = (evaluation(data, tmp_path / name).run() for name in ("first", "second"))
    assert (first["reference"]["kept"], second["reference"]["kept"]) == (False, True)
    assert second["scores"]["fid"]["value"] == pytest.approx(first["scores"]["fid"]["value"], rel=1e-9)
    other = data.with_task(Inpainting(SIZE, held_out_masks="medium_256"))
    assert evaluation(other, tmp_path / "third").run()["reference"]["kept"] is False


def test_the_other_split_gives_a_second_distance(data: ShardData, tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, also_against="train")
    found = [evaluation(data, tmp_path / name, protocol).run()["scores"] for name in ("first", "second")]
    metric = FrechetDistance(6, small_sample=True)
    for batch in data.eval_loader("train", 3, kind="images"):
        metric.update(Means()(batch["image"])["features"], real=True)
    known = conditions(data, "val", ["image", "mask"])
    drawn = torch.stack([torch.from_numpy(darkened(one["image"], one["mask"])) for one in known])
    metric.update(Means()(drawn.permute(0, 3, 1, 2))["features"], real=False)
    for scores in found:
        assert scores["fid_other_split"]["value"] == pytest.approx(float(metric.compute()["fid"]), rel=1e-6)
    with pytest.raises(InputError, match="is not the other split"):
        replace(PROTOCOL, also_against="val")


def test_the_report_shows_sizes_open_points_and_throughput(data: ShardData, tmp_path: Path) -> None:
    evaluation(data, tmp_path / "out").run()
    write_report(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert stored["sampling"]["images_per_second"] > 0
    assert len(paper_report([stored])) == 1 + (stored["buckets"]["large"]["images"] > 0)
    page = (tmp_path / "out" / "report.html").read_text()
    for words in ("By size of the hole", "What the paper leaves open", "thin ones", "not comparable"):
        assert words in page
    assert "thin ones" in (tmp_path / "out" / "report.md").read_text()


def test_reference_images_of_another_kind_are_refused(data: ShardData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"by the rule .* but protocol=holes compares with lsun"):
        evaluation(data, tmp_path / "out", replace(PROTOCOL, reference_rule="lsun")).run()
    with pytest.raises(InputError, match="have the manifest hash"):
        evaluation(data, tmp_path / "out", replace(PROTOCOL, reference_hash="0" * 64)).run()
    with pytest.raises(InputError, match="has no task"):
        PairedPass(PROTOCOL, [{"caption": "no image"}], Means())
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pairs": False}, "set protocol.pairs=true"),
        ({"conditions": "none"}, "no image to compare with"),
        ({"mask_buckets": {"odd": [0.5, 0.4]}, "bucket_tables": {}}, "is no range"),
        ({"bucket_tables": {"typo": "inpaint/places-40-50"}}, "names typo"),
        ({"leaves_open": {"stepz": "?"}}, "leaves_open names stepz"),
    ],
)
def test_protocols_that_contradict_themselves_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        replace(PROTOCOL, **change)
