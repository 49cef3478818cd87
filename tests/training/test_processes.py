"""Splitting a step over processes or micro-batches changes nothing but its speed."""

import cProfile
import datetime
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from toy_stages import TwoGroups, diffusion_stage, image_batch, options, train

from ldmlab import distributed
from ldmlab.build import pick_device
from ldmlab.checkpoints import load_checkpoint
from ldmlab.errors import InputError
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.instantiate import instantiate
from ldmlab.losses.autoencoder_loss import AutoencoderLoss
from ldmlab.training import optimizer_groups
from ldmlab.training.autoencoder_module import AutoencoderStage
from ldmlab.training.engine import Launched, make_trainer
from ldmlab.training.optimizer_groups import MeanGradients
from ldmlab.training.run_folder import RunFolder
from ldmlab.training.settings import TrainerSettings
from ldmlab.training.stage import Stage


def descent(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain descent: the weights' change is the gradient, which Adam would divide away."""
    return torch.optim.SGD(parameters, lr=0.1)


def diffusion(accumulate: int) -> Stage:
    return diffusion_stage(max_steps=5, accumulate=accumulate, optimizer=descent, gradient_clip=None)


def two_groups(accumulate: int) -> Stage:
    return TwoGroups(max_steps=5, accumulate=accumulate, optimizer=descent, gradient_clip=None)


def member(rank: int, world: int, make: Callable[[int], Stage], folder: Path, micro: int, accumulate: int) -> None:
    train(make(accumulate), folder, micro, world, rank)


def weights(path: Path) -> dict[str, Any]:
    return load_checkpoint(path / "checkpoints" / "step_00000005.ckpt")


def assert_close(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert (a["step"], a["position"]) == (b["step"], b["position"]) == (5, 40)
    for name, module in a["modules"].items():
        for key, value in module.items():
            torch.testing.assert_close(value, b["modules"][name][key], rtol=0, atol=1e-5)
    for name, average in a["averaged"].items():
        assert average["updates"] == b["averaged"][name]["updates"] == 5
        for key, value in average["weights"].items():
            torch.testing.assert_close(value, b["averaged"][name]["weights"][key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [diffusion, two_groups])
def test_two_processes_of_four_are_one_of_eight(make: Callable[[int], Stage], tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.finish(*forked.group(2, member, make, tmp_path / "two", 4, 1, log=log)) == [0, 0], log.read_text()
    train(make(1), tmp_path / "one", 8)
    assert_close(weights(tmp_path / "one"), weights(tmp_path / "two"))
    table = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("one", "two")]
    loss_one, loss_two = (float(lines[1].split(",")[1]) for lines in table)
    assert loss_one == pytest.approx(loss_two, abs=1e-5)  # logged numbers are means over processes


@pytest.mark.parametrize("make", [diffusion, two_groups])
def test_four_micro_batches_of_two_are_one_of_eight(make: Callable[[int], Stage], tmp_path: Path) -> None:
    train(make(4), tmp_path / "four", 2)
    train(make(1), tmp_path / "one", 8)
    assert_close(weights(tmp_path / "one"), weights(tmp_path / "four"))


def test_both_at_once(tmp_path: Path) -> None:
    assert forked.finish(*forked.group(2, member, diffusion, tmp_path / "both", 2, 2, log=tmp_path / "log")) == [0, 0]
    train(diffusion(1), tmp_path / "one", 8)
    assert_close(weights(tmp_path / "one"), weights(tmp_path / "both"))


def own_strategy(rank: int, world: int, make: Callable[[int], Stage], folder: Path) -> None:
    strategy = {"_target_": "pytorch_lightning.strategies.DDPStrategy", "find_unused_parameters": False}
    node = {"_target_": "ldmlab.training.settings.TrainerSettings", "max_steps": 1, "micro_batch": 4}
    built = instantiate({**node, "strategy": strategy}, where="trainer", trust=True).strategy  # typed
    assert isinstance(built, DDPStrategy)
    train(make(1), folder, 4, world, rank, strategy=built)


@pytest.mark.slow
def test_a_strategy_of_lightning_by_its_target(tmp_path: Path) -> None:
    """As `trainer.strategy={_target_: ...}` gives it."""
    log = tmp_path / "log"
    assert forked.finish(*forked.group(2, own_strategy, diffusion, tmp_path / "two", log=log)) == [0, 0], (
        log.read_text()
    )
    train(diffusion(1), tmp_path / "one", 8)
    assert_close(weights(tmp_path / "one"), weights(tmp_path / "two"))


def create(rank: int, world: int, root: Path) -> None:
    run = RunFolder.create(root, "toy")
    run.begin()
    (root / f"told.{rank}").write_text(f"{run.path} {run.run_id}")
    distributed.barrier()


def test_two_processes_make_one_folder(tmp_path: Path) -> None:
    assert forked.finish(*forked.group(2, create, tmp_path)) == [0, 0]
    assert len(list(tmp_path.glob("toy-*"))) == 1
    assert (tmp_path / "told.0").read_text() == (tmp_path / "told.1").read_text()


def refused(rank: int, world: int, folder: Path) -> None:
    with pytest.raises(InputError, match="holds other files"):
        RunFolder.at(folder)
    assert distributed.shared(lambda: rank) == 0
    assert distributed.gather(rank) == [0, 1]
    summed = distributed.sum_(torch.tensor([1.0 + rank]))
    assert (summed.item(), distributed.largest_(torch.tensor(rank)).item()) == (3.0, 1)


def test_a_refusal_reaches_every_process(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    assert forked.finish(*forked.group(2, refused, tmp_path)) == [0, 0]


def some_gradients(rank: int, world: int) -> None:
    distributed.join()
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(2))]
    parameters[0].grad = torch.full((3, 2), float(rank))
    parameters[1].grad = torch.arange(5.0) * rank
    if rank == 0:  # the last one was reached by one process only
        parameters[2].grad = torch.ones(2)
    means = MeanGradients(parameters)
    with means.during():
        pass
    means.wait()
    assert [p.grad.tolist()[-1] for p in parameters] == [[0.5, 0.5], 2.0, 0.5]


def overlapped(rank: int, world: int) -> None:
    """Buckets of two layers leave, in one order, while the layers below are still to come; one process skips some."""
    distributed.join()
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(6)))
    events, sums = [], torch.distributed.all_reduce

    def all_reduce(tensor: torch.Tensor, **options: Any) -> Any:
        events.append(f"sum of {len(tensor)}")
        return sums(tensor, **options)

    torch.distributed.all_reduce = all_reduce
    for index, layer in enumerate(layers):
        layer.register_full_backward_hook(lambda *_, index=index: events.append(f"layer {index}"))
    means = MeanGradients(list(layers.parameters()))
    for _ in range(2):
        events.clear()
        path = layers if rank == 0 else layers[:3]  # on rank 1 the loss does not reach the upper layers
        with means.during():
            path(torch.full((1, 4), 1.0 + rank, requires_grad=True)).sum().backward()
        assert events.count("sum of 32") == 3
        if rank == 0:
            assert events.index("sum of 32") < events.index("layer 1")
        means.wait()
        own = [p.grad.clone() for p in layers.parameters()]
        for mine, other in zip(own, distributed.gather(own)[1 - rank], strict=True):
            assert torch.equal(mine, other)
        assert own[5].abs().sum() > 0


