"""The comparison of recipes (`benchmarks/recipes.py`): its arms, its intervals and its table, without training."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from ldmlab.app.compose import compose, group_choices, plain

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _recipe_table as tables  # noqa: E402
import recipes  # noqa: E402

SCORES = ("precision_classifier", "recall_classifier", "style_pairs", "style_concepts", "category_pairs")


def line(arm: str, seed: int, distance: float, choice: dict[str, Any], share: float = 1.0) -> dict[str, Any]:
    scores = dict.fromkeys((*SCORES, "category_concepts"), 0.5)
    scores |= dict.fromkeys(("distance", "distance_clip", "distance_classifier"), distance)
    cost = {"steps": 200, "flops": 10**12, "parameters": 7, "seconds": 9.0, "processor_seconds": 3.0, "load": 4.0}
    return {"arm": arm, "choice": choice, "seed": seed, "share": share, "scores": scores, **cost}


def planted() -> list[dict[str, Any]]:
    """flow is a fifth better in every seed at rate 2, which the tuning seed chooses; dit differs by chance alone."""
    noise = {0: 0.0, 1: 0.3, 2: -0.2, 3: 0.1}
    found = [line("paper", 100, 2.0, {"rate": 1}), line("dit", 100, 2.0, {"rate": 1})]
    found += [line("flow", 100, 3.0, {"rate": 1}), line("flow", 100, 1.0, {"rate": 2})]
    for seed, off in noise.items():
        found.append(line("paper", seed, 2 * math.exp(off), {"rate": 1}))
        found.append(line("flow", seed, 1.6 * math.exp(off + 0.01 * seed), {"rate": 2}))
        found.append(line("flow", seed, 1.0, {"rate": 1}))  # a rate that was not chosen
        found.append(line("dit", seed, 2 * math.exp(-off), {"rate": 1}))
        found += [line("stacked", seed, 1.0, {"rate": 1}, share) for share in (0.5, 1.0)]
    return [*found, line("stacked", 100, 1.0, {"rate": 1})]


@pytest.mark.slow
def test_every_arm_is_a_file_that_changes_only_what_its_title_says() -> None:
    named = {f"recipes/{arm.experiment}" for arm in recipes.ARMS.values() if arm.experiment}
    assert {name for name in group_choices("experiment") if name.startswith("recipes/")} == named | {"recipes/paper"}
    given = ["data.train=x", "data.val=x", "data.latents=x"]
    configs = {name: plain(compose("train", [f"experiment={name}", *given])) for name in named}
    base = configs.pop("recipes/post_hoc")
    expected = {"flow": {"diffusion"}, "v_min_snr": {"diffusion"}, "edm": {"diffusion"}, "dit": {"backbone"}}
    expected |= {"muon": {"optimizer"}, "aligned": {"alignment", "encoder"}}
    expected |= {"stacked": {"diffusion", "backbone", "optimizer"}}
    for name, config in configs.items():
        changed = {group for group in config if config[group] != base[group]} - {"run", "callbacks"}
        assert changed == expected[name.removeprefix("recipes/")], name


def test_intervals_are_of_pairs_and_of_the_rate_that_other_seeds_chose() -> None:
    found = tables.results(planted(), tuning=[100])
    assert found.chosen["flow"] == {"rate": 2}
    flow, dit = (found.against_paper(arm, "distance_clip") for arm in ("flow", "dit"))
    assert flow is not None
    assert dit is not None
    assert flow.decided
    assert flow.ratio().value == pytest.approx(0.8 * math.exp(0.015))
    assert not dit.decided  # its deviation is that of both, twice the paper's noise
    values = [0.2, 0.5, 0.6, 0.9]
    half = 3.182446 * 0.288675 / 2  # t of 3 degrees of freedom, sample deviation
    one = tables.Interval.of(values)
    assert (one.low, one.high) == pytest.approx((0.55 - half, 0.55 + half), abs=1e-5)
    assert not tables.Interval.of([1.0]).decided


def test_the_spread_says_how_many_pairs_decide_a_difference() -> None:
    lines = [line("paper", seed, math.exp(off), {"rate": 1}) for seed, off in ((100, 0.1), (101, -0.1))]
    deviation, freedom, pairs = tables.spread(lines)
    assert deviation == pytest.approx(math.sqrt(0.02))
    assert freedom == 1
    assert pairs == 11  # t 0.1414 sqrt(2 / n) against log 1.15 = 0.1398: 0.1344 of 11 pairs, 0.1431 of 10


def test_table_and_figure_of_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in planted()) + '{"arm": "cut')
    tables.report(tmp_path, recipes.read_lines(tmp_path))
    said = capsys.readouterr().out
    assert "| flow, logit-normal times | rate 2 | 200 | 1.00 | 3 |" in said
    assert "**0.81 (" in said
    assert "stacked after 50% of the compute / paper after all, CLIP: **0." in said
    assert "NOT quiet" in said
    assert (tmp_path / "recipes.png").stat().st_size > 5000


def test_scores_that_are_there_are_not_computed_again(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in planted()))
    comparison = recipes.Comparison(tmp_path, {}, 200, 8, 4, "emoji/clip", [100])
    found = comparison.scores("flow", {"rate": 2}, 3)
    assert found["scores"]["distance"] == pytest.approx(1.6 * math.exp(0.13))


def test_a_choice_with_an_interval_is_found_again_in_one_process(tmp_path: Path) -> None:
    comparison = recipes.Comparison(tmp_path, {}, 4, 1, 1, "none", [100])
    (choice, *_) = recipes.ARMS["interval"].choices
    comparison._note(line("interval", 100, 1.0, dict(choice)))
    assert recipes.find(comparison.lines, "interval", choice, 100)
    assert comparison.lines == recipes.read_lines(tmp_path)
