"""Checkpoints of which every process writes its part, read by any number of processes."""

import csv
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toy_stages import Keys, diffusion_stage, train

from ldmlab import checkpoints, distributed, sharded
from ldmlab.checkpoints import inventory, load_checkpoint, save_checkpoint
from ldmlab.errors import InputError
from ldmlab.files import beside, link
from ldmlab.training import checkpointing
from ldmlab.training.checkpointing import Checkpoints, Files


def network(shape: tuple[int, ...]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Sizes that no number of processes divides; one weight has a single row, so most of them hold none of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7), nn.Conv1d(1, 1, 2))
    if shape:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "parts")[-len(shape) :])
        for part in net:
            fully_shard(part, mesh=mesh)
    return net, torch.optim.AdamW(net.parameters(), lr=0.1)


def content_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "modules": {"net": net.state_dict()},
        "optimizers": {"main": optimizer.state_dict()},
        "step": 3,
        "plain": [torch.arange(4)],
    }


def trained(shape: tuple[int, ...]) -> tuple[nn.Module, torch.optim.Optimizer]:
    net, optimizer = network(shape)
    for _ in range(2):
        net[2](net[1](net[0](torch.ones(1, 3)))[:, None]).sum().backward()
        optimizer.step()
    return net, optimizer


def save(rank: int, world: int, path: Path, shape: tuple[int, ...]) -> None:
    """The checkpoint of a sharded network, and the whole tensors beside it, as torch gathers them."""
    distributed.join()
    content = content_of(*trained(shape))
    full = sharded.mapped(content, lambda v, _: v.full_tensor() if isinstance(v, DTensor) else v)
    if rank == 0:
        torch.save(full, path.with_suffix(".full"))
    with Files() as files:
        files.save_checkpoint(content, path, ([], lambda: None))
        for value in content["modules"]["net"].values():
            value.to_local().zero_()  # training goes on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two processes, of which tests change copies."""
    path = tmp_path_factory.mktemp("two") / "step_00000003.ckpt"
    assert forked.finish(*forked.group(2, save, path, (2,))) == [0, 0]
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / folder.name


def full(folder: Path) -> dict[str, Any]:
    return torch.load(folder.with_suffix(".full"), weights_only=True)


def same(read: dict[str, Any], expected: dict[str, Any]) -> None:
    forked.same({name: read[name] for name in expected}, expected)


