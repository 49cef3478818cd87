"""Evaluations of damaged images, files and folders: counted and named, or refused in one sentence."""

import errno
import json
import pickle
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from answering_models import Answers
from PIL import Image
from test_reference_statistics import Means
from torch import Tensor
from torchmetrics import Metric

from ldmlab import disks
from ldmlab.app.evaluate import clip_quality, curves, reference_data, run_record
from ldmlab.app.run_end import scores_text
from ldmlab.data.shard_data import ShardData
from ldmlab.disks import own_folder
from ldmlab.errors import InputError
from ldmlab.evaluation import model_evaluation, run
from ldmlab.evaluation.image_sets import image_set, score_sets
from ldmlab.evaluation.model_evaluation import Evaluation, ReconstructionEvaluation
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.real_images import RealImages
from ldmlab.evaluation.run import TrainingScores
from ldmlab.evaluation.sources import Kept, Reconstructions, Samples
from ldmlab.inference.sample_settings import SampleSettings
from ldmlab.metrics.features import Inception2015
from ldmlab.metrics.frechet import FrechetDistance
from ldmlab.metrics.kernel import KernelDistance
from ldmlab.metrics.precision_recall import PrecisionRecall
from ldmlab.nn.lpips import LPIPS

sys.path.append(str(Path(__file__).parents[1] / "data"))
from shard_maker import webp, write_shards

