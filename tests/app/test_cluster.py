"""The files of examples/cluster and launcher=slurm, run by a stand-in for SLURM with two processes on small data."""

import csv
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from walk import SMALL, TINY_CLIP, Flow

from ldmlab.app.compose import compose
from ldmlab.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples" / "cluster"
STAND_IN = ROOT / "tests" / "slurm_stand_in.py"
STEPS = 80
LAST = f"step_{STEPS:08d}.ckpt"
NAMES = ("sbatch", "srun", "scontrol", "sacct", "scancel", "preempt", "time_limit", "node_fail")
AGENT = """
import copy, os, subprocess, sys, itertools, yaml
from wandb.sdk.launch.sweeps import utils
sweep = yaml.safe_load(open(sys.argv[-1]))
values = list(itertools.product(*(node["values"] for node in sweep["parameters"].values())))
chosen = values[int(os.environ["SLURM_ARRAY_TASK_ID"])]
given = {name: {"value": value} for name, value in zip(sweep["parameters"], chosen)}
words = {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
words |= utils.create_sweep_command_args({"args": given})
line = []
for chunk in utils.create_sweep_command(copy.copy(sweep["command"])):
    line += words[chunk[2:-1]] if chunk.startswith("${") and chunk.endswith("}") else [chunk]
sys.exit(subprocess.run(line).returncode)
"""