def test_shards_of_two_processes_are_the_whole_tensors(folder: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == [
        *("shard_00000.safetensors", "shard_00001.safetensors", "state.ckpt"),
    ]
    same(load_checkpoint(folder), full(folder))
    for file in folder.glob("shard*"):
        held = sum(tensor.numel() for tensor in load_file(file).values())
        whole = sum(p.numel() for p in network(())[0].parameters())
        assert held < 0.65 * 3 * whole  # weights and two moments; rows are not split
    assert not list(folder.parent.glob(".*"))


@pytest.mark.slow
def test_hsdp_writes_each_part_once(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    assert forked.finish(*forked.group(4, save, path, (2, 2))) == [0] * 4
    same(load_checkpoint(path), full(path))
    assert [len(load_file(file)) > 0 for file in sorted(path.glob("shard*"))] == [True, True, False, False]


def take_up(rank: int, world: int, path: Path, expected: Path) -> None:
    """Another number of processes reads its own parts and nothing else."""
    distributed.join()
    net, _ = network((world,))
    content = load_checkpoint(path, lazily=True, process=(rank, world))["modules"]["net"]
    read, stored = [], sharded.StoredTensor.read

    def counted(self: sharded.StoredTensor, *box: Any) -> torch.Tensor:
        read.append(stored(self, *box))
        return read[-1]

    sharded.StoredTensor.read = counted  # type: ignore[method-assign]
    whole = torch.load(expected, weights_only=True)["modules"]["net"]
    for name, own in net.state_dict().items():
        own.copy_(sharded.laid_out(content[name], own))
        assert read[-1].shape == own.to_local().shape
        assert torch.equal(own.full_tensor(), whole[name])


def save_twice(rank: int, world: int, path: Path) -> None:
    """As a stop does, which saves at once and at the end of the step; the first process is slow with the rename."""
    distributed.join()
    content, put = content_of(*trained((2,))), checkpointing.put
    checkpointing.put = lambda *paths: (time.sleep(0.5), put(*paths))  # type: ignore[assignment,func-returns-value]
    with Files() as files:
        for step in (3, 4):
            files.save_checkpoint({**content, "step": step}, path, ([], lambda: None))


def test_a_path_is_saved_again_only_when_all_have_written_it(tmp_path: Path) -> None:
    path, log = tmp_path / "a.ckpt", tmp_path / "log"
    assert forked.finish(*forked.group(2, save_twice, path, log=log)) == [0, 0], log.read_text()
    assert load_checkpoint(path)["step"] == 4
    assert sorted(tmp_path.iterdir()) == [path, log]


def test_three_processes_take_up_what_two_saved(folder: Path) -> None:
    assert forked.finish(*forked.group(3, take_up, folder, folder.with_suffix(".full"))) == [0] * 3


def test_any_box_is_read(folder: Path) -> None:
    weight = full(folder)["modules"]["net"]["1.weight"]  # (7, 5)
    stored = load_checkpoint(folder, lazily=True)["modules"]["net"]["1.weight"]
    for begin, shape in (((0, 0), (7, 5)), ((2, 1), (3, 2)), ((6, 4), (1, 1)), ((3, 0), (0, 5))):
        box = tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))
        assert torch.equal(stored.read(begin, shape), weight[box])


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda c: spoil(c / "shard_00001.safetensors"), "its shard_00001.safetensors is damaged"),
        (lambda c: (c / "shard_00000.safetensors").unlink(), "its shard_00000.safetensors is missing"),
        (lambda c: (c / "state.ckpt").unlink(), "state.ckpt does not exist"),
        (lambda c: shutil.copy(c / "shard_00000.safetensors", c / "shard_00001.safetensors"), "damaged"),
    ],
    ids=["a flipped bit", "no shard", "not complete", "exchanged"],
)
@pytest.mark.parametrize("lazily", [True, False])
def test_damage_is_named(copy: Path, damage: Any, sentence: str, lazily: bool) -> None:
    damage(copy)
    with pytest.raises(InputError, match=sentence):
        load_checkpoint(copy, lazily=lazily)


def vouched(folder: Path, **changes: Any) -> None:
    """As whoever gives the folder away would write it."""
    content = torch.load(folder / "state.ckpt", weights_only=True)
    del content["inventory"]
    content["shards"] = {f.name: sharded.mark(f) for f in folder.glob("shard*")}
    content |= changes
    save_checkpoint(folder / "state.ckpt", {**content, "inventory": inventory(content)})


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("it_ran",)


