"""Lightning's callbacks and loggers, torch's optimizers, and parts that miss something, in a run of train.py."""

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from ldmlab.app.compose import compose, plain
from ldmlab.app.wiring import train
from ldmlab.checkpoints import load_checkpoint
from refusals import refusal

sys.path.append(str(Path(__file__).parents[1] / "data"))
from shard_maker import write_shards

SEEN: list[str] = []


class Hello(pl.Callback):
    """Notes hooks of a run, and logs a number of its own."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        SEEN.append("setup" if stage == "fit" else stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        SEEN.append("start")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        SEEN.append("batch")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.logger.log_metrics({"hello": float(batch_idx)}, step=pl_module.step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        SEEN.append(f"validated {pl_module.step}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        SEEN.append("end")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        SEEN.append(type(exception).__name__)


class Failing(Hello):
    """Ends the run."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        raise ZeroDivisionError


class Odd:
    """A class that refuses an option in its own way."""

    def __init__(self, width: int) -> None:
        raise ValueError(f"the width {width} is odd")


class NoAlphaBar:
    """A schedule that lacks most of what a schedule has."""

    steps = 10


class NoNull:
    """A conditioner without a value for no condition."""

    reads, slot, drop = frozenset({"caption"}), "vector", 0.0

    def width(self, latent: Any) -> int:
        return 4

    def __call__(self, batch: dict[str, Any], encode: Any) -> Any:
        raise NotImplementedError


class Nothing:
    """No part at all."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        write_shards(folder / split, [4], split=split, size=8)
    return folder


@pytest.fixture(autouse=True)
def _fresh() -> None:
    SEEN.clear()


def run(shards: Path, out: Path, *more: str, steps: int = 4) -> Path:
    small = ["backbone.model_channels=32", "backbone.channel_mult=[1]", "backbone.num_res_blocks=1"]
    small = [] if "backbone=mine" in more else small
    options = ["data=shards", f"data.train={shards}/train", f"data.val={shards}/val", "data.image_size=8"]
    options += ["first_stage=identity", *small, "data.workers=0", "data.fields=[]", "stage.guidance_scale=1.0"]
    options += ["callbacks=quiet", "trainer.micro_batch=2", "trainer.log_every=1", "trainer.validate_every=2"]
    options += ["trainer.precision=32-true", "trainer.accelerator=cpu", f"trainer.max_steps={steps}"]
    train(plain(compose("train", [*options, f"run.dir={out}", *more])))
    return out


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def own_file(folder: Path, group: str, node: str) -> list[str]:
    """A file of a user's own, and the options that choose it."""
    file = folder / "conf" / group / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"{node}\n")
    return [f"hydra.searchpath=['{folder}/conf']", f"{group}=mine"]


HELLO = f"+callbacks.hello={{_target_: {__name__}.Hello}}"


def test_lightnings_callbacks_and_loggers(shards: Path, tmp_path: Path) -> None:
    monitor = "+callbacks.lr={_target_: pytorch_lightning.callbacks.LearningRateMonitor, logging_interval: step}"
    board = f"+logger.board={{_target_: pytorch_lightning.loggers.TensorBoardLogger, save_dir: '{tmp_path}/board'}}"
    table = f"+logger.table={{_target_: pytorch_lightning.loggers.CSVLogger, save_dir: '{tmp_path}/table'}}"
    made = run(shards, tmp_path / "run", HELLO, monitor, board, table)
    assert ["setup", "start", *["batch"] * 2, "validated 2", *["batch"] * 2, "validated 4", "end"] == SEEN
    assert [row["hello"] for row in rows(made)] == ["0", "1", "2", "3"]
    assert float(rows(made)[-1]["lr-AdamW"]) > 0
    assert list((tmp_path / "board").rglob("events.*"))
    with open(next((tmp_path / "table").rglob("metrics.csv")), newline="") as file:
        logged = list(csv.DictReader(file))
    assert [row["step"] for row in logged if row["loss"]] == ["1", "2", "3", "4"]
    assert {row["step"] for row in logged} == {"1", "2", "3", "4"}  # the monitor of rates writes rows of its own


def test_a_run_with_them_goes_on(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "run", HELLO, steps=2)
    SEEN.clear()
    made = run(shards, tmp_path / "run", HELLO)
    assert SEEN.count("batch") == 2
    assert [row["step"] for row in rows(made)] == ["1", "2", "3", "4"]


