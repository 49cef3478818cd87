"""From a model and shards to one page that needs nothing else, the same from one process and from two."""

import json
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from ldmlab.app.run_end import evaluated
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.evaluators import ClassAccuracy
from ldmlab.evaluation.model_evaluation import Evaluation
from ldmlab.evaluation.protocol import Protocol
from ldmlab.metrics.features import OpenClipFeatures
from ldmlab.metrics.frechet import FrechetDistance
from ldmlab.metrics.frechet_limit import FrechetLimit
from ldmlab.metrics.kernel import KernelDistance
from ldmlab.metrics.precision_recall import PrecisionRecall
from ldmlab.nn.openclip import build_clip
from ldmlab.report.evaluation_page import score_lines
from ldmlab.report.line_chart import Chart, ticks
from ldmlab.report.metrics_json import read_evaluation
from ldmlab.report.pages import write_comparison, write_report
from ldmlab.report.paper_table import paper_record
from ldmlab.report.score_curves import run_charts
from ldmlab.report.score_lines import score_text
from sampling_models import CLIP, tiny_model

sys.path.append(str(Path(__file__).parents[1] / "data"))
from shard_maker import write_shards

CURVE = "step,loss,val/psnr,loss_by_noise/0.10,loss_by_noise/0.20\n1,1.0,,0.5,0.7\n2,0.5,12.0,0.4,0.6\n3,0.4,,,\n"


def evaluation(folder: Path, out: Path) -> Evaluation:
    torch.manual_seed(0)
    extractor = OpenClipFeatures(build_clip(config=CLIP), "clip run tiny")
    protocol = Protocol(
        name="tiny",
        samples=26,
        reference="val",
        metrics={},
        steps=2,
        guidance_scale=2.0,
        neighbours=3,
        sweep={"guidance_scale": [1.0, 2.0], "guidance_interval": [None, [0.0, 0.5]]},
        sweep_seeds=2,
        class_field="category",
        shown=6,
        controls=26,
        paper_table="text2img/coco-256",
    )
    metrics = {
        "fid": FrechetDistance(extractor.width, small_sample=True),
        "fid_inf": FrechetLimit(extractor.width, small_sample=True),
        "kid": KernelDistance(subsets=4, subset_size=8),
        "precision_recall": PrecisionRecall(),
    }
    data = ShardData(
        str(folder / "train"), str(folder / "val"), image_size=16, fields=("caption", "category"), workers=0
    )
    (folder / "metrics.csv").write_text(CURVE)
    evaluators = {"category": ClassAccuracy("category", captions=2, guidance_scale=3.0, steps=4)}
    parts = {"curves": {"Denoiser": folder / "metrics.csv"}, "paper": paper_record, "evaluators": evaluators}
    return Evaluation(tiny_model("caption"), data, protocol, extractor, metrics, out, 4, **parts)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder / "train", [20, 13], size=16)
    write_shards(folder / "val", [12], size=16, split="val")
    return folder


@pytest.fixture(scope="module")
def finished(shards: Path) -> tuple[Path, dict[str, Any]]:
    out = shards / "evaluation"
    result = evaluation(shards, out).run()
    write_report(out)
    return out, result


