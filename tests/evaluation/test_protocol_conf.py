"""Every shipped metric and protocol can be built; a new file is found by its folder."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from torchmetrics import Metric

from ldmlab.app.compose import compose, plain
from ldmlab.app.evaluate import changed
from ldmlab.errors import InputError
from ldmlab.evaluation.protocol import Protocol
from ldmlab.instantiate import accepts, instantiate
from ldmlab.metrics.kernel import KernelDistance
from ldmlab.report.paper_source import PAPER_FEATURES, all_tables, conditions_of, paper_tables

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize("path", sorted((CONF / "metric").glob("*.yaml")), ids=lambda path: path.stem)
def test_metric(path: Path) -> None:
    node = yaml.safe_load(path.read_text())
    derived = {"width": 8} if accepts(node, "width", where="metric") else {}
    assert isinstance(instantiate(node, where="metric", **derived), Metric)


@pytest.mark.parametrize("path", sorted((CONF / "protocol").glob("*.yaml")), ids=lambda path: path.stem)
def test_protocol(path: Path) -> None:
    node = yaml.safe_load(path.read_text())
    chosen = [(key, value) for entry in node.pop("defaults") if isinstance(entry, dict) for key, value in entry.items()]
    assert all((CONF / key.split("@")[0][1:] / f"{value}.yaml").exists() for key, value in chosen)
    metrics = {value: {} for key, value in chosen if key.startswith("/metric@")}
    protocol = instantiate({**node, "metrics": metrics}, where="protocol")
    assert isinstance(protocol, Protocol)
    assert protocol.name == path.stem
    assert protocol.paper_table is None or protocol.paper_table in all_tables()


@pytest.mark.parametrize(
    "path",
    sorted([*(CONF / "evaluator").glob("*.yaml"), *(CONF / "baseline").glob("*.yaml")]),
    ids=lambda path: path.stem,
)
def test_evaluator_and_baseline(path: Path) -> None:
    """Each names its fields, of the conditions or of the reference images, and a protocol uses it."""
    node = yaml.safe_load(path.read_text())
    derived: dict[str, Any] = {"clip": None} if accepts(node, "clip", where=path.parent.name) else {}
    part = instantiate(node, where=path.parent.name, trust=True, **derived)
    assert part.needs or part.reads
    protocols = [protocol.read_text() for protocol in (CONF / "protocol").glob("*.yaml")]
    assert any(f"/{path.parent.name}@{path.parent.name}s.{path.stem}: {path.stem}" in text for text in protocols)


def of_the_paper() -> list[Path]:
    """The protocols of the paper's tables and figures."""
    return sorted([*(CONF / "protocol").glob("paper_*.yaml"), CONF / "protocol" / "compression.yaml"])


@pytest.mark.parametrize("path", of_the_paper(), ids=lambda path: path.stem)
def test_a_protocol_of_the_paper_says_what_is_open(path: Path) -> None:
    node = yaml.safe_load(path.read_text())
    assert node["leaves_open"]
    assert all(len(text) > 5 for text in node["leaves_open"].values())
    assert node["feature_network"] == PAPER_FEATURES
    if table := node.get("paper_table"):
        known = paper_tables()[table]
        assert node["dataset"] == known["dataset"]
        assert node.get("paper_row") in {None, *(row["id"] for row in known["rows"])}
        conditions = conditions_of(table)
        assert node.get("samples") == conditions.get("samples")
        assert node["reference"] == conditions["split"]
        assert node.get("reference_rule") == conditions.get("rule")
        row = next((row for row in known["rows"] if row["id"] == node.get("paper_row")), {})
        assert node.get("steps") == row.get("sampling", {}).get("steps", node.get("steps"))


def test_every_measured_table_of_the_paper_has_a_protocol() -> None:
    nodes = [yaml.safe_load(path.read_text()) for path in of_the_paper()]
    served = {node.get("paper_table") for node in nodes}
    served |= {table for node in nodes for table in node.get("bucket_tables", {}).values()}
    not_measured = {"user-study/sr-imagenet", "user-study/inpaint-places", "compute", "readme-ldm-zoo"}
    assert paper_tables().keys() - served == not_measured | {"community/ldm-4-g-eta"}


def test_every_protocol_is_in_the_page() -> None:
    page = (CONF.parent / "docs" / "protocols.md").read_text()
    assert all(f"`{path.stem}`" in page for path in (CONF / "protocol").glob("*.yaml"))


def test_what_was_changed_in_a_protocol_is_found() -> None:
    options = ["protocol=paper_ffhq", "model=x", "protocol.eta=0", "protocol.metrics.precision_recall.neighbours=5"]
    node = plain(compose("evaluate", [*options, "+metric@protocol.metrics.kid=kid"]).protocol)
    assert set(changed(node)) == {
        "metrics.precision_recall.neighbours=5 (file: 3)",
        "metrics.kid.subsets=100 (file: none)",
        "metrics.kid.at_most=1000 (file: none)",
        "metrics.kid.seed=2020 (file: none)",
        "eta=0 (file: 1.0)",
    }
    assert changed(plain(compose("evaluate", ["protocol=paper_ffhq", "model=x"]).protocol)) == []
    assert changed({**node, "name": "my own"}) == []