def test_an_exception_reaches_them(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        run(shards, tmp_path / "run", f"+callbacks.failing={{_target_: {__name__}.Failing}}")
    assert SEEN[-1] == "ZeroDivisionError"


@pytest.mark.parametrize(
    "target",
    [
        "pytorch_lightning.callbacks.GradientAccumulationScheduler, scheduling: {0: 1}",
        "pytorch_lightning.callbacks.BatchSizeFinder",
        "pytorch_lightning.callbacks.LearningRateFinder",
        "pytorch_lightning.callbacks.StochasticWeightAveraging, swa_lrs: 0.1",
    ],
)
def test_what_would_decide_the_steps_is_named(shards: Path, tmp_path: Path, target: str) -> None:
    sentence = refusal(lambda: run(shards, tmp_path / "run", f"+callbacks.x={{_target_: {target}}}"))
    assert "steps the optimizer" in sentence


def test_lightnings_checkpoints_and_early_stopping(shards: Path, tmp_path: Path) -> None:
    kept = "{_target_: pytorch_lightning.callbacks.ModelCheckpoint, monitor: val/loss, filename: mine, dirpath: '%s'}"
    stop = "{_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: val/loss, min_delta: 1000.0, patience: 1}"
    words = [f"+callbacks.kept={kept % (tmp_path / 'kept')}", f"+callbacks.stop={stop}"]
    made = run(shards, tmp_path / "run", *words, steps=8)
    assert [row["step"] for row in rows(made) if row["val/loss"]] == ["2", "4"]  # the second is no better
    found = load_checkpoint(tmp_path / "kept" / "mine.ckpt")
    assert found["step"] in (2, 4)
    newest = max((made / "checkpoints").glob("step_*"))
    assert newest.name == "step_00000004.ckpt"
    states = load_checkpoint(newest)["callbacks"]
    assert next(state for key, state in states.items() if "EarlyStopping" in key)["wait_count"] == 1


@pytest.mark.slow
def test_an_optimizer_of_torch(shards: Path, tmp_path: Path) -> None:
    words = own_file(tmp_path, "optimizer", "{_target_: torch.optim.SGD, _partial_: true, lr: 0.125, momentum: 0.9}")
    made = run(shards, tmp_path / "run", *words, steps=2)
    assert rows(made)[-1]["learning_rate/denoiser"] == "0.125"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("+stage.colour=red", "stage.colour: there is no such option"),
        ("stage.panel_steps=many", "stage.panel_steps=many does not fit; give a whole number."),
        ("stage.panel_count=2.5", "stage.panel_count=2.5 does not fit"),
        ("stage.guidance_scale=nan", "stage.guidance_scale=nan is not finite"),
        ("stage.latent_scale=[1]", "stage.latent_scale=[1] does not fit"),
    ],
)
def test_options_of_the_stage(shards: Path, tmp_path: Path, word: str, expected: str) -> None:
    assert expected in refusal(lambda: run(shards, tmp_path / "run", word))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "lacking"),
    [
        ([f"diffusion.schedule={{_target_: {__name__}.NoAlphaBar}}"], "NoAlphaBar has no levels()"),
        ([f"backbone={{_target_: {__name__}.Nothing}}"], "Nothing has no prepare()"),
        ([f"sampler={{_target_: {__name__}.Nothing}}"], "Nothing has no __call__()"),
        ([f"diffusion.prediction={{_target_: {__name__}.Nothing}}"], "Nothing has no target()"),
        ([f"+conditioner.x={{_target_: {__name__}.NoNull}}"], "NoNull has no null()"),
        ([f"+callbacks.x={{_target_: {__name__}.Nothing}}"], "Nothing has no load_state_dict()"),
        ([f"+logger.x={{_target_: {__name__}.Nothing}}"], "Nothing has no log_metrics()"),
        ([f"optimizer={{_target_: {__name__}.Nothing}}"], "Nothing has no __call__()"),
        ([f"lr_schedule={{_target_: {__name__}.Nothing}}"], "Nothing has no __call__()"),
        (["+callbacks.x={_target_: no_such_lab.Part}"], "no_such_lab.Part does not exist"),
        (["+callbacks.x={_target_: pytorch_lightning.callbacks.NoSuch}"], "NoSuch does not exist"),
        (["+callbacks.x={_target_: builtins.dict}"], "builtins.dict names no options; wrap it"),
    ],
)
def test_what_a_part_lacks_is_named(shards: Path, tmp_path: Path, words: list[str], lacking: str) -> None:
    name, _, node = words[0].partition("=")
    if name.startswith("+"):
        chosen = words
    elif "." in name:  # a node in place of another
        chosen = [f"~{name}", f"+{words[0]}"]
    else:
        chosen = own_file(tmp_path, name, node)
    assert lacking in refusal(lambda: run(shards, tmp_path / "run", *chosen))


