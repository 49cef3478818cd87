"""A W&B sweep file, run by a fake agent: W&B's own code forms the arguments, Hydra composes them."""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.distributions import FloatDistribution, IntDistribution
from wandb.sdk.launch.sweeps import utils as agent
from wandb.sdk.sweeps.scheduler.optuna import sweep_parameter_to_distribution

from ldmlab.app.cli import dispatch
from ldmlab.app.compose import compose, plain
from ldmlab.errors import InputError

FACTORS = ["first_stage=kl_f4,kl_f8", "stage=autoencoder"]


def written(path: Path, *arguments: str) -> dict[str, Any]:
    assert dispatch(["sweep-file", *arguments, "--out", str(path)]) == 0
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    return content


def command_lines(sweep: dict[str, Any]) -> Iterator[list[str]]:
    """What an agent starts for every combination of a grid, or the ends of the intervals."""
    values = [node.get("values") or [node["min"], node["max"]] for node in sweep["parameters"].values()]
    for chosen in itertools.product(*values):
        given = {name: {"value": value} for name, value in zip(sweep["parameters"], chosen, strict=True)}
        arguments = agent.create_sweep_command_args({"args": given})
        words = {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]], **arguments}
        line: list[str] = []
        for chunk in agent.create_sweep_command(copy.copy(sweep["command"])):
            line += words[chunk[2:-1]] if chunk.startswith("${") else [chunk]
        yield line


def configs(sweep: dict[str, Any]) -> list[dict[str, Any]]:
    """What train.py would make of each."""
    lines = list(command_lines(sweep))
    for line in lines:
        assert line[:3] == ["/usr/bin/env", "python", "train.py"]
        assert not any(word.startswith("-") for word in line)
    return [plain(compose("train", line[3:])) for line in lines]


@pytest.mark.slow
def test_every_command_of_a_fake_agent_composes_to_the_values_asked_for(tmp_path: Path) -> None:
    rates = "optimizer.learning_rate=1e-5,0.001"
    found = configs(written(tmp_path / "factors.yaml", *FACTORS, rates, "run.name='a b'"))
    factors = [(len(config["first_stage"]["channel_mult"]), config["optimizer"]["learning_rate"]) for config in found]
    assert factors == [(3, 1e-5), (3, 1e-3), (4, 1e-5), (4, 1e-3)]
    for config in found:
        assert config["stage"]["name"] == "autoencoder"
        assert config["run"] == {"name": "a b", "dir": None, "group": "factors"}
        assert config["logger"]["wandb"]["mode"] == "online"


def test_lists_truth_and_nothing_reach_hydra_as_they_were_meant(tmp_path: Path) -> None:
    words = ["conditioner=[text],[text,class_label]", "data.flip=true,null", "run.group=mine"]
    found = configs(written(tmp_path / "more.yaml", *words))
    values = [([*config["conditioner"]], config["data"]["flip"]) for config in found]
    assert values == [(names, flip) for names in (["text"], ["text", "class_label"]) for flip in (True, None)]
    assert {config["run"]["group"] for config in found} == {"mine"}


def test_intervals_several_processes_and_a_goal(tmp_path: Path) -> None:
    rate = "optimizer.learning_rate=tag(log,interval(1e-5,1e-3))"
    options = ["--method", "bayes", "--metric", "val/psnr", "--goal", "maximize", "--runs", "20"]
    sweep = written(tmp_path / "rates.yaml", "stage=autoencoder", rate, *options, "--processes", "8")
    assert sweep["parameters"] == {
        "optimizer.learning_rate": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-3}
    }
    assert (sweep["method"], sweep["run_cap"]) == ("bayes", 20)
    assert sweep["metric"] == {"name": "val/psnr", "goal": "maximize"}
    for line in command_lines(sweep):
        assert line[1:5] == ["python", "-m", "torch.distributed.run", "--nproc-per-node=8"]
        assert plain(compose("train", line[6:]))["optimizer"]["learning_rate"] in (1e-5, 1e-3)


