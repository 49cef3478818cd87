"""Speed of a run: its devices, its products, and the process that the others wait for."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from toy_stages import TwoGroups, train

from ldmlab import distributed
from ldmlab.nn.cards import CARDS, card_named
from ldmlab.training.callbacks import throughput
from ldmlab.training.callbacks.throughput import ForwardTime, StepFlops, Throughput
from ldmlab.training.loggers import read_metrics


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA B200", "b200"),
    ],
)
def test_cards_are_known_by_the_names_that_torch_gives(name: str, card: str | None) -> None:
    assert card_named(name) is (CARDS[card] if card else None)


def program(text: str) -> list[str]:
    """One that counts FLOPs: `given` is what it gets."""
    return [sys.executable, "-c", f"import json, sys; given = json.load(sys.stdin); {text}"]


def counted(flops: StepFlops, stage: Any) -> float | None:
    """What is found in the end."""
    deadline = time.monotonic() + 60
    while flops._process is not None and time.monotonic() < deadline:
        flops.of(stage)
        time.sleep(0.01)
    return flops.of(stage)


def test_flops_are_counted_beside_the_run_and_again_for_steps_of_another_kind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flops = StepFlops(program("print('a warning'); print(given['step'] * given['config']['each'])"), {"each": 2e12})
    stage = SimpleNamespace(step=3, phase=("main",))
    assert flops.of(stage) is None  # not yet
    assert counted(flops, stage) == 6e12
    stage.step = 5
    assert flops.of(stage) == 6e12
    stage.phase = ("main", "opponent")
    assert flops.of(stage) is None
    assert counted(flops, stage) == 1e13
    broken = StepFlops(program("sys.exit('stage=mine has no step of its own')"), {})
    broken.of(stage)
    assert counted(broken, stage) is None
    assert "cannot be counted: stage=mine has no step of its own" in capsys.readouterr().err
    assert broken._process is None  # and it is not tried again
    endless = StepFlops(program("import time; time.sleep(600)"), {})
    endless.of(stage)
    process: Any = endless._process
    endless.close()
    assert process.returncode == -9


@pytest.mark.parametrize(("name", "share"), [("NVIDIA H100 80GB HBM3", 100 / 989), ("a card of tomorrow", None)])
def test_products_are_a_share_of_the_data_sheet(
    name: str, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    row: dict[str, float] = {}
    made = Throughput(flops=SimpleNamespace(of=lambda stage: 5e11))  # type: ignore[arg-type]
    made._start = time.perf_counter() - 2 * throughput._COUNTED_AFTER_SECONDS
    trainer = SimpleNamespace(precision="bf16-mixed")
    made._log_products(SimpleNamespace(device=torch.device("cuda"), trainer=trainer, log=row.__setitem__), 200.0)
    assert row.pop("speed/tflops_per_device") == 100
    assert row == ({"speed/mfu": pytest.approx(share)} if share else {})


def unequal(rank: int, world: int, out: Path) -> None:
    """Rank 1 needs 3 seconds a row, rank 0 one."""
    distributed.join()
    ForwardTime.take = lambda self: 1.0 + 2.0 * rank  # type: ignore[method-assign]
    train(TwoGroups(max_steps=4), out, micro=2, world=world, rank=rank, callbacks=[Throughput()], log_every=2)


def test_the_slowest_process_is_named(tmp_path: Path) -> None:
    assert forked.finish(*forked.group(2, unequal, tmp_path / "run")) == [0, 0]
    row = read_metrics(tmp_path / "run" / "metrics.csv")[1][-1]
    assert float(row["speed/slowest_rank"]) == 1
    assert float(row["speed/slowest_rank_seconds"]) == pytest.approx(1.5, abs=0.5)  # of 2 steps, and waiting for data
    assert float(row["speed/mean_rank_seconds"]) == pytest.approx(1.0, abs=0.5)
    one, each = (float(row[f"speed/images_per_second{name}"]) for name in ("", "_and_device"))
    assert one == pytest.approx(2 * each)


def test_forward_passes_are_timed_to_the_first_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(100))
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: float(next(times))))
    forward = ForwardTime()
    for _ in range(3):
        forward.start(torch.device("cpu"))
        forward.stop()
        forward.stop()  # of another optimizer group
    assert forward.take() == 3
    assert forward.take() == 0