SIZE, IMAGES = 16, 14
PROTOCOL = Protocol(name="faults", reference="val", metrics={}, samples=12, conditions="none", steps=1, shown=4)
DAMAGE = {
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"not an image ".ljust(len(content)),
    "postscript": lambda content: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n".ljust(len(content)),
    "second half gone": lambda content: content[: len(content) // 2].ljust(len(content), b"\0"),
}


class Noise:
    """A model that is a function of the samples' numbers."""

    reads: frozenset[str] = frozenset()
    info: Mapping[str, Any] = {"path": "runs/noise", "weights": "averaged"}
    image_size = (SIZE, SIZE)
    precision, diffusion = "float32", Answers.diffusion

    def resolved(self, settings: SampleSettings, requests: Sequence[Any] = ()) -> SampleSettings:
        return replace(settings, guidance_scale=1.0, size=self.image_size)

    def sample_batch(self, requests: Sequence[Any], settings: Any, numbers: Sequence[int], *rest: Any) -> Tensor:
        images = [np.random.default_rng(1000 + number).integers(0, 256, (SIZE, SIZE, 3)) for number in numbers]
        return torch.from_numpy(np.stack(images).astype(np.uint8))


def test_samples_for_two_networks_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: Kept = []
    model: Any = Noise()
    first, second = (Samples(model, PROTOCOL, []) for _ in range(2))
    first.kept = second.kept = kept
    shown: Any = lambda batches, *_: batches  # noqa: E731
    made = list(first.images(5, shown))
    monkeypatch.setattr(Noise, "sample_batch", None)
    again = list(second.images(7, shown))
    assert [len(index) for index, _ in made] == [5, 5, 2]
    assert all(
        torch.equal(a, b) for left, right in zip(made, again, strict=True) for a, b in zip(left, right, strict=True)
    )
    assert second.clock == first.clock


class Copies(torch.nn.Module):
    """A first stage that returns the image."""

    def encode(self, images: Tensor) -> Any:
        return type("Posterior", (), {"mean": images})

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def shards(folder: Path, damage: Mapping[int, str] | None = None) -> ShardData:
    write_shards(folder / "train", [4], size=SIZE)
    write_shards(folder / "val", [9, 5], size=SIZE, split="val")
    for number, kind in (damage or {}).items():
        tar, content = folder / "val" / ("00000.tar" if number < 9 else "00001.tar"), webp(number, SIZE)
        tar.write_bytes(tar.read_bytes().replace(content, DAMAGE[kind](content)))
    return ShardData(str(folder / "train"), str(folder / "val"), image_size=SIZE, fields=(), workers=0)


def metrics() -> dict[str, Metric]:
    return {"fid": FrechetDistance(6, small_sample=True), "kid": KernelDistance(3, at_most=8)}


def evaluation(data: ShardData, out: Path, protocol: Protocol = PROTOCOL, **parts: Any) -> Evaluation:
    given = {"metrics": metrics(), "extractor": Means(), "reference_folder": out.parent / "kept", **parts}
    return Evaluation(Noise(), data, protocol, out=out, batch_size=4, **given)  # type: ignore[arg-type]


# ---- images that cannot be read


@pytest.mark.parametrize("damage", [{13: "zeros"}, {3: "text"}, {0: "postscript"}, {5: "second half gone"}])
def test_an_unreadable_image_is_counted_named_and_marked(
    damage: dict[int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shards(tmp_path, damage)
    for out in ("first", "second"):  # features of an incomplete set are not kept
        result = evaluation(data, tmp_path / out).run()
        assert result["reference"]["images"] == IMAGES - 1
        assert result["reference"]["kept"] is False
        lost = result["reference"]["unreadable"]
        assert (lost["count"], lost["of"], len(lost["names"])) == (1, IMAGES, 1)
        assert ".tar[" in lost["names"][0]
        assert all(
            f"13 of {IMAGES} reference images could be read" in one["marks"] for one in result["scores"].values()
        )
        assert "12 images against 13 of 14 real ones" in scores_text(result)
    assert "13 of 14 images of val could be read (" in capsys.readouterr().err


def test_more_unreadable_images_than_allowed_are_refused_before_a_sample(tmp_path: Path) -> None:
    data = shards(tmp_path, {3: "zeros", 11: "text"})
    sampled = evaluation(data, tmp_path / "out")
    sampled.model.sample_batch = None  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"2 of 14 images of val cannot be read \(.*tar\[.*protocol\.max_bad=0\.1"):
        sampled.run()
    assert not (tmp_path / "out" / "metrics.json").exists()
    allowed = evaluation(data, tmp_path / "out", replace(PROTOCOL, max_bad=0.2)).run()
    assert allowed["reference"]["unreadable"]["count"] == 2
    for wrong in (1.0, -0.1):
        with pytest.raises(InputError, match="is no fraction"):
            replace(PROTOCOL, max_bad=wrong)


def test_reconstructions_and_scores_in_training_count_them_too(tmp_path: Path) -> None:
    data = shards(tmp_path, {12: "zeros"})
    protocol = replace(PROTOCOL, conditions="reference", samples=None)
    parts = {"model": Copies(), "info": {}, "lpips": None, "out": tmp_path / "out"}
    found = ReconstructionEvaluation(  # type: ignore[call-arg]
        data=data, protocol=protocol, extractor=Means(), metrics=metrics(), **parts
    ).run()
    assert found["scores"]["fid"]["value"] == pytest.approx(0, abs=1e-9)
    assert (found["sampling"]["images"], found["reference"]["images"]) == (13, 13)
    assert all("13 of 14 reference images could be read" in score["marks"] for score in found["scores"].values())
    real = RealImages(data, Means())  # type: ignore[arg-type]
    source = Reconstructions(Copies(), data, protocol)
    scorer = TrainingScores(protocol, source, real, metrics())
    result = scorer.score(3, {})
    assert result["reference"]["unreadable"]["count"] == 1
    assert result["in_training"] == {"step": 3, "samples": 13}
    strict = TrainingScores(replace(protocol, max_bad=0.0), source, real, metrics())
    with pytest.raises(InputError, match=r"callbacks\.scores\.protocol\.max_bad=0"):
        strict.score(3, {})


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG\r\n\x1a\n" + bytes(9)])
@pytest.mark.parametrize("number", [0, 4])
def test_a_set_on_disk_allows_unreadable_images_by_option_alone(content: bytes, number: int, tmp_path: Path) -> None:
    for name in ("samples", "real"):
        (tmp_path / name).mkdir()
        for i in range(8):
            image = np.random.default_rng(i).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    (tmp_path / "samples" / f"{number}.png").write_bytes(content)

    def scored(max_bad: float) -> dict[str, Any]:
        sets = [image_set(tmp_path / name, workers=0, max_bad=max_bad) for name in ("samples", "real")]
        return score_sets(*sets, Means(), {"fid": FrechetDistance(6, small_sample=True)})  # type: ignore[arg-type]

    with pytest.raises(InputError, match=rf"{number}\.png cannot be read .*--max-bad"):
        scored(0.1)
    found = scored(0.2)
    assert (found["samples"]["images"], found["samples"]["unreadable"]["count"]) == (7, 1)
    assert any("7 of 8 images of samples could be read" in mark for mark in found["scores"]["fid"]["marks"])


# ---- how reference images were prepared

PREPARED = {"size": SIZE, "rule": "centre", "background": [255, 255, 255], "format": "webp", "quality": None}


def prepared(folder: Path, transform: Mapping[str, Any]) -> ShardData:
    """Shards whose manifest records this transform."""
    data = shards(folder)
    manifest = json.loads((folder / "val" / "manifest.json").read_text())
    (folder / "val" / "manifest.json").write_text(json.dumps(manifest | {"transform": transform}))
    return data


@pytest.mark.parametrize("missing", [[name] for name in PREPARED] + [["rule", "background"], list(PREPARED)])
def test_what_a_manifest_does_not_record_of_its_images_is_said(
    missing: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {name: value for name, value in PREPARED.items() if name not in missing}
    evaluation(prepared(tmp_path, known), tmp_path / "out").run()
    told = [line for line in capsys.readouterr().err.splitlines() if "does not record" in line]
    assert len(told) == 1
    assert all((f"transform.{name}" in told[0]) == (name in missing) for name in PREPARED)
    assert "transparent pixels on the colour (255, 255, 255)" in told[0]


def test_a_manifest_that_records_everything_is_not_mentioned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation(prepared(tmp_path, PREPARED), tmp_path / "out").run()
    assert "does not record" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 2 * SIZE),
        ("size", "16"),
        ("size", True),
        ("rule", "upside_down"),
        ("rule", ["lsun"]),
        ("format", 3),
        ("quality", "best"),
    ],
)
def test_a_transform_that_contradicts_itself_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    data = prepared(tmp_path, PREPARED | {name: value})
    with pytest.raises(InputError, match=rf"val records transform\.{name}=.*image_size=16"):
        evaluation(data, tmp_path / "out").run()
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=rf"records transform\.{name}="):
        image_set(tmp_path / "val", workers=0)


