"""Asked to stop, a run finishes its step, saves, prints how to resume, and resumes."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import pytorch_lightning as pl
import torch
from test_resume import rows
from toy_stages import TwoGroups, diffusion_stage, endless, settings, train

from ldmlab import distributed
from ldmlab.checkpoints import load_checkpoint
from ldmlab.training.data_module import Batches
from ldmlab.training.fit import fit
from ldmlab.training.run_folder import RunFolder
from ldmlab.training.signals import StopRequest


class Pace(pl.Callback):
    """Slow steps; tells the parent when training has begun."""

    def __init__(self, started: Path) -> None:
        self.started = started

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.started.touch()
        time.sleep(0.03)


def endless_run(folder: Path, world_rank: tuple[int, int] = (1, 0)) -> None:
    world, rank = world_rank
    stage = diffusion_stage(max_steps=100_000, accumulate=2)
    train(stage, folder, 2, world, rank, callbacks=[Pace(folder.parent / f"started.{rank}")], checkpoint_every=50_000)


def member(rank: int, world: int, folder: Path) -> None:
    endless_run(folder, (world, rank))


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_saves_says_how_to_go_on_and_is_the_exit_code(number: signal.Signals, tmp_path: Path) -> None:
    child = forked.start(endless_run, tmp_path / "run", log=tmp_path / "log")
    wait_for(tmp_path / "started.0")
    time.sleep(0.1)
    os.kill(child.pid, number)
    assert forked.finish(child) == [128 + number]
    said = (tmp_path / "log").read_text()
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = load_checkpoint(path)["step"]
    assert f"saved step {step} in {path}; resume with: python train.py run.dir=here" in said
    assert "Traceback" not in said
    stage = diffusion_stage(max_steps=step + 2, accumulate=2)
    train(stage, tmp_path / "run", 2)
    assert (stage.step, stage.position) == (step + 2, (step + 2) * 4)


def test_a_signal_that_arrives_while_the_processes_agree_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)

    def meanwhile(answers: torch.Tensor) -> torch.Tensor:
        if step == 1:
            stop._note(signal.SIGUSR1, None)
        return answers

    monkeypatch.setattr(distributed, "largest_", meanwhile)
    stopping = []
    for step in (1, 2):
        stop._agree(step, torch.device("cpu"))
        stopping.append((stop.stopping, stop.interrupted))
    assert stopping == [(False, False), (True, True)]  # as soon as the others know
    assert stop.signal == signal.SIGUSR1


def test_the_handler_before_training_is_called_after_it_saved() -> None:
    """Such as submitit's, which puts the job into the queue again; Python's own of Ctrl-C is none."""
    called: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: called.append(number))
    try:
        for number in (signal.SIGUSR2, signal.SIGINT):
            with StopRequest() as stop:
                os.kill(os.getpid(), number)
            assert stop.signal == number
            stop.pass_on()
        assert called == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


class KilledLater(pl.Callback):
    """A signal in step 4, as the scheduler sends it; in step 5, once the state is saved, its kill."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.step_complete and pl_module.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        if pl_module.step_complete and pl_module.step == 5:
            trainer.strategy.checkpoint_io.wait()
            os.kill(os.getpid(), signal.SIGKILL)


def killed_later(folder: Path) -> None:
    train(diffusion_stage(dropout=0.3), folder, callbacks=[KilledLater()])


def test_what_a_signal_saves_at_once_is_the_whole_step(tmp_path: Path) -> None:
    assert forked.finish(forked.start(killed_later, tmp_path / "run")) == [-signal.SIGKILL]
    assert (tmp_path / "run" / "checkpoints" / "step_00000005.ckpt").exists()
    runs = [load_checkpoint(train(diffusion_stage(dropout=0.3), tmp_path / name)) for name in ("run", "straight")]
    for part in ("modules", "averaged", "optimizers", "rng"):
        forked.same(runs[0][part], runs[1][part])


class KilledInValidation(pl.Callback):
    """A signal that is agreed upon in step 6, whose validation is due; inside it, the kill."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.step_complete and pl_module.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        trainer.strategy.checkpoint_io.wait()
        os.kill(os.getpid(), signal.SIGKILL)


def killed_in_validation(folder: Path) -> None:
    train(diffusion_stage(dropout=0.3), folder, callbacks=[KilledInValidation()], log_every=3)


def test_a_validation_that_a_kill_ended_is_made_up_for(tmp_path: Path) -> None:
    assert forked.finish(forked.start(killed_in_validation, tmp_path / "run")) == [-signal.SIGKILL]
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000006.ckpt")["unvalidated"]
    paths = [train(diffusion_stage(dropout=0.3), tmp_path / name, log_every=3) for name in ("run", "straight")]
    forked.same(*(load_checkpoint(path) for path in paths))
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    assert [row["step"] for row in rows(tmp_path / "run") if row["val/loss"]] == ["6", "12"]


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    class Stuck(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            (tmp_path / "started").touch()
            time.sleep(60)

    child = forked.start(lambda: train(TwoGroups(), tmp_path / "run", callbacks=[Stuck()]))
    wait_for(tmp_path / "started")
    for _ in range(2):
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.2)
    assert forked.finish(child, seconds=10) == [-signal.SIGINT]


def test_two_processes_agree_when_one_is_asked(tmp_path: Path) -> None:
    children = forked.group(2, member, tmp_path / "run", log=tmp_path / "log")
    for rank in (0, 1):
        wait_for(tmp_path / f"started.{rank}")
    os.kill(children[1].pid, signal.SIGUSR1)
    assert forked.finish(*children) == [128 + signal.SIGUSR1] * 2, (tmp_path / "log").read_text()
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    content = load_checkpoint(path)
    assert content["position"] == content["step"] * 8
    assert len(content["rng"]) == 2


def test_loader_workers_that_die_of_the_same_signal_lose_no_step(tmp_path: Path) -> None:
    def batches(position: int) -> Any:
        for index, batch in enumerate(endless(position, 4)):
            if index == 5:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
            yield batch

    run = RunFolder.at(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        fit(TwoGroups(), Batches(batches), run=run, settings=settings(checkpoint_every=100))
    assert end.value.code == 128 + signal.SIGTERM
    names = [p.name for p in run.checkpoints.iterdir()]
    assert len(names) == 1
    assert names[0] in ("step_00000004.ckpt", "step_00000005.ckpt")  # one batch is fetched ahead


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_processes_agree_by_time_and_the_clock_asks_for_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    clock = [0.0]

    def largest(answer: torch.Tensor) -> torch.Tensor:
        asked.append(step)
        return answer

    monkeypatch.setattr("ldmlab.training.signals.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "largest_", largest)
    monkeypatch.setattr(torch, "tensor", lambda values, device: torch.as_tensor(values))
    stop, saved = StopRequest(save_every_minutes=1), []
    for step in range(1, 101):
        clock[0] += 1.0  # seconds a step
        stop._agree(step, torch.device("cuda"))
        saved += [step] if stop.save_due else []
    assert asked == [1, *range(6, 101, 5)]
    assert saved == [61]
    stop.signal = signal.SIGTERM
    stop._agree(101, torch.device("cuda"))
    assert stop.stopping