@pytest.mark.parametrize(
    ("interval", "ours", "expected"),
    [
        ("int(interval(2,6))", {"distribution": "int_uniform"}, IntDistribution(2, 6)),
        (
            "tag(log,int(interval(2,6)))",
            {"distribution": "q_log_uniform_values", "q": 1},
            IntDistribution(2, 6, log=True),
        ),
        ("interval(2,6)", {"distribution": "uniform"}, FloatDistribution(2.0, 6.0)),
    ],
)
def test_an_interval_of_whole_numbers_gives_whole_numbers(
    interval: str, ours: dict[str, Any], expected: Any, tmp_path: Path
) -> None:
    """As W&B's own scheduler reads the parameter."""
    option = "lr_schedule.warmup_steps" if "int(" in interval else "trainer.gradient_clip"
    parameter = written(tmp_path / "s.yaml", f"{option}={interval}", "--method", "random")["parameters"][option]
    assert parameter == {**ours, "min": expected.low, "max": expected.high}
    assert sweep_parameter_to_distribution(parameter) == expected


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["seed=0,1", "logger=csv"], "a W&B sweep reads its metric from what logger=wandb sends"),
        (["seed=0,1", "logger=tensorboard"], "logger: a W&B sweep reads"),
        (["logger=wandb,csv"], "logger: a W&B sweep reads"),
        (["stage=autoencoder"], "nothing is swept"),
        (["first_stage=kl_f4,kl_f9"], "first_stage=kl_f9: there is no such file"),
        (["sede=0,1"], "sede: there is no such option; did you mean seed?"),
        (["seed=0,1", "seed=2"], "seed is given twice"),
        (["+new=0,1"], r"a swept option cannot begin with \+ or ~"),
        (["seed=0,1", "optimizer.learning_rate=interval(1e-5,1e-3)"], "method=grid needs listed values"),
        (["seed=glob(*)"], "a search takes lists and intervals"),
        (["experiment=tradeoff/emoji", "first_stage=f4,f8"], "stage=all is several runs a job"),
        (["seed=0,1", "oops"], "oops is no option; write options as key=value"),
        (["seed=0,1", "--name", "a/b"], "becomes a group's name"),
        (["seed=0,1", "--processes", "0"], "--processes 0 must be at least 1"),
    ],
)
def test_what_no_agent_could_run_is_refused_before_a_file_is_written(
    tmp_path: Path, words: list[str], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        dispatch(["sweep-file", *words, "--out", str(tmp_path / "sweep.yaml")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "name", "goal"),
    [
        (["stage=autoencoder"], "val/psnr", "maximize"),
        (["stage=autoencoder", "loss=kl"], "val/lpips", "minimize"),
        (["stage=clip"], "val/recall_5_of_50", "maximize"),
        (["stage=diffusion"], "val/loss", "minimize"),
        (["stage=classifier"], "val/accuracy", "maximize"),
        (["stage=diffusion", "callbacks=scores"], "in_training/fid", "minimize"),
    ],
)
def test_the_metric_is_the_one_that_chooses_the_best(words: list[str], name: str, goal: str, tmp_path: Path) -> None:
    swept = "optimizer.learning_rate=tag(log,interval(1e-5,1e-3))"
    content = written(tmp_path / "sweep.yaml", *words, swept, "--method", "bayes")
    assert content["metric"] == {"name": name, "goal": goal}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "metric"),
    [("autoencoder", "val/loss"), ("clip", "val/loss"), ("diffusion", "val/psnr"), ("diffusion", "los")],
)
def test_a_metric_that_the_stage_does_not_log_is_refused(stage: str, metric: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"--metric {metric}: stage={stage} logs no such metric; choose among"):
        written(tmp_path / "sweep.yaml", f"stage={stage}", "seed=0,1", "--metric", metric)
    assert not (tmp_path / "sweep.yaml").exists()