def linear(rank: int, world: int) -> None:
    """Collectives and visits of parameters grow with their number, not with its square."""
    distributed.join()
    calls = []
    for count in (100, 1000):
        parameters = [nn.Parameter(torch.ones(4)) for _ in range(count)]
        with cProfile.Profile() as profile:
            means = MeanGradients(parameters)
            with means.during():
                sum(p.sum() for p in parameters).backward()
            means.wait()
        calls.append(sum(entry.callcount for entry in profile.getstats()))
        assert len(means._buckets) == count / 10
    assert calls[1] < 11 * calls[0]


@pytest.mark.parametrize(("check", "bucket"), [(some_gradients, 7), (overlapped, 32), (linear, 40)])
def test_gradients_are_averaged_in_buckets(check: Any, bucket: int, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(optimizer_groups, "_BUCKET_ELEMENTS", bucket)
    log = tmp_path / "log"
    assert forked.finish(*forked.group(2, check, log=log)) == [0, 0], log.read_text()


def first_stage() -> Stage:
    torch.manual_seed(2)
    network = KLAutoencoder(channels=8, channel_mult=[1, 2], num_res_blocks=1, latent_channels=2, norm_groups=4)
    loss = AutoencoderLoss(penalty_weights={"kl": 1e-6}, lpips_weight=0.0, reduction="mean", logvar="fixed")
    return AutoencoderStage(first_stage=network, loss=loss, **options())


def panels_of(rank: int, world: int, make: Callable[[], Stage], count: int, folder: Path) -> None:
    """Panels from the first `count` validation images, of which every process reads its own."""
    if world > 1:
        distributed.join()
    stage = make().eval()
    calls, network = [], next(m for m in stage.modules() if isinstance(m, nn.Conv2d))
    network.register_forward_hook(lambda *_: calls.append(1))
    own = [[p] for p in range(rank, count, world)]
    with torch.no_grad():
        panels = stage.panels({**image_batch(range(p[0], p[0] + 1)), "skipped": ["bad"]} for p in own)
    torch.save({"panels": panels, "labels": stage.panel_labels, "calls": len(calls)}, folder / f"{world}_{rank}.pt")
    distributed.leave()


@pytest.mark.parametrize("make", [diffusion_stage, first_stage])
@pytest.mark.parametrize("count", [7, 1])  # with one image the second process has none of its own
def test_panels_do_not_depend_on_processes(make: Callable[[], Stage], count: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.finish(*forked.group(2, panels_of, make, count, tmp_path, log=log)) == [0, 0], log.read_text()
    panels_of(0, 1, make, count, tmp_path)
    one, two, other = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert one["panels"].keys() == two["panels"].keys()
    for name, images in one["panels"].items():
        assert torch.equal(images, two["panels"][name])
        assert torch.equal(images, other["panels"][name])
    assert one["labels"] == two["labels"]
    assert one["calls"] == two["calls"] == other["calls"]  # also where a strategy shards the weights


def test_srun_is_understood_and_a_batch_script_is_not_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    for name, value in (("STEP_NUM_TASKS", "8"), ("PROCID", "5"), ("LOCALID", "1"), ("NTASKS_PER_NODE", "4")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert (distributed.rank(), distributed.world_size()) == (5, 8)
    assert (distributed.local_rank(), distributed.local_world_size()) == (1, 4)
    assert Launched().node_rank() == 1


@pytest.mark.parametrize(("counts", "node", "local"), [("8(x2)", "1", 8), ("4,3(x2)", "0", 4), ("4,3(x2)", "2", 3)])
def test_srun_without_tasks_per_node(counts: str, node: str, local: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("STEP_NUM_TASKS", "16"), ("PROCID", "9"), ("LOCALID", "1"), ("STEP_TASKS_PER_NODE", counts)):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NODEID", node)
    assert distributed.local_world_size() == local
    assert Launched().node_rank() == 9 // local


@pytest.mark.parametrize(("visible", "own"), [(1, 0), (4, 3), (0, 3)])
def test_each_process_has_a_device_of_those_it_sees(visible: int, own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    assert Launched().local_rank() == own
    assert pick_device("auto") == (torch.device("cuda", own) if visible else torch.device("cpu"))


@pytest.mark.slow
def test_srun_without_the_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(distributed, "_at_a_terminal", lambda: False)
    monkeypatch.setattr(distributed, "_MEETING", datetime.timedelta(seconds=1))
    with pytest.raises(InputError, match="SLURM_STEP_NUM_TASKS=2, but not all of these processes connected"):
        distributed.join()
    assert not distributed.joined()


@pytest.mark.parametrize("own", [0, 1])
def test_torchrun_without_the_others_is_refused_in_minutes(own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"RANK": own, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "_MEETING", datetime.timedelta(seconds=0.5))
    with pytest.raises(InputError, match="the 2 processes of this run did not find each other"):
        distributed.join()
    assert not distributed.joined()


@pytest.mark.parametrize(("name", "value"), [("SLURM_JOB_NAME", "bash"), ("SLURM_PTY_PORT", "4711"), ("", "")])
def test_an_interactive_shell_is_not_a_group(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setattr(distributed, "_at_a_terminal", lambda: not name)
    if name:
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"interactive shell.*srun -n4"):
        distributed.join()


@pytest.mark.parametrize("value", ["", "four", "-1", "2.0"])
def test_a_variable_that_is_no_number_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(InputError, match=f"WORLD_SIZE={value} is no number"):
        distributed.join()


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK=5 must be below WORLD_SIZE=2"),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID=2 must be below SLURM_STEP_NUM_TASKS=2"),
    ],
)
def test_variables_that_no_launcher_sets_are_named(
    names: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_at_a_terminal", lambda: False)
    with pytest.raises(InputError, match=sentence):
        distributed.join()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12],cpu1", "gpu07"), ("a1,b2", "a1"), ("rack-[3]", "rack-3"), ("r[1-2]n[01-16]", "r1n01"), ("x", "x")],
)
def test_srun_meets_on_the_first_machine(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NODELIST", nodes)
    assert distributed._first_host() == first


def test_devices_that_nobody_started_are_refused() -> None:
    settings = TrainerSettings(max_steps=1, micro_batch=1, devices=4)
    with pytest.raises(InputError, match=r"trainer.devices=4 but 1 .* torchrun --nproc_per_node=4"):
        make_trainer(TwoGroups(), settings)


def test_provenance_tells_what_a_run_is(tmp_path: Path) -> None:
    train(TwoGroups(max_steps=1), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert {"run_id", "command", "commit", "packages"} <= record.keys()
