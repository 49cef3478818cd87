"""Sweeps of train.py: a grid and a search with Optuna, their summaries, and a search that was stopped."""

import csv
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from walk import SMALL, TINY_CLIP, Flow

from ldmlab.app import cli, wiring
from ldmlab.app.hydra_main import hydra_main
from ldmlab.checkpoints import load_checkpoint
from ldmlab.disks import FileLock
from ldmlab.errors import InputError
from refusals import refusal

RATES = "optimizer.learning_rate=tag(log,interval(1e-5,1e-2))"


def start(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """`ldmlab train -m`, in this process."""
    monkeypatch.setattr(sys, "argv", ["ldmlab", "train", "-m", *words])
    cli.dispatch(["train", "-m", *words])


def parabola(seen: list[float], stop_at: int = -1, bad: float = math.inf) -> Callable[..., Path]:
    """In place of training: a loss with its minimum at a learning rate of 1e-3, written as a run writes it."""

    def train(config: dict[str, Any], **_: Any) -> Path:
        rate = config["optimizer"]["learning_rate"]
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        seen.append(rate)
        if rate > bad:
            raise InputError("the loss is not finite.")
        run = Path(config["run"]["dir"] or f"{config['paths']['runs']}/grid-{len(seen)}")
        run.mkdir(parents=True)
        loss = math.log10(rate / 1e-3) ** 2
        (run / "metrics.csv").write_text(f"step,val/loss\n1,{loss + 1}\n2,{loss}\n3,{loss + 0.5}\n")
        (run / "config.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 3}}))
        return run

    return train


def search(runs: Path, *more: str, trials: int = 5) -> list[str]:
    words = [
        "sweeper=optuna",
        "+hydra.sweeper.search.sampler.n_startup_trials=2",
        "run.name=rates",
        f"paths.runs={runs}",
        "data.train=x",
        "data.val=x",
        RATES,
    ]
    return [*words, f"hydra.sweeper.search.n_trials={trials}", *more]


def trials_of(runs: Path, study: str = "rates") -> list[Any]:
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(runs / "optuna.journal")))
    return optuna.load_study(study_name=study, storage=storage).trials


@pytest.mark.slow
def test_a_search_finds_the_best_and_goes_on_after_a_stop_as_if_there_was_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unbroken, broken = list[float](), list[float]()
    monkeypatch.setattr(wiring, "train", parabola(unbroken))
    start(monkeypatch, *search(tmp_path / "a", trials=5))
    best = min(trials_of(tmp_path / "a"), key=lambda trial: trial.value)
    assert best.value == min(math.log10(rate / 1e-3) ** 2 for rate in unbroken)  # of step 2, not the last one
    said = capsys.readouterr().err
    assert f"best: val/loss {best.value:.5g}  {tmp_path}/a/rates-{best.number:04d}  optimizer.learning_rate=" in said
    monkeypatch.setattr(wiring, "train", parabola(broken, stop_at=2))
    with pytest.raises(KeyboardInterrupt):
        start(monkeypatch, *search(tmp_path / "b", trials=5))
    assert "the same command continues it" in capsys.readouterr().err
    assert [trial.state.name for trial in trials_of(tmp_path / "b")] == ["COMPLETE"] * 2 + ["RUNNING"]
    monkeypatch.setattr(wiring, "train", parabola(broken))
    start(monkeypatch, *search(tmp_path / "b", trials=5))
    assert broken == unbroken
    assert [t.value for t in trials_of(tmp_path / "b")] == [t.value for t in trials_of(tmp_path / "a")]
    start(monkeypatch, *search(tmp_path / "b", trials=5))  # nothing is left to do
    assert len(broken) == 5