# ---- scores


class Gap(Metric):
    """A metric from outside: the difference of the means."""

    higher_is_better = False
    full_state_update = False
    title, meaning = "Mean gap", "difference of mean features"

    def __init__(self, value: float | None = None) -> None:
        super().__init__()
        self.value = value
        for side in ("real_sum", "fake_sum"):
            self.add_state(side, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, features: Tensor, real: bool) -> None:
        name = "real_sum" if real else "fake_sum"
        setattr(self, name, getattr(self, name) + features.mean())

    def compute(self) -> Tensor:
        return self.real_sum - self.fake_sum if self.value is None else torch.tensor(self.value)


class Hits(Gap):
    """Two scores of one metric."""

    higher_is_better = True
    title = {"hits": "Hits"}  # noqa: RUF012

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        return {"hits": torch.tensor(0.5), "hits_std": torch.tensor(0.1), "tries": torch.tensor(4)}


def test_a_metric_from_outside_brings_its_title_direction_and_sentence(tmp_path: Path) -> None:
    ours: dict[str, Metric] = {"fid": FrechetDistance(6, small_sample=True), "pr": PrecisionRecall()}
    found = evaluation(shards(tmp_path), tmp_path / "out", metrics={"gap": Gap(), "any": Hits(), **ours}).run()[
        "scores"
    ]
    assert (found["gap"]["title"], found["gap"]["higher_is_better"]) == ("Mean gap", False)
    assert found["gap"]["meaning"] == "difference of mean features"
    assert (found["hits"]["title"], found["hits"]["spread"]) == ("Hits", pytest.approx(0.1))
    assert (found["tries"]["title"], found["tries"]["higher_is_better"]) == ("", True)
    assert found["recall"]["title"] == "Recall"
    assert any("noise can score high" in mark for mark in found["precision"]["marks"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_no_number_is_marked(value: float, tmp_path: Path) -> None:
    found = evaluation(shards(tmp_path), tmp_path / "out", metrics={"gap": Gap(value)}).run()
    assert any(f"the value is {value}" in mark for mark in found["scores"]["gap"]["marks"])


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_are_refused(spoil: float, tmp_path: Path) -> None:
    class Spoiled(Means):
        def __call__(self, images: Tensor) -> dict[str, Tensor]:
            features = super().__call__(images)["features"]
            features[0, 2] = spoil
            return {"features": features}

    with pytest.raises(InputError, match="rows are not finite"):
        evaluation(shards(tmp_path), tmp_path / "out", extractor=Spoiled()).run()


def test_subsets_of_a_small_reference_are_recorded(tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, metrics={"kid": {"subset_size": None, "at_most": 100}})
    found = evaluation(shards(tmp_path), tmp_path / "out", protocol, metrics={"kid": KernelDistance(3, at_most=100)})
    result = found.run()
    assert result["protocol"]["metrics"]["kid"]["subset_size"] == 12
    assert any("subsets of 12 images" in mark for mark in result["scores"]["kid"]["marks"])


def test_samples_follow_a_small_reference(tmp_path: Path) -> None:
    protocol = replace(PROTOCOL, samples=None, at_most=100)
    assert evaluation(shards(tmp_path), tmp_path / "out", protocol).run()["sampling"]["images"] == IMAGES
    few = replace(PROTOCOL, samples=None, at_most=5)
    assert evaluation(shards(tmp_path / "b"), tmp_path / "few", few).run()["sampling"]["images"] == 5
    explicit = replace(PROTOCOL, samples=12, at_most=5)
    assert evaluation(shards(tmp_path / "c"), tmp_path / "own", explicit).run()["sampling"]["images"] == 12


# ---- the folder


def test_a_second_evaluation_of_one_folder_is_refused(tmp_path: Path) -> None:
    data, out = shards(tmp_path), tmp_path / "out"
    with (
        own_folder(lambda: out, ".lock", run.BUSY),
        pytest.raises(InputError, match=r"is being written by another evaluation"),
    ):
        evaluation(data, out).run()
    assert not out.exists()
    evaluation(data, out).run()
    assert not (out / ".lock").exists()
    with pytest.raises(InputError, match="already holds an evaluation"):
        evaluation(data, out).run()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        evaluation(data, tmp_path / "file").run()


@pytest.mark.parametrize(("module", "part"), [(model_evaluation, "save_image"), (run, "write_json")])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_an_evaluation_that_met_a_full_disk_runs_again(
    module: Any, part: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(number, "no room")

    data, out = shards(tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, part, full)
        with pytest.raises(InputError, match=str(out)):
            evaluation(data, out).run()
    assert not (out / "metrics.json").exists()
    result = evaluation(data, out).run()
    assert json.loads((out / "metrics.json").read_text())["scores"].keys() == result["scores"].keys()


# ---- files of a run, and of networks


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"- a\n- b",
        b"{",
        b"\xff\xfe",
        b"a: [",
        b"3",
        BOMB.encode(),
        b"? [1]\n: 2",
        b"!!python/name:os.system",
    ],
    ids=range(10),
)
def test_a_damaged_configuration_of_a_run_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    readers = (run_record, curves, lambda folder: reference_data({"model": str(folder), "seed": 0}, 16))
    for read in readers:
        with pytest.raises(InputError, match=r"config\.yaml") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("content", ["data: null", "data: 3", "from_run: [1]\nconditioner: 3\nrun: x", "seed: 1"])
def test_a_configuration_without_data_is_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert run_record(tmp_path)["configuration"]
    assert curves(tmp_path) == {}
    with pytest.raises(InputError, match="name the data with data="):
        reference_data({"model": str(tmp_path), "seed": 0}, 16)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"step,val/recall_1_of_50\nx,y\n", b"loss\n1\n"])