@pytest.mark.parametrize("name", ["shown", "neighbours"])
def test_counts_below_zero_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"protocol\.{name}=-1 is below 0"):
        Protocol(**{"name": "x", "metrics": {}, "reference": "val", name: -1})


@pytest.mark.parametrize(("name", "value"), [("subsets", 0), ("subset_size", 1), ("at_most", -1)])
def test_subsets_of_the_kernel_distance_are_large_enough(name: str, value: int) -> None:
    with pytest.raises(InputError, match=rf"metric\.kid\.{name}={value} is too few"):
        KernelDistance(**{name: value})


def swept(**options: object) -> Protocol:
    return Protocol(name="p", reference="val", metrics={}, **options)  # type: ignore[arg-type]


def test_other_settings_are_those_of_sampling() -> None:
    given = swept(sampler="heun", eta=0.0, sampling={"churn": 40.0, "temperature": 0.9})
    settings = given.settings(churn=10.0)
    assert (settings.churn, settings.temperature, settings.sampler) == (10.0, 0.9, "heun")
    assert given.as_plain()["sampling"] == {"churn": 40.0, "temperature": 0.9}
    for sampling, sentence in (
        ({"churn": -1.0}, "churn=-1.0 is outside"),
        ({"churm": 1.0}, "protocol.sampling=churm is unknown"),
        ({"steps": 5}, r"protocol\.sampling\.steps is protocol\.steps; set that"),
        ({"size": 5}, r"protocol\.sampling\.size is protocol\.image_size"),
    ):
        with pytest.raises(InputError, match=sentence):
            swept(sampling=sampling)


def test_a_sweep_is_all_combinations_of_its_values() -> None:
    protocol = swept(sweep={"guidance_scale": [1.5, 2], "guidance_interval": [None, [0.1, 0.8]]}, guidance_rescale=0.5)
    assert protocol.combinations() == [
        {"guidance_scale": scale, "guidance_interval": interval}
        for scale in (1.5, 2)
        for interval in (None, [0.1, 0.8])
    ]
    settings = protocol.settings(**protocol.combinations()[1], seed=3)
    assert (settings.guidance_scale, settings.guidance_interval, settings.seed) == (1.5, (0.1, 0.8), 3)
    assert settings.guidance_rescale == 0.5
    assert swept().combinations() == []


def test_a_scale_of_one_in_a_sweep_is_without_guidance() -> None:
    protocol = swept(sweep={"guidance_scale": [1, 2]}, guidance_interval=[0.1, 0.8], weak_model="runs/a")
    off, on = (protocol.settings(**changes) for changes in protocol.combinations())
    assert off == swept().settings(guidance_scale=1.0)
    assert (on.guidance_interval, on.weak_model) == ((0.1, 0.8), "runs/a")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sweep": {"guidance": [1]}}, "protocol.sweep=guidance is unknown; choose one of steps, guidance_scale"),
        ({"sweep": {"seed": [1]}}, "protocol.sweep=seed is unknown"),
        ({"sweep": {"guidance_scale": [1, 2, 1]}}, r"guidance_scale=\[1, 2, 1\] names a value twice"),
        ({"sweep": {"guidance_scale": [1, 1.0]}}, r"guidance_scale=\[1, 1.0\] names a value twice"),
        ({"sweep": {"guidance_scale": []}}, r"protocol.sweep.guidance_scale=\[\] is no list of values"),
        ({"sweep": {"weak_model": "runs/a"}}, "protocol.sweep.weak_model=runs/a is no list of values"),
        ({"sweep_seeds": 3}, "protocol.sweep_seeds=3 has nothing to repeat; choose 1, or give protocol.sweep"),
        ({"sweep_seeds": 0, "sweep": {"steps": [5]}}, "protocol.sweep_seeds=0 has nothing to repeat; choose 1 or more"),
    ],
)
def test_a_sweep_of_nothing_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        swept(**options)


@pytest.mark.parametrize(
    "words", ["+protocol.sweep.guidance_scale=[1.5,2]", "+protocol.sweep={guidance_scale: [1.5,2]}"]
)
@pytest.mark.parametrize("name", ["images", "paper_ffhq"])
def test_a_sweep_on_the_command_line(name: str, words: str) -> None:
    config = plain(compose("evaluate", ["model=RUN", f"protocol={name}", words, "+protocol.sweep_seeds=3"]))
    assert config["protocol"]["sweep"] == {"guidance_scale": [1.5, 2]}
    assert config["protocol"]["sweep_seeds"] == 3
