"""The comparison's page from records written by hand: means over seeds, axes, refusals."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldmlab.app import cli
from ldmlab.errors import InputError
from ldmlab.report.line_chart import COLOURS, Chart, log_ticks
from ldmlab.report.tradeoff_jobs import (
    RECORD,
    Value,
    by_factor,
    by_length,
    equal_budget,
    merged,
    read_job,
    score_after,
    trained_seconds,
)
from ldmlab.report.tradeoff_page import SAMPLING, TRAINING, tradeoff_page, write_tradeoff

PROTOCOL = {"name": "tradeoff", "guidance_scale": 1.0}


def _job(folder: Path, f: int, seed: int, fid: float, **more: Any) -> Path:
    """A scored denoiser with two points over training and one more over sampler steps."""

    def point(step: int, sampler_steps: int, value: float) -> dict[str, Any]:
        return {
            "step": step,
            "sampler_steps": sampler_steps,
            "seconds": 3600.0 * step,
            "flops": step * 10**18 // f,
            "scores": {"fid": {"value": value, "spread": None, "marks": []}},
            "scored_by": {
                "features": {"name": "clip", "weights_hash": "0", **more.get("features", {})},
                "reference": more.get("reference", "abc"),
            },
        }

    record = {
        **{"format_version": 1, "downsampling": f, "latent": [3, 32 // f, 32 // f], "seed": seed, "max_steps": 10},
        **{"budget": "steps", "images_per_step": 8, "processes": 2, "parameters": 100, "forward": 10**9 // f},
        **{
            "training": 3 * 10**9 // f,
            "decoder": 10**9,
            "first_stage": f"shared/first_stage-{f}",
            "protocol": PROTOCOL,
        },
        "points": [point(5, 100, fid + 2), point(10, 100, fid), point(10, 20, fid + 1)],
        "reconstruction": None if f == 1 else {"fid": {"value": 0.5}, "psnr": {"value": 20.0 + f}},
        "seconds_per_image": {"100": 1.0, "20": 0.2},
    }
    folder.mkdir(parents=True)
    (folder / RECORD).write_text(json.dumps({**record, **more}))
    return folder


def test_curves_are_means_over_seeds_with_their_deviation(tmp_path: Path) -> None:
    jobs = [read_job(_job(tmp_path / f"s{seed}", 4, seed, fid)) for seed, fid in ((0, 3.0), (1, 5.0), (2, 4.0))]
    (factor,) = by_factor(jobs)
    assert factor.label == "f4"
    curves = {name: factor.training_curve("fid", x) for name, (_, x) in TRAINING.items()}
    assert [x for x, _ in curves["training steps"]] == [5, 10]
    assert [x for x, _ in curves["wall-clock"]] == [5, 10]
    assert [x for x, _ in curves["device time"]] == [10, 20]
    assert [x for x, _ in curves["training compute"]] == [1250, 2500]
    final = curves["training steps"][-1][1]
    assert (final.mean, final.deviation, final.seeds) == (4.0, 1.0, 3)
    assert str(final) == "4.000 ± 1.0"
    speed = factor.sampling_curve("fid", SAMPLING["sampling time"][1])
    assert [(x, value.mean) for x, value in speed] == [(0.2, 5.0), (1.0, 4.0)]
    compute = factor.sampling_curve("fid", SAMPLING["sampling compute"][1])
    assert [x for x, _ in compute] == [0.25 * 20 + 1, 0.25 * 100 + 1]


def test_a_curve_is_of_the_same_seeds_throughout(tmp_path: Path) -> None:
    jobs = [read_job(_job(tmp_path / f"s{seed}", 4, seed, fid)) for seed, fid in ((0, 3.0), (1, 5.0), (2, 7.0))]
    jobs[2]["points"] = [point for point in jobs[2]["points"] if point["sampler_steps"] == 100]
    (factor,) = by_factor(jobs)
    speed = factor.sampling_curve("fid", SAMPLING["sampler steps"][1])
    assert [(x, value.mean, value.seeds) for x, value in speed] == [(20, 5.0, 2), (100, 4.0, 2)]
    final = factor.final("fid")
    assert final is not None
    assert (final.mean, final.seeds) == (5.0, 3)


def test_guided_sampling_counts_the_network_twice(tmp_path: Path) -> None:
    job = _job(tmp_path / "a", 1, 0, 3.0, protocol={"name": "tradeoff", "guidance_scale": 3.0})
    (factor,) = by_factor([read_job(job)])
    assert factor.sampling_curve("fid", SAMPLING["sampling compute"][1])[0][0] == 2 * 20 + 1


def test_the_page_ranks_the_factors(tmp_path: Path) -> None:
    folders = [_job(tmp_path / f"tradeoff-f{f}", f, 0, fid) for f, fid in ((1, 9.0), (4, 3.0), (32, 7.0))]
    (tmp_path / "tradeoff-f8").mkdir()  # a job under way
    assert cli.dispatch(["report", *map(str, [*folders, tmp_path / "tradeoff-f8"])]) == 0
    page = (tmp_path / "comparison" / "report.html").read_text()
    assert "best first: f4 3.000, f32 7.000, f1 9.000" in page
    assert "left out: tradeoff-f8" in page
    assert page.count("<svg") == len(TRAINING) + len(SAMPLING) + 1
    assert "http://" not in page
    assert "https://" not in page
    text = (tmp_path / "comparison" / "report.md").read_text()
    assert "| f4 | 3 x 8 x 8 |" in text
    with (tmp_path / "comparison" / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert {row["fid"] for row in rows if row["downsampling"] == "4"} == {"5.0", "3.0", "4.0"}


def test_both_budgets_have_their_own_figures(tmp_path: Path) -> None:
    folders = [_job(tmp_path / "a", 4, 0, 3.0), _job(tmp_path / "b", 4, 0, 2.0, budget="compute", max_steps=10)]
    text = write_tradeoff(folders, tmp_path / "out").with_name("report.md").read_text()
    assert text.index("Budgets equal in steps") < text.index("Budgets equal in compute")


def test_two_first_stages_of_one_factor_are_told_apart(tmp_path: Path) -> None:
    jobs = [read_job(_job(tmp_path / name, 4, 0, 3.0, first_stage=f"shared/{name}")) for name in ("kl", "vq")]
    assert [f.label for f in by_factor(jobs)] == ["f4 (kl)", "f4 (vq)"]


def test_jobs_measured_otherwise_are_refused(tmp_path: Path) -> None:
    one = _job(tmp_path / "a", 4, 0, 3.0)
    later = _job(tmp_path / "later", 8, 0, 3.0, features={"preparation": "to 32 px"})  # only in later records
    write_tradeoff([one, later], tmp_path / "fine")
    for name, more in (
        ("b", {"reference": "another"}),
        ("c", {"protocol": {"name": "tradeoff", "guidance_scale": 2.0}}),
        ("d", {"features": {"weights_hash": "1"}}),
    ):
        with pytest.raises(InputError, match="different protocols, features or reference"):
            write_tradeoff([one, _job(tmp_path / name, 8, 0, 3.0, **more)], tmp_path / "out")


def test_one_seed_twice_is_refused(tmp_path: Path) -> None:
    jobs = [read_job(_job(tmp_path / name, 4, 0, 3.0)) for name in ("a", "b")]
    with pytest.raises(InputError, match="equal including the seed"):
        by_factor(jobs)


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 9}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(InputError, match="run the job of the sweep again"):
        read_job(tmp_path)


def test_wall_clock_is_the_images_over_the_speed(tmp_path: Path) -> None:
    table = "step,loss,images,speed/images_per_second\n1,1.0,8,4\n2,0.9,16,8\n2,,,\n3,0.8,24,1\n"
    (tmp_path / "metrics.csv").write_text(table)
    assert trained_seconds(tmp_path / "metrics.csv", 2) == 2 + 1
    assert trained_seconds(tmp_path / "metrics.csv", None) == 2 + 1 + 8
    (tmp_path / "metrics.csv").write_text("step,loss\n1,1.0\n")
    assert trained_seconds(tmp_path / "metrics.csv", None) is None


def test_factors_are_compared_at_the_compute_that_all_reached(tmp_path: Path) -> None:
    step = TRAINING["training steps"][1]
    compute = TRAINING["training compute"][1]
    folders = [_job(tmp_path / f"steps-f{f}", f, 0, fid) for f, fid in ((1, 9.0), (4, 3.0))]
    factors = by_factor([read_job(folder) for folder in folders])
    found = equal_budget(factors, "fid", step)
    assert found is not None
    assert (found.spent, found.scores) == (10, {"f1": 9.0, "f4": 3.0})
    assert equal_budget(factors, "fid", compute) is None  # f = 4 ends at 2,500, where f = 1 has nothing yet

    points = [
        dict(point, step=s, flops=s * 10**18 // 4)
        for s, point in zip((20, 40), read_job(folders[1])["points"][:2], strict=True)
    ]
    longer = _job(tmp_path / "compute-f4", 4, 0, 3.0, budget="compute", max_steps=40, points=points)
    factors += by_factor([read_job(longer)])
    assert [x for x, _ in merged(factors, "fid", step)["f4"]] == [5, 10, 20, 40]  # both runs on one line
    found = equal_budget(factors, "fid", compute)
    assert found is not None
    assert (found.spent, found.scores) == (10_000.0, {"f1": 9.0, "f4": 3.0})
    assert found.best_first("lower") == ["f4", "f1"]
    text = write_tradeoff([*folders, longer], tmp_path / "out").with_name("report.md").read_text()
    assert "at equal training compute (10,000 1e15 FLOPs), best first: f4 3.000, f1 9.000." in text


def test_each_seed_counts_once_where_runs_of_two_lengths_meet(tmp_path: Path) -> None:
    jobs = [_job(tmp_path / f"steps{seed}", 4, seed, fid) for seed, fid in ((0, 3.0), (1, 5.0))]
    jobs += [_job(tmp_path / "compute", 4, 0, 10.0, budget="compute", max_steps=20)]
    factors = [factor for job in (jobs[:2], jobs[2:]) for factor in by_factor([read_job(folder) for folder in job])]
    curve = dict(merged(factors, "fid", TRAINING["training steps"][1])["f4"])
    assert (curve[10].mean, curve[10].seeds) == (6.0, 3)


def test_a_score_between_two_points_lies_on_a_logarithmic_line() -> None:
    curve = [(1.0, Value(8.0, None, 1)), (100.0, Value(4.0, None, 1))]
    assert score_after(curve, 10.0) == pytest.approx(6.0)
    assert score_after(curve, 100.0) == 4.0
    assert score_after(curve, 100.5) == 4.0  # a budget is paid in whole steps
    assert score_after(curve, 110.0) is None
    assert score_after(curve, 0.5) is None


def test_a_factor_has_one_colour_on_every_chart() -> None:
    line = [(1.0, 2.0), (2.0, 1.0)]
    reserved = {"f1": COLOURS[0], "f8": COLOURS[3]}
    for names in (["f1", "other", "f8"], ["f8", "f1"], ["other", "f8"]):
        chart = Chart("", dict.fromkeys(names, line), reserved=reserved).svg
        shown = dict(re.findall(r'background:(#\w+)"></i>(\w+)<', chart))
        found = {name: colour for colour, name in shown.items()}
        assert len(found) == len(names)
        assert all(found[name] == colour for name, colour in reserved.items() if name in names)


def test_a_logarithmic_axis_gives_equal_ratios_equal_room() -> None:
    chart = Chart("", {"f1": [(1e-5, 1.0), (1e-4, 2.0), (1e-3, 3.0)]}, log_x=True).svg
    places = [float(part.split('"')[0]) for part in chart.split('cx="')[1:]]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
    assert log_ticks(1e-5, 1e-3) == pytest.approx([1e-5, 3e-5, 1e-4, 3e-4, 1e-3])
    assert len(log_ticks(1, 1e9)) <= 6
    assert log_ticks(1.1, 1.9) == [1.1, 1.9]  # no round number between them


def test_the_page_shows_what_each_job_draws_and_rebuilds(tmp_path: Path) -> None:
    first_stage = tmp_path / "first_stage"
    job = _job(tmp_path / "job", 4, 0, 3.0, first_stage=str(first_stage))
    for folder, name in (
        (first_stage / "evaluation" / "tradeoff-abc", "rebuilt_00000.png"),
        (job / "evaluation" / "step_00000010-100-abc", "sample_00000.png"),
        (job / "evaluation" / "step_00000005-100-abc", "sample_00000.png"),  # not the last of the training
    ):
        (folder / "images").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "images" / name)
    page = write_tradeoff([job], tmp_path / "out").read_text()
    assert "f4: reconstructions" in page
    assert "f4: samples after 10 steps" in page
    assert page.count("<img") == 2


def test_options_that_came_later_part_nobody(tmp_path: Path) -> None:
    old = {"_target_": "ldmlab.evaluation.protocol.Protocol", "name": "tradeoff", "samples": 8}
    kid = {"_target_": "ldmlab.metrics.kernel.KernelDistance", "subset_size": 100}
    old |= {"metrics": {"kid": kid}}
    new = {**old, "guidance_scale_curve": [], "metrics": {"kid": {**kid, "subsets": 100, "seed": 2020}}}
    folders = [_job(tmp_path / "old", 4, 0, 3.0, protocol=old), _job(tmp_path / "new", 8, 0, 3.0, protocol=new)]
    write_tradeoff(folders, tmp_path / "fine")
    new["metrics"]["kid"]["subsets"] = 50
    with pytest.raises(InputError, match="different protocols"):
        write_tradeoff([folders[0], _job(tmp_path / "other", 8, 0, 3.0, protocol=new)], tmp_path / "none")


def test_runs_of_different_lengths_are_not_joined(tmp_path: Path) -> None:
    """The numbers at equal cost take the points of both runs; the lines of the chart stay apart."""
    points = read_job(_job(tmp_path / "a", 4, 0, 3.0))["points"]
    longer = [dict(points[0], step=4), dict(points[1], step=40)]
    jobs = [tmp_path / "a", _job(tmp_path / "b", 4, 0, 2.0, budget="compute", max_steps=40, points=longer)]
    jobs += [_job(tmp_path / name, 1, 0, 9.0, budget=budget) for name, budget in (("c", "steps"), ("d", "compute"))]
    factors = [factor for folder in jobs for factor in by_factor([read_job(folder)])]
    lines = by_length(factors, "fid", TRAINING["training steps"][1])
    assert [x for x, _ in lines["f4"] if x == x] == [5, 10, 4, 40]
    assert len([x for x, _ in lines["f4"] if x != x]) == 1
    page = tradeoff_page([read_job(folder) for folder in jobs])
    chart = next(one for head, one in page.charts() if head == "At equal cost")
    assert str(chart.svg).count("<path") == 4
    page_file = write_tradeoff(jobs, tmp_path / "out")
    rows = list(csv.DictReader(page_file.with_name("charts.csv").open()))
    assert {row["section"] for row in rows} >= {"At equal cost"}
    assert not [row for row in rows if "nan" in (row["x"], row["y"])]


@pytest.mark.parametrize(
    "value", ["missing", None, -1.5, "x", [1], {"a": 1}, float("inf"), 10**400], ids=lambda v: repr(v)[:9]
)
def test_every_part_of_a_job_may_be_damaged(tmp_path: Path, value: Any) -> None:
    whole = json.loads((_job(tmp_path / "whole", 4, 0, 3.0) / RECORD).read_text())
    pages = 0
    for path in [(key,) for key in whole] + [("points", 0, key) for key in whole["points"][0]]:
        record = json.loads(json.dumps(whole))
        part: Any = record
        for key in path[:-1]:
            part = part[key]
        if value == "missing":
            del part[path[-1]]
        else:
            part[path[-1]] = value
        folder = tmp_path / "-".join(map(str, path))
        folder.mkdir()
        (folder / RECORD).write_text(json.dumps(record))
        try:
            write_tradeoff([tmp_path / "whole", folder], tmp_path / "out")
            pages += 1
        except InputError as error:
            message = str(error)
            assert message.count("\n") == 0
    assert pages < len(whole)