class Slurm:
    """The commands of the stand-in on PATH, and what has become of its jobs."""

    def __init__(self, root: Path) -> None:
        self.root, self.state = root, root / "state"
        self.state.mkdir(parents=True)
        (root / "bin").mkdir()
        (root / "agent.py").write_text(AGENT)
        commands = {name: f"{STAND_IN} {name}" for name in NAMES} | {"wandb": str(root / "agent.py")}
        for name, command in commands.items():
            path = root / "bin" / name
            path.write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
            path.chmod(0o755)
        outside = ("SLURM", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
        path = f"{root}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {"PATH": path, "SLURM_STAND_IN": str(self.state), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        self.environment = kept | own

    def call(self, *words: str, cwd: Path = ROOT) -> str:
        result = subprocess.run(
            words, cwd=cwd, env=self.environment, capture_output=True, text=True, check=False, timeout=500
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def submit(self, name: str, *words: str, options: list[str]) -> str:
        said = self.call("sbatch", f"--output={self.root}/%j.log", *options, str(FILES / name), *words)
        (job,) = re.findall(r"Submitted batch job (\d+)", said)
        return str(job)

    def job(self, number: str) -> dict[str, Any]:
        return dict(json.loads((self.state / f"{number}.json").read_text()))

    def log(self, number: str) -> str:
        return (self.root / f"{number}.log").read_text()

    def finished(self, number: str) -> dict[str, Any]:
        until(lambda: self.job(number)["state"] not in ("PENDING", "RUNNING", "REQUEUED"))
        assert self.job(number)["state"] == "COMPLETED", self.log(number)
        return self.job(number)


def until(true: Callable[[], Any], seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path / "slurm")


def two_steps(flow: Flow, runs: Path, *more: str) -> list[str]:
    options = [*SMALL, *flow.data, *TINY_CLIP, "trainer.accelerator=cpu", *more]
    return ["experiment=mine/clip", f"paths.runs={runs}", "run.name=job", *options]


def words_of(flow: Flow, runs: Path, *more: str) -> list[str]:
    """Steps enough to be stopped between."""
    options = ["trainer.micro_batch=4", *more, f"trainer.max_steps={STEPS}", "trainer.validate_every=40"]
    return two_steps(flow, runs, *options, "trainer.checkpoint_every=20")


def only_run(runs: Path) -> Path:
    (run,) = [path for path in runs.iterdir() if (path / "config.yaml").exists()]
    return run


def state(run: Path) -> dict[str, torch.Tensor]:
    """Everything that training goes on from: weights, averages, optimizer states."""

    def tensors(node: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        if isinstance(node, torch.Tensor):
            yield prefix, node
        elif isinstance(node, dict | list | tuple):
            for key, child in node.items() if isinstance(node, dict) else enumerate(node):
                yield from tensors(child, f"{prefix}/{key}")

    return dict(tensors(load_checkpoint(run / "checkpoints" / LAST), ""))


def losses(run: Path) -> list[tuple[str, str]]:
    return [(row["step"], row["loss"]) for row in csv.DictReader((run / "metrics.csv").open())]


def assert_same(run: Path, other: Path) -> None:
    mine, theirs = state(run), state(other)
    assert len(mine) > 20
    assert mine.keys() == theirs.keys()
    assert [name for name, tensor in mine.items() if not torch.equal(tensor, theirs[name])] == []
    assert losses(run) == losses(other)
    assert [step for step, _ in losses(run)] == [str(step) for step in range(1, STEPS + 1)]


@pytest.fixture(scope="module")
def unbroken(flow: Flow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing happens to, by four_nodes_srun.sh."""
    root = tmp_path_factory.mktemp("unbroken")
    slurm = Slurm(root / "slurm")
    job = slurm.submit(
        "four_nodes_srun.sh", *words_of(flow, root / "runs"), options=["--nodes=2", "--ntasks-per-node=1"]
    )
    slurm.finished(job)
    run = only_run(root / "runs")
    assert yaml.safe_load((run / "config.yaml").read_text())["stage"]["name"] == "clip"
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("one_node.sh", ["--gpus-per-node=2"]),
        ("four_nodes_torchrun.sh", ["--nodes=2", "--gpus-per-node=1"]),
    ],
)
def test_torchrun_trains_as_srun_does(
    name: str, options: list[str], flow: Flow, unbroken: Path, slurm: Slurm, tmp_path: Path
) -> None:
    slurm.finished(slurm.submit(name, *words_of(flow, tmp_path / "runs"), options=options))
    assert_same(only_run(tmp_path / "runs"), unbroken)


@pytest.mark.slow
def test_a_job_that_is_stopped_in_every_way_ends_as_one_that_never_was(
    flow: Flow, unbroken: Path, slurm: Slurm, tmp_path: Path
) -> None:
    """Its time limit, a preemption and a node that fails; each time it goes back to the same folder."""
    options = ["--nodes=2", "--ntasks-per-node=1"]
    job = slurm.submit("preemptible.sh", *words_of(flow, tmp_path / "runs"), options=options)
    for restarts, event in enumerate(("time_limit", "preempt", "node_fail")):
        more = 5 + rows(tmp_path / "runs")
        until(lambda more=more: rows(tmp_path / "runs") >= more)
        slurm.call(event, job)
        until(lambda count=restarts: slurm.job(job)["restarts"] == count + 1)
        until(lambda: slurm.job(job)["state"] == "RUNNING")
    slurm.finished(job)
    run = only_run(tmp_path / "runs")
    assert_same(run, unbroken)
    record = json.loads((run / "provenance.json").read_text())
    assert {record["slurm_job"], *(start["slurm_job"] for start in record["resumed"])} == {f"{job}/0"}
    saved = [int(step) for step in re.findall(r"saved step (\d+) in", slurm.log(job))]
    resumed = [int(step) for step in re.findall(r"resuming from step (\d+) in", slurm.log(job))]
    assert resumed[:2] == saved  # after a signal no step is lost
    assert len(resumed) == 3
    assert resumed[2] % 20 == 0 or resumed[2] == saved[1]  # after SIGKILL those since the last checkpoint


def rows(runs: Path) -> int:
    """Logged steps of the run, if there is one."""
    found = [*runs.glob("*/metrics.csv")]
    return max(len(found[0].read_text().splitlines()) - 1, 0) if found else 0


@pytest.mark.slow
def test_a_job_array_is_a_sweep(flow: Flow, slurm: Slurm, tmp_path: Path) -> None:
    words = two_steps(flow, tmp_path / "runs")
    first = int(slurm.submit("job_array.sh", *words, options=["--array=1,4%1"]))
    for number in (first, first + 1):
        slurm.finished(str(number))
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in (tmp_path / "runs").iterdir()]
    assert sorted((c["optimizer"]["learning_rate"], c["seed"]) for c in configs) == [(1e-5, 1), (3e-5, 0)]


@pytest.mark.slow
def test_agents_of_a_sweep_file(flow: Flow, slurm: Slurm, tmp_path: Path) -> None:
    words = [word for word in two_steps(flow, tmp_path / "runs") if word != "logger=csv"]
    words.append("logger.wandb.mode=offline")
    sweep = tmp_path / "sweep.yaml"
    slurm.call("ldmlab", "sweep-file", *words, "seed=5,6", "--out", str(sweep))
    first = int(slurm.submit("wandb_agents.sh", str(sweep), options=["--array=0-1%1"]))
    for number in (first, first + 1):
        slurm.finished(str(number))
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in (tmp_path / "runs").iterdir()]
    assert sorted((config["seed"], config["run"]["group"]) for config in configs) == [(5, "sweep"), (6, "sweep")]
    assert len([*(tmp_path / "runs").glob("*/wandb/offline-run-*")]) == 2


@pytest.mark.slow
def test_a_sweep_by_launcher_slurm_is_requeued_and_summed_up(
    flow: Flow, unbroken: Path, slurm: Slurm, tmp_path: Path
) -> None:
    words = words_of(flow, tmp_path / "runs", "seed=0,1", "launcher=slurm", "hydra.launcher.array_parallelism=1")
    command = [sys.executable, str(ROOT / "train.py"), "-m", *words]
    command += ["hydra.launcher.gpus_per_node=2", "hydra.launcher.cpus_per_task=1"]
    log = (tmp_path / "sweep.log").open("w")
    sweep = subprocess.Popen(command, cwd=ROOT, env=slurm.environment, stdout=log, stderr=log)
    until(lambda: rows(tmp_path / "runs") >= 5 or sweep.poll() is not None)
    assert sweep.poll() is None, (tmp_path / "sweep.log").read_text()
    (job,) = [path.stem for path in slurm.state.glob("*.json") if slurm.job(path.stem)["task"] == 0]
    slurm.call("time_limit", job)
    assert sweep.wait(400) == 0, (tmp_path / "sweep.log").read_text()
    assert slurm.job(job)["restarts"] == 1
    runs = [path.parent for path in (tmp_path / "runs").glob("*/config.yaml")]
    by_seed = {yaml.safe_load((run / "config.yaml").read_text())["seed"]: run for run in runs}
    assert sorted(by_seed) == [0, 1]
    assert len(runs) == 2
    assert_same(by_seed[0], unbroken)
    said = (tmp_path / "sweep.log").read_text()
    assert re.search(rf"best: val/recall_5_of_50 [\d.]+  {tmp_path}/runs/job-\w+  seed=[01]\n", said)
    command = shlex.split(said.partition("to train it for twice as many steps: ")[2].splitlines()[0])
    assert not {"-m", "launcher=slurm"} & {*command}
    assert compose("train", command[2:]).trainer.max_steps == 2 * STEPS


@pytest.mark.slow
def test_a_run_that_fails_is_a_failed_job(flow: Flow, slurm: Slurm, tmp_path: Path) -> None:
    """Its sentence reaches the sweep and its log, and the other runs go on."""
    words = two_steps(flow, tmp_path / "runs", "launcher=slurm", "hydra.launcher.cpus_per_task=1")
    command = [sys.executable, str(ROOT / "train.py"), "-m", *words, "init_from=/nowhere,null"]
    sweep = subprocess.run(command, cwd=ROOT, env=slurm.environment, capture_output=True, text=True, timeout=400)
    assert sweep.returncode == 2
    logs = [path.read_text() for path in tmp_path.rglob("*_log.err")]
    assert "1 of 2 runs failed;" in sweep.stderr, logs
    names = [path.stem for path in slurm.state.glob("*.json")]
    until(lambda: all(slurm.job(name)["code"] is not None for name in names))  # a result is there before the end
    jobs = sorted((slurm.job(name) for name in names), key=lambda job: job["task"])
    assert [(job["state"], job["code"]) for job in jobs] == [("FAILED", 2), ("COMPLETED", 0)]
    assert any("ldmlab: /nowhere is neither" in log for log in logs)


@pytest.mark.slow
def test_a_search_launches_its_trials_together(flow: Flow, slurm: Slurm, tmp_path: Path) -> None:
    """By launcher=slurm; and one after another in two processes of torchrun, of which the first asks and tells."""
    words = two_steps(flow, tmp_path / "runs", "sweeper=optuna", "hydra.sweeper.search.n_trials=2")
    words += ["optimizer.learning_rate=tag(log,interval(1e-5,1e-3))"]
    on_slurm = ["launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.sweeper.search.n_jobs=2"]
    slurm.call(sys.executable, "train.py", "-m", *words, *on_slurm)
    torchrun = ["torchrun", "--standalone", "--nproc-per-node=2", "train.py", "-m", *words]
    slurm.call(*torchrun, "hydra.sweeper.search.study=two")
    tasks = [slurm.job(path.stem) for path in slurm.state.glob("*.json")]
    assert [task["state"] for task in tasks] == ["COMPLETED"] * 2
    assert len({task["array"] for task in tasks}) == 1
    runs = {path.parent.name: yaml.safe_load(path.read_text()) for path in (tmp_path / "runs").glob("*/config.yaml")}
    assert sorted(runs) == ["job-0000", "job-0001", "two-0000", "two-0001"]
    rates = {name: config["optimizer"]["learning_rate"] for name, config in runs.items()}
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "runs" / "optuna.journal"))
    )
    for study in ("job", "two"):
        for trial in optuna.load_study(study_name=study, storage=storage).trials:
            assert trial.state.name == "COMPLETE"
            assert trial.params == {"optimizer.learning_rate": rates[f"{study}-{trial.number:04d}"]}
    assert rates["job-0000"] == rates["two-0000"]  # the same seed asks for the same first trial


@pytest.mark.slow
def test_skypilots_nodes_are_one_run(flow: Flow, unbroken: Path, slurm: Slurm, tmp_path: Path) -> None:
    task = yaml.safe_load((FILES / "skypilot.yaml").read_text())
    (mount,) = task["file_mounts"]
    script = task["run"].replace(f"{mount}/", f"{tmp_path}/runs/")
    assert script != task["run"]
    given = {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1"}
    given |= {"OPTIONS": shlex.join(words_of(flow, tmp_path / "runs")), **{"RUN": "text"}}
    nodes = [
        subprocess.Popen(
            ["bash", "-c", script], cwd=ROOT, env=slurm.environment | given | {"SKYPILOT_NODE_RANK": str(rank)}
        )
        for rank in (0, 1)
    ]
    assert [node.wait(400) for node in nodes] == [0, 0]
    assert_same(tmp_path / "runs" / "text", unbroken)


def test_skypilots_keys_are_known() -> None:
    task = yaml.safe_load((FILES / "skypilot.yaml").read_text())
    assert task.keys() == {"name", "num_nodes", "resources", "workdir", "file_mounts", "envs", "setup", "run"}
    assert all(node.keys() == {"source", "mode"} for node in task["file_mounts"].values())


@pytest.mark.slow
def test_the_papers_comparison_is_a_sweep_file(slurm: Slurm, tmp_path: Path) -> None:
    slurm.call(str(FILES / "downsampling_sweep.sh"), cwd=tmp_path)
    sweep = yaml.safe_load((tmp_path / "downsampling.yaml").read_text())
    fixed = [word for word in sweep["command"] if "=" in word]
    factors = {}
    for experiment in sweep["parameters"]["experiment"]["values"]:
        config = compose("train", [f"experiment={experiment}", *fixed])
        factors[len(config.first_stage.channel_mult)] = config.data.latents
    assert factors == {
        doublings + 1: f"data/latents/paper-compression-imagenet-ldm-{2**doublings}" for doublings in (1, 2, 3, 4, 5)
    }


@pytest.mark.parametrize("path", sorted(FILES.glob("*.sh")), ids=lambda path: path.name)
def test_a_script_is_valid_and_in_the_page(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert f"examples/cluster/{path.name}" in (ROOT / "docs" / "cluster.md").read_text()
    for command in re.findall(r"^#   sbatch \S+ (.*)$", path.read_text(), re.M):
        if "experiment=" in command:
            compose("train", shlex.split(command))


def test_what_the_stand_in_does_not_know_is_refused(slurm: Slurm, tmp_path: Path) -> None:
    for line in ("--gpu-per-node=8", "--time=tomorrow", "--signal=USR1"):
        (tmp_path / "job.sh").write_text(f"#!/bin/bash\n#SBATCH {line}\ntrue\n")
        result = subprocess.run(
            ["sbatch", str(tmp_path / "job.sh")], env=slurm.environment, cwd=tmp_path, capture_output=True, check=False
        )
        assert result.returncode != 0
    assert not list(itertools.islice(slurm.state.iterdir(), 1))