def test_a_clip_without_a_readable_log_has_no_quality(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "metrics.csv").write_bytes(content)
    assert clip_quality(tmp_path) == {}


def test_the_quality_of_a_clip_is_its_last_validation(tmp_path: Path) -> None:
    rows = "step,loss,held_out/recall_1_of_50,held_out/chance_recall_1_of_50\n10,1,0.1,0.02\n20,1,0.4,0.02\n30,1,,\n"
    (tmp_path / "metrics.csv").write_text(rows)
    assert clip_quality(tmp_path) == {"recall_1_of_50": 0.4, "chance_recall_1_of_50": 0.02, "step": 20}


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


@pytest.mark.parametrize("kind", ["pickle", "empty", "page", "list", "zip", "numbers"])
@pytest.mark.parametrize("network", [LPIPS, Inception2015], ids=["vgg", "inception"])
def test_weights_that_are_no_tensors_are_one_sentence(
    kind: str, network: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pth"
    content = {
        "pickle": pickle.dumps(Harmful(), protocol=2),
        "page": b"<!doctype html><p>404",
        "empty": b"",
        "zip": b"",
    }
    if kind in content:
        path.write_bytes(content[kind])
    else:
        torch.save({"list": [torch.zeros(3)], "numbers": {"a": 1}}[kind], path)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x", "y")
    with pytest.raises(InputError, match=r"weights\.pth .*fetch") as caught:
        network(path)
    assert "\n" not in str(caught.value)
    assert "must not run" not in capsys.readouterr().out
    assert disks.disk_sentence(OSError(errno.EIO, ""), path) is None