def test_a_strangers_folder_runs_nothing_and_reads_nothing_else(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    shard = copy / "shard_00001.safetensors"
    tensors = load_file(shard)
    (name,) = (name for name in tensors if name.startswith("/modules/net/1.weight@"))
    for other in ("@99,0", "@-1,0", "@0", "@0,0,0", "@nonsense", "@", "", "@0,0"):
        save_file({name.partition("@")[0] + other if n == name else n: t for n, t in tensors.items()}, shard)
        vouched(copy)
        with pytest.raises(InputError, match="cannot be read as a checkpoint"):
            load_checkpoint(copy)
    for names in (["../shard_00001.safetensors"], {"../../etc/passwd": [1, 1]}, None, {1: [1, 1]}):
        vouched(copy, shards=names)
        with pytest.raises(InputError, match="lists no shards"):
            load_checkpoint(copy)
    for file in (shard, copy / "state.ckpt"):
        kept = file.read_bytes()
        file.write_bytes(pickle.dumps(Evil()))
        if file is shard:
            vouched(copy)
        with pytest.raises(InputError, match="cannot be read as a checkpoint"):
            load_checkpoint(copy)
        file.write_bytes(kept)
    assert not Path("it_ran").exists()
    save_checkpoint(copy.parent / "plain.ckpt", {"weight": torch.empty(3, device="meta")})
    with pytest.raises(InputError, match="lacks parts of /weight"):
        load_checkpoint(copy.parent / "plain.ckpt")


def die(rank: int, world: int, path: Path) -> None:
    """The second process is killed while it writes a second checkpoint over the first."""
    write = checkpoints.safetensors.torch.save_file
    if rank == 1:

        def half(tensors: Any, file: Path, metadata: Any) -> None:
            write(tensors, file, metadata)
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoints.safetensors.torch.save_file = half
    try:
        save(rank, world, path, (2,))
    except InputError as error:
        path.with_suffix(".said").write_text(str(error))
        raise SystemExit(3) from None


def test_a_kill_while_a_shard_is_written_leaves_the_one_before(copy: Path) -> None:
    before = load_checkpoint(copy)
    assert forked.finish(*forked.group(2, die, copy)) == [3, -signal.SIGKILL]
    forked.same(load_checkpoint(copy), before)
    assert "was not written" in copy.with_suffix(".said").read_text()
    assert not list(copy.parent.glob(".*"))


class Slow(pl.Callback):
    """Gives the test time to kill."""

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(0.02)


class Sharded(pl.Callback):
    """That no process holds or reads more than its part, but for the sizes that are odd."""

    def __init__(self, share: float) -> None:
        self.share, self.read, self.stored = share, 0, sharded.StoredTensor.read
        sharded.StoredTensor.read = self._count  # type: ignore[method-assign]

    @property
    def _count(self) -> Any:
        def read(stored: sharded.StoredTensor, *box: Any) -> torch.Tensor:
            part = self.stored(stored, *box)
            self.read += part.numel()
            return part

        return read

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        sharded.StoredTensor.read = self.stored  # type: ignore[method-assign]
        own = sum(p.numel() for p in pl_module.parameters())
        assert self.read <= 4.5 * own * self.share  # weights, averages and two moments


def fsdp(rank: int, world: int, run: Path, steps: int, accumulate: int = 1, slow: bool = False) -> None:
    """A run of 8 images a step over any number of processes."""
    callbacks = [Keys(run.with_suffix(f".{world}.{rank}")), Sharded(1 if world == 1 else 1.25 / world)]
    callbacks += [Slow()] if slow else []
    given = {"max_steps": steps, "dropout": 0.3 if slow else 0.0, "accumulate": accumulate}
    every = {"log_every": 1, "validate_every": 3, "keep": 9, "strategy": "fsdp"}
    train(diffusion_stage(**given), run, 8 // world // accumulate, world, rank, callbacks, **every)


def go(world: int, run: Path, steps: int, *options: Any) -> Path:
    log = run.with_suffix(".log")
    assert forked.finish(*forked.group(world, fsdp, run, steps, *options, log=log)) == [0] * world, log.read_text()
    return run / "checkpoints" / f"step_{steps:08d}.ckpt"


def cut(run: Path, copy: Path, step: int) -> Path:
    """The run as it was when this step was its last one."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.partition("step_")[2][:8]) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return copy


def losses(run: Path) -> dict[int, float]:
    with open(run / "metrics.csv", newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def close(one: Any, other: Any, path: str = "") -> None:
    """Equal but for the order of sums over images; network dropout is off."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for name in one:
            close(one[name], other[name], f"{path}/{name}")
    elif torch.is_tensor(one):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=lambda text: f"{path}: {text}")


def went_on(one: Path, other: Path) -> None:
    """Two runs made the same steps of the same images."""
    a, b = (load_checkpoint(run / "checkpoints" / "step_00000009.ckpt") for run in (one, other))
    assert a["position"] == b["position"] == 72
    for part in ("modules", "averaged", "optimizers"):
        close(a[part], b[part])
    before, now = losses(one), losses(other)
    assert sorted(now) == sorted(before) == list(range(1, 10))
    assert [now[step] for step in range(1, 10)] == pytest.approx([before[step] for step in range(1, 10)], abs=1e-5)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine steps over two processes."""
    run = tmp_path_factory.mktemp("straight") / "run"
    path = go(2, run, 9)
    assert {p.name for p in path.iterdir()} == {"shard_00000.safetensors", "shard_00001.safetensors", "state.ckpt"}
    (best,) = path.parent.glob("best*")
    step = path.parent / best.name[5:18]
    assert all((best / f.name).samefile(f) for f in step.with_suffix(".ckpt").iterdir())
    return run


def test_two_processes_go_on_bit_for_bit(straight: Path, tmp_path: Path) -> None:
    go(2, cut(straight, tmp_path / "run", 6), 9)
    one, other = (load_checkpoint(r / "checkpoints" / "step_00000009.ckpt") for r in (straight, tmp_path / "run"))
    forked.same(one, other)


def test_one_process_goes_on_from_two(straight: Path, tmp_path: Path) -> None:
    run = cut(straight, tmp_path / "run", 6)
    go(1, run, 9)
    assert (run / "checkpoints" / "step_00000009.ckpt").is_file()
    went_on(straight, run)


def test_the_newest_that_is_whole_is_taken_and_old_ones_go(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = Checkpoints(cut(straight, tmp_path / "run", 9) / "checkpoints", keep=2)
    spoil(kept.path(9) / "shard_00001.safetensors")
    (kept.path(6) / "shard_00000.safetensors").unlink()
    path, content = kept.newest() or (None, {})
    assert (path, content["step"]) == (kept.path(3), 3)
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(" (its ")[2] for line in told] == [
        "shard_00001.safetensors is damaged: the checksum differs); use another one. Trying the one before it.",
        "shard_00000.safetensors is missing); use another one. Trying the one before it.",
    ]
    note = {"name": "loss", "value": 0.5, "step": 9}
    link(kept.path(3), kept.best_path(note))
    assert load_checkpoint(kept.best_path(note))["step"] == 3
    beside(kept.path(12)).mkdir()  # of a process that was killed
    kept.prune(note)
    kept.sweep()
    assert sorted(path.name for path in kept.folder.iterdir()) == [
        *("best_step_00000009_loss_0.5.ckpt", "step_00000006.ckpt", "step_00000009.ckpt"),
    ]


@pytest.mark.slow
def test_four_two_and_one_process(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(4, run, 3)
    go(2, run, 6)
    go(1, run, 9)
    went_on(straight, run)
    run = tmp_path / "back"
    go(1, run, 3)
    go(2, run, 6, 2)
    go(4, run, 9, 2)
    went_on(straight, run)


@pytest.mark.slow
def test_killed_processes_go_on_bit_for_bit(tmp_path: Path) -> None:
    go(2, tmp_path / "straight", 12, 2, True)
    run, log = tmp_path / "killed", tmp_path / "killed.log"
    moments = random.Random(0)
    keys = run.with_suffix(".2.1")
    for _ in range(3):
        children = forked.group(2, fsdp, run, 12, 2, True, log=log)
        start = len(keys.read_text().splitlines()) if keys.exists() else 0
        while children[0].is_alive() and (not keys.exists() or len(keys.read_text().splitlines()) < start + 7):
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
        assert forked.finish(*children) == [-signal.SIGKILL] * 2, log.read_text()
    go(2, run, 12, 2, True)
    assert log.read_text().count("resuming from step") > 1
    forked.same(*(load_checkpoint(r / "checkpoints" / "step_00000012.ckpt") for r in (tmp_path / "straight", run)))