class Links(HTMLParser):
    """Everything a browser would load, and the tags left open."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.images += tag == "img"
        self.loaded += [value for name, value in attributes if name in ("src", "href", "srcset") and value]


def test_the_page_holds_everything(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    page = (out / "report.html").read_text()
    links = Links()
    links.feed(page)
    # samples and real, categories twice, pairs: nearest, held out, ordinary
    assert links.images == 6 * 2 + 3 * 2 * 2 + 3 * 2 + 6 * 2 + 3 * 2
    assert all(address.startswith("data:image/") for address in links.loaded)
    assert "http" not in page.replace("http-equiv", "")
    for words in ("not comparable", "image 0", "Memorisation", "<svg", "loss_by_noise", "infinitely many"):
        assert words in page
    for words in ("precision and recall over guidance", "By category", "Held-out real images at the threshold"):
        assert words in page


def test_controls_stand_beside_the_scores(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    found = result["controls"]
    assert {kind: one["images"] for kind, one in found.items()} == dict.fromkeys(
        ("noise", "shuffled", "real"), 26
    )  # width + 1
    assert all(one["scores"].keys() == {"fid", "fid_inf", "kid", "precision", "recall"} for one in found.values())
    assert found["real"]["scores"]["kid"]["value"] < found["noise"]["scores"]["kid"]["value"]
    report, text = (out / "report.md").read_text(), evaluated(read_evaluation(out), out)
    for words in ("uniform noise", "shuffled tiles", "training images", "26 of uniform noise"):
        assert words in report
    assert "few images: 26 against 12 real ones" in report
    kid = f"uniform noise {score_text('kid', found['noise']['scores']['kid']['value'])}, shuffled tiles "
    assert kid in text
    ends = [line.partition(":")[0] for line in text.splitlines()[-5:]]
    assert ends == ["report", "scores", "cost", "falls short", "next"]
    assert "Kernel distance ↓" in text
    assert "few images: 26 against 12 real ones" in text.splitlines()[-2]


def test_a_sweep_passes_through_the_score_and_has_its_deviation_over_seeds(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    _, result = finished
    points = [(one["guidance_scale"], one["guidance_interval"]) for one in result["sweep"]]
    assert points == [(1.0, None), (1.0, [0.0, 0.5]), (2.0, None), (2.0, [0.0, 0.5])]
    assert result["sweep"][0]["scores"] == result["sweep"][1]["scores"]  # without guidance both
    own = result["sweep"][2]["scores"]
    for name, score in own.items():
        first, other = score["values"]  # of the protocol's seed and the next one
        assert first == result["scores"][name]["value"]
        assert score["value"] == pytest.approx((first + other) / 2)
        assert score["spread"] == pytest.approx(abs(first - other) / 2**0.5)
    assert len({one["scores"]["fid"]["value"] for one in result["sweep"]}) == 3
    points = result["sample_curves"]["fid_inf"]
    assert points[0]["value"] == pytest.approx(result["scores"]["fid"]["value"], rel=1e-6)


def test_points_of_a_sweep_score_as_evaluations_of_their_own(
    shards: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    alone = evaluation(shards, tmp_path / "alone")
    alone.protocol = replace(
        alone.protocol, guidance_interval=[0.0, 0.5], seed=1, sweep={}, sweep_seeds=1, class_field=None, neighbours=0
    )
    scores = alone.run()["scores"]
    for name, score in finished[1]["sweep"][3]["scores"].items():
        assert score["values"][1] == pytest.approx(scores[name]["value"], rel=1e-4, abs=1e-6), name


def test_a_share_and_its_error_are_printed_alike(finished: tuple[Path, dict[str, Any]]) -> None:
    rows = {line.name: line.value for line in score_lines(finished[1])}
    score = finished[1]["scores"]["precision"]
    assert rows["precision"] == f"{score['value']:.1%} ± {score['spread']:.1%}"
    assert rows["copies"].count("%") == 2


def test_the_nearest_pairs_of_all_samples_are_shown(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    found = result["neighbours"]
    closest = [pair["distance"] for pair in found["closest"]]
    assert closest == sorted(closest)
    assert closest[0] <= min(pair["distance"] for pair in found["pairs"])
    assert found["held_out_images"] == 12
    assert found["training_images"] == 33
    for pair in (*found["closest"], *found["pairs"]):
        assert (out / pair["sample"]).exists()
        assert (out / pair["train"]).exists()
    assert all((out / pair["held_out"]).exists() for pair in found["held_out"])


def test_each_class_is_scored_beside_its_own_images(finished: tuple[Path, dict[str, Any]]) -> None:
    rows = finished[1]["by_class"]
    assert sum(row["samples"] for row in rows) == 26
    assert sum(row["real"] for row in rows) == 12
    assert [row["kid"] for row in rows] == sorted((row["kid"] for row in rows), reverse=True)


def test_metrics_json_says_all_that_decides_the_number(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    stored = json.loads((out / "metrics.json").read_text())
    assert stored["scores"] == json.loads(json.dumps(result["scores"]))
    assert (
        stored["sampling"] | {"seed": 0, "steps": 2, "guidance_scale": 2.0, "eta": 0.0, "sampler": "ddim"}
        == stored["sampling"]
    )
    assert stored["sampling"]["images"] == 26
    assert stored["model"]["weights"] == "averaged"
    assert len(stored["reference"]["manifest_hash"]) == 64
    assert len(stored["features"]["weights_hash"]) == 16
    assert stored["evaluators"]["category"]["chance"] == pytest.approx(1 / 3)
    assert stored["evaluators"]["category"]["learned"] == {"examples": 33, "updates": 4, "batch_size": 64}
    assert "trained on 33 real examples in 4 updates of 64" in (out / "report.md").read_text()
    assert stored["provenance"]["packages"]["torch"]
    assert "300" not in (out / "report.md").read_text().split("##")[1]


def test_a_finished_evaluation_is_not_written_over(shards: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="already holds an evaluation"):
        evaluation(shards, finished[0]).run()


def test_reports_again_and_side_by_side(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, _ = finished
    before = (out / "report.html").read_text()
    assert write_report(out).read_text() == before
    shutil.copytree(out, tmp_path / "other")
    page = write_comparison([out, tmp_path / "other"], tmp_path).read_text()
    assert "2 evaluations" in page
    with pytest.raises(InputError, match=r"no metrics\.json"):
        write_report(tmp_path)


def _process(rank: int, shards: str, expected: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{shards}/meet", rank=rank, world_size=2)
    result = evaluation(Path(shards), Path(shards) / "two").run()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    for name, score in expected["scores"].items():
        assert result["scores"][name]["value"] == pytest.approx(score["value"], rel=1e-3, abs=1e-4), name
    assert result["neighbours"]["median_distance_samples"] == pytest.approx(
        expected["neighbours"]["median_distance_samples"], rel=1e-3
    )


@pytest.mark.slow
def test_two_processes_score_as_one(shards: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    mp.spawn(_process, args=(str(shards), finished[1]), nprocs=2)
    assert write_report(shards / "two").exists()


def test_curves_share_a_chart_by_stem(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(CURVE)
    found = run_charts(tmp_path / "metrics.csv")
    assert len(found) == 3
    assert found[0].svg.count("<path") == 1
    assert sum("0.20" in chart.svg for chart in found) == 1


def test_charts_survive_odd_numbers() -> None:
    assert Chart("x", {"a": [(0.0, float("nan"))]}).svg == ""
    assert "circle" in Chart("x", {"a": [(5.0, 3.0)]}).svg
    assert "&lt;b&gt;" in Chart("<b>", {"a": [(0.0, 1.0), (1.0, 1.0)]}).svg
    assert Chart("x", {"a": [(float(i), 1.0 / (i + 1)) for i in range(5000)]}).svg.count(" L") < 1000
    assert ticks(0.0, 1.0) == [0.0, 0.5, 1.0] or len(ticks(0.0, 1.0)) >= 3