@pytest.mark.slow
def test_a_trial_that_ended_or_runs_elsewhere_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As jobs of a launcher do when the command that waits for them was stopped."""
    for _ in range(3):  # three trials are asked for, none has run
        monkeypatch.setattr(wiring, "train", parabola([], stop_at=0))
        with pytest.raises(KeyboardInterrupt):
            start(monkeypatch, *search(tmp_path, "hydra.sweeper.search.n_jobs=3", trials=3))
    rate = [trial.params["optimizer.learning_rate"] for trial in trials_of(tmp_path)]
    for number in (0, 1):  # meanwhile one ends, and a process works on another
        parabola([])({"optimizer": {"learning_rate": rate[number]}, "run": {"dir": f"{tmp_path}/rates-000{number}"}})
    (tmp_path / "rates-0000" / "finished.json").write_text("{}")
    lock = FileLock(tmp_path / "rates-0001" / ".lock")
    assert lock.take()
    seen: list[float] = []
    monkeypatch.setattr(wiring, "train", parabola(seen))
    start(monkeypatch, *search(tmp_path, "hydra.sweeper.search.n_jobs=3", trials=3))
    assert seen == [rate[2]]
    assert [trial.state.name for trial in trials_of(tmp_path)] == ["COMPLETE", "RUNNING", "COMPLETE"]
    assert trials_of(tmp_path)[0].value == pytest.approx(math.log10(rate[0] / 1e-3) ** 2)
    lock.release()


@pytest.mark.slow
def test_a_search_over_lists_numbers_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(wiring, "train", parabola(seen))
    words = ["backbone=unet_small,unet_demo", "seed=range(2,9,3)", "trainer.micro_batch=int(interval(1,4))"]
    start(monkeypatch, *search(tmp_path, *words, "data.flip=true,false", trials=4))
    for trial in trials_of(tmp_path):
        assert trial.params["backbone"] in ("unet_small", "unet_demo")
        assert trial.params["seed"] in (2, 5, 8)
        assert trial.params["trainer.micro_batch"] in (1, 2, 3, 4)
        assert trial.params["data.flip"] in ("True", "False")
    assert len({trial.params["seed"] for trial in trials_of(tmp_path)}) > 1


@pytest.mark.slow
def test_a_trial_that_fails_has_no_value_and_too_many_end_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wiring, "train", parabola([], bad=2e-3))
    start(monkeypatch, *search(tmp_path / "some", "hydra.sweeper.search.n_jobs=3"))
    states = [trial.state.name for trial in trials_of(tmp_path / "some")]
    assert set(states) == {"COMPLETE", "FAIL"}
    assert capsys.readouterr().out.count("failed: the loss is not finite.") == states.count("FAIL")
    monkeypatch.setattr(wiring, "train", parabola([], bad=0))
    with pytest.raises(InputError, match=r"3 trials failed, so the sweep stops; trial 2 failed: the loss is not"):
        start(monkeypatch, *search(tmp_path / "all", "hydra.sweeper.search.max_failures=2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sweeper=optuna"], "needs an option with an interval or values"),
        (["sweeper=optuna", RATES, "run.dir=runs/x"], "run.dir=runs/x is one folder for several runs"),
        (
            ["sweeper=optuna", RATES, "experiment=tradeoff/emoji", "hydra.sweeper.metric=val/loss"],
            "leave out run.dir, stage=all",
        ),
        (
            ["sweeper=optuna", RATES, "hydra.sweeper.metric=val/psnr"],
            "hydra.sweeper.metric=val/psnr: stage=diffusion logs",
        ),
        (["sweeper=optuna", RATES, "backbone=unet_small,unet_smell"], "backbone=unet_smell: there is no such file"),
        (["seed=0,1", "hydra.sweeper.direction=down"], "choose minimize or maximize"),
        ([RATES], "an interval needs sweeper=optuna"),
        (
            ["launcher=slurms", "seed=0,1"],
            "launcher=slurms: there is no such file in conf/launcher/; did you mean slurm",
        ),
        (["seed=0,y"], "seed=y does not fit; give a whole number"),
        (["sweeper=optuna", "seed=x,y"], "seed=x does not fit"),
        (["backbone.num_res_blocks=1,two"], "backbone.num_res_blocks=two does not fit"),
        (["sweeper=optuna", "trainer.micro_batch=interval(0.5,4)"], r"trainer.micro_batch=0.5 does not fit"),
        (["sweeper=optuna", "optimizer.learning_rate=interval(0.1,0.01)"], r"give interval\(LOW,HIGH\)"),
        (["sweeper=optuna", "optimizer.learning_rate=tag(log,interval(0,0.1))"], "above 0"),
        (["sweeper=optuna", "optimizer.learning_rate=tag(lgo,interval(0.01,0.1))"], r"or tag\(log"),
        (["sweeper=optuna", RATES, "hydra.sweeper.search.n_trials=0"], "n_trials=0 must be at least 1"),
        (["sweeper=optuna", RATES, "hydra.sweeper.search.n_jobs=x"], "n_jobs=x does not fit; give a whole number"),
        (["sweeper=optuna", RATES, "hydra.sweeper.search.max_failures=x"], "max_failures=x does not fit"),
        (["sweeper=optuna", RATES, "hydra.sweeper.search.seed=x"], "search.seed=x does not fit"),
        (["sweeper=optuna", RATES, "hydra.sweeper.search.study=../x"], "study=../x becomes folder names"),
        (["sweeper=optuna", RATES, "hydra.sweeper.search.sampler._target_=optuna.Nope"], "name a sampler of Optuna"),
        (["sweeper=optuna", RATES, "hydra.sweeper.search.storage=foo://x"], "storage=foo://x cannot hold the study"),
        (["sweeper=optuna", RATES, "hydra.sweeper.search.storage=/proc/no/x"], "storage=/proc/no/x cannot hold"),
        (["seed=0,1", "hydra.sweeper.max_batch_size=0"], "hydra.sweeper.max_batch_size=0 must be at least 1"),
        (["launcher=slurm", "seed=0,1"], "launcher=slurm: srun is not found"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_a_run(
    words: Sequence[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wiring, "train", parabola([]))
    with pytest.raises(InputError, match=sentence):
        start(monkeypatch, "data.train=x", "data.val=x", *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["text", "bytes", "pipe", "folder"])
def test_a_file_that_holds_no_study_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "studies"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.write_bytes({"text": b"no journal {\n", "bytes": bytes(range(256))}[kind])
    words = search(tmp_path / "runs", f"hydra.sweeper.search.storage={place}")
    assert f"search.storage={place} cannot hold the study (" in refusal(lambda: start(monkeypatch, *words))
    assert [path.name for path in tmp_path.iterdir()] == ["studies"]


@pytest.mark.slow
def test_a_study_keeps_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring, "train", parabola([]))
    start(monkeypatch, *search(tmp_path, trials=1))
    with pytest.raises(InputError, match=r"was started with other options \(seed=3\)"):
        start(monkeypatch, *search(tmp_path, "seed=3", trials=2))
    start(monkeypatch, *search(tmp_path, "seed=3", "hydra.sweeper.search.study=third", trials=2))
    assert [trial.value is not None for trial in trials_of(tmp_path, "third")] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize(("word", "package"), [("sweeper=optuna", "optuna"), ("launcher=slurm", "submitit")])
def test_a_missing_extra_is_one_sentence(
    word: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra.core.config_store import ConfigStore

    monkeypatch.setitem(sys.modules, "optuna", None)
    repo = dict(ConfigStore.instance().repo["hydra"]["launcher"])
    monkeypatch.setitem(ConfigStore.instance().repo["hydra"], "launcher", {"basic.yaml": repo["basic.yaml"]})
    words = [word, f"paths.runs={tmp_path}", "data.train=x", "data.val=x", "seed=0,1"]
    with pytest.raises(InputError, match=rf"{word} needs .*{package}.*; install it: pip install 'ldmlab\[cluster\]'"):
        start(monkeypatch, *words)


@pytest.mark.parametrize("word", ["launcher=slurm", "sweeper=optuna", "hydra.sweeper.metric=loss"])
def test_how_runs_start_has_no_meaning_for_one_that_starts_here(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", word])
    with pytest.raises(InputError, match=f"{word} is for several runs, or one that a launcher starts; add --multirun"):
        hydra_main("train", lambda _: None)


@pytest.mark.slow
def test_a_grid_of_real_runs_with_one_that_fails(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "a b" / "runs"
    options = [*SMALL, *flow.data, *TINY_CLIP, f"paths.runs={runs}", "experiment=mine/clip", "seed=0,1"]
    with pytest.raises(InputError, match=r"2 of 4 runs failed; .*seed=0.*init_from=nowhere"):
        start(monkeypatch, *options, "init_from=null,nowhere")
    folders = sorted(path for path in runs.iterdir() if path.is_dir())
    assert len(folders) == 2
    last = {}
    for folder in folders:
        command = json.loads((folder / "provenance.json").read_text())["command"].split()
        assert "-m" not in command  # a run's own command, which continues it alone
        assert f"seed={yaml.safe_load((folder / 'config.yaml').read_text())['seed']}" in command
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        last[str(folder)] = max(float(row["val/recall_5_of_50"]) for row in rows if row["val/recall_5_of_50"])
    said = capsys.readouterr().err.splitlines()
    (best,) = [line for line in said if line.startswith("best: ")]
    assert float(best.split()[2]) == pytest.approx(max(last.values()), rel=1e-4)
    (longer,) = [line.partition(": ")[2] for line in said if line.startswith("to train it for twice")]
    assert cli.dispatch(shlex.split(longer)[1:]) == 0
    (run,) = [folder for folder in folders if (folder / "checkpoints" / "step_00000004.ckpt").exists()]
    assert str(run) in best
    assert load_checkpoint(run / "checkpoints" / "step_00000004.ckpt")["step"] == 4