@pytest.mark.parametrize(
    ("module", "text", "reason"),
    [
        ("broken_lab", "class Part(:\n", "invalid syntax"),
        ("needy_lab", "\nimport a_package_that_is_not_here\n", "'a_package_that_is_not_here'; {place}, line 2)"),
        ("failing_lab", "value = {}['key']\n", "KeyError: 'key'; {place}, line 1)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(
    module: str, text: str, reason: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / f"{module}.py"
    place.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    word = f"+callbacks.x={{_target_: {module}.Part}}"
    sentence = refusal(lambda: run(shards, tmp_path / "run", word))
    assert sentence.startswith(f"callbacks.x._target_={module}.Part cannot be imported (")
    assert reason.format(place=place) in sentence
    assert not (tmp_path / "run").exists()


def test_what_a_class_from_outside_refuses_is_a_sentence(shards: Path, tmp_path: Path) -> None:
    sentence = refusal(lambda: run(shards, tmp_path / "run", f"+callbacks.x={{_target_: {__name__}.Odd, width: 7}}"))
    assert sentence == "callbacks.x: Odd refuses its options (the width 7 is odd); change them."
    assert not (tmp_path / "run").exists()


class Unsaved(pl.Callback):
    """Its state cannot be saved."""

    def state_dict(self) -> dict[str, Any]:
        return {"f": lambda: 1}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (f"+callbacks.x={{_target_: {__name__}.Unsaved}}", "the state of Unsaved holds more than tensors"),
        ("+callbacks.x=5", "callbacks.x=5 names nothing to build; give callbacks.x._target_=PACKAGE.CLASS."),
        ("+callbacks.x={_target_: pytorch_lightning.callbacks.Timer, duration: x}", "Timer refuses its options"),
        (
            "+callbacks.x={_target_: pytorch_lightning.callbacks.ModelCheckpoint, monitor: val/nope}",
            "could not find the monitored key",
        ),
        (
            "+callbacks.x={_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: val/nope}",
            "metric `val/nope` which is not available",
        ),
        ("+trainer.limit_train_batches=0", "no step was trained"),
        (
            "+trainer.profiler={_target_: pytorch_lightning.profilers.AdvancedProfiler, dirpth: x}",
            "did you mean dirpath",
        ),
    ],
)
def test_what_lightning_refuses_is_a_sentence(shards: Path, tmp_path: Path, word: str, expected: str) -> None:
    assert expected in refusal(lambda: run(shards, tmp_path / "run", word))


class StopsAtTwo(pl.Callback):
    """Asks the Trainer to stop."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        trainer.should_stop = pl_module.step >= 2


def test_a_run_that_a_callback_stops_is_not_finished(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(shards, tmp_path / "run", f"+callbacks.x={{_target_: {__name__}.StopsAtTwo}}")
    said = capsys.readouterr().err
    assert "ended at step 2 of trainer.max_steps=4" in said
    assert "; validation at step 2: loss " in said
    assert said.rstrip().splitlines()[-1].startswith("to go on: ")
    assert said.rstrip().endswith(f"run.dir={tmp_path / 'run'}")
    assert not (tmp_path / "run" / "finished.json").exists()
    run(shards, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2", "3", "4"]
    assert (tmp_path / "run" / "finished.json").exists()


def test_a_profiler_by_its_class(shards: Path, tmp_path: Path) -> None:
    target = "pytorch_lightning.profilers.SimpleProfiler"
    run(shards, tmp_path / "run", f"+trainer.profiler={{_target_: {target}, dirpath: '{tmp_path}', filename: times}}")
    assert "run_training_batch" in (tmp_path / "fit-times.txt").read_text()


@pytest.mark.parametrize(
    ("group", "node", "expected"),
    [
        ("callbacks", f"_target_: {__name__}.Hello", "holds parts by name"),
        ("callbacks", "- a", "holds parts by name"),
        ("optimizer", "_target_: torch.optim.Adam", "set optimizer._partial_=true"),
        (
            "lr_schedule",
            "{_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 2}",
            "gives no factor of the learning rate for a step",
        ),
    ],
)
def test_files_of_another_form(shards: Path, tmp_path: Path, group: str, node: str, expected: str) -> None:
    assert expected in refusal(lambda: run(shards, tmp_path / "run", *own_file(tmp_path, group, node)))
    assert not (tmp_path / "run").exists()
