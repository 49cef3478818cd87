"""Muon for hidden matrices and AdamW for the rest: the numbers of torch's optimizers, stepped one by one."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toy_stages import TwoGroups, diffusion_stage, train

from ldmlab import distributed
from ldmlab.app.compose import compose, plain
from ldmlab.backbones.dit import DiT
from ldmlab.backbones.mmdit import MMDiT
from ldmlab.backbones.unet import UNet
from ldmlab.checkpoints import load_checkpoint
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.sharded import laid_out
from ldmlab.training.muon import Joined, MuonAdamW, hidden_matrices
from ldmlab.training.optim import Constant
from ldmlab.training.stage import Stage

HIDDEN = ["blocks.0.weight", "blocks.1.weight"]  # of the toy
muon = partial(diffusion_stage, layers=2, lr_schedule=Constant())


def gradients(stage: Stage, step: int) -> dict[str, Tensor]:
    torch.manual_seed(step)
    return {name: torch.randn_like(p) for name, p in stage.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"matrix_learning_rate": 0.02, "adjust_lr_fn": "original", "nesterov": False, "momentum": 0.8, "ns_steps": 3},
        {"decay_vectors": False, "weight_decay": 0.1},
    ],
    ids=["preset", "original", "undecayed"],
)
def test_the_steps_are_torchs(options: dict[str, Any]) -> None:
    node = plain(compose("train", ["optimizer=muon", "data.train=x", "data.val=x"]))["optimizer"]
    stage = muon(optimizer=instantiate({**node, **options}, where="optimizer", global_batch=8))
    stage.configure_optimizers()
    optimizer = stage.optimizers_by_group()["denoiser"]
    other = muon(optimizer=MuonAdamW(1e-4))
    named = {name: p for name, p in other.named_parameters() if p.requires_grad}
    matrices = [p for name, p in named.items() if name.removeprefix("diffusion.backbone.") in HIDDEN]
    rest = [p for p in named.values() if p not in set(matrices)]
    vectors = [p for p in rest if p.ndim < 2 and not options.get("decay_vectors", True)]
    decay = options.get("weight_decay", 0.01)
    given = {name: options.get(name, value) for name, value in {"nesterov": True, "ns_steps": 5}.items()}
    by_hand = [
        torch.optim.Muon(
            matrices, lr=options.get("matrix_learning_rate", 1e-4), weight_decay=decay,
            momentum=options.get("momentum", 0.95), adjust_lr_fn=options.get("adjust_lr_fn", "match_rms_adamw"),
            **given,
        ),
        torch.optim.AdamW([p for p in rest if p not in set(vectors)], lr=1e-4, weight_decay=decay, fused=True),
        *([torch.optim.AdamW(vectors, lr=1e-4, weight_decay=0.0, fused=True)] if vectors else []),
    ]  # fmt: skip
    for step in range(3):
        drawn = gradients(stage, step)
        for name, p in stage.named_parameters():
            if name in drawn:
                p.grad, named[name].grad = drawn[name].clone(), drawn[name].clone()
        optimizer.step()
        for one in by_hand:
            one.step()
    start = dict(muon().named_parameters())
    for name, p in stage.named_parameters():
        assert torch.equal(p, named[name]) if name in named else not p.requires_grad, name
        assert name not in named or not torch.equal(p, start[name]), name


def test_every_parameter_is_in_one_of_the_two_and_the_start_says_how_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = muon(optimizer=MuonAdamW(1e-3), max_steps=2)
    train(stage, tmp_path / "run")
    groups = stage.optimizers_by_group()["denoiser"].param_groups
    owned = [id(p) for group in groups for p in group["params"]]
    trained = [id(p) for p in stage.parameters() if p.requires_grad]
    assert sorted(owned) == sorted(trained)
    assert [len(group["params"]) for group in groups] == [len(trained) - 2, 2]
    said = capsys.readouterr().out
    assert (
        "denoiser: Muon for hidden matrices; AdamW, learning rate 0.001 (as configured), 2 (0.000128M values) by Muon, "
        in said
    )
    assert f"{len(trained) - 2} (" in said


def test_the_schedule_clipping_and_changed_options_reach_both(tmp_path: Path) -> None:
    """An update of Muon has its rate's size whatever the gradient's, so the momentum shows the clipping."""
    run = tmp_path / "run"
    path = train(diffusion_stage(layers=2, optimizer=MuonAdamW(1e-3), gradient_clip=1e-6, max_steps=6), run)
    saved = load_checkpoint(path)["optimizers"]["denoiser"]
    assert len({group["lr"] for group in saved["param_groups"]}) == 1
    buffers = [state["momentum_buffer"] for state in saved["state"].values() if "momentum_buffer" in state]
    assert len(buffers) == 2
    assert 0 < max(buffer.norm() for buffer in buffers) <= 1e-6
    changed = MuonAdamW(1e-3, matrix_learning_rate=2e-3, momentum=0.5, weight_decay=0.2)
    stage = diffusion_stage(layers=2, optimizer=changed, max_steps=7)
    groups = load_checkpoint(train(stage, run))["optimizers"]["denoiser"]["param_groups"]
    assert groups[1]["lr"] == pytest.approx(2 * groups[0]["lr"])
    assert (groups[1]["momentum"], groups[0]["weight_decay"], groups[1]["weight_decay"]) == (0.5, 0.2, 0.2)


def names_of(network: nn.Module) -> set[str]:
    hidden = hidden_matrices(network)
    return {name for name, p in network.named_parameters() if p in hidden}


def test_first_and_last_layers_embeddings_and_kernels_are_adamws() -> None:
    told: dict[str, Any] = {"in_channels": 4, "out_channels": 4}
    dit = names_of(DiT(**told, width=32, depth=2, heads=2, vector_width=32))
    assert {name.rpartition(".")[0].split(".", 2)[2] for name in dit} == {
        "modulation", "attention.qkv", "attention.out", "mlp.expand", "mlp.out",
    }  # fmt: skip
    mmdit = names_of(MMDiT(**told, width=32, depth=2, heads=2, context_width=8))
    assert mmdit
    unet = UNet(
        **told,
        model_channels=32,
        channel_mult=[1, 2],
        num_res_blocks=1,
        attention_downsampling=[2],
        heads=2,
        context_width=8,
    )
    found = names_of(unet)
    assert found
    for name in (*dit, *mmdit, *found):
        assert not {"patches", "context", "time_expand", "time_mix", "modulation_out"} & {name.split(".")[0]}, name
    assert all(p.ndim == 2 for p in hidden_matrices(unet))
    rows = nn.ModuleList([nn.Embedding(5, 4), nn.Linear(4, 1), nn.Conv1d(4, 4, 1)])
    assert not hidden_matrices(rows)


def test_where_muon_cannot_work_it_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"main has none .* use optimizer=adamw"):
        train(TwoGroups(optimizer=MuonAdamW(1e-3)), tmp_path / "run")
    assert not list((tmp_path / "run").glob("*"))


def sharded(rank: int, world: int) -> None:
    """Parts of matrices with sides that two does not divide, one of them with a single row in the second process."""
    distributed.join()
    torch.manual_seed(0)
    whole = nn.ModuleList(nn.Linear(*sides, bias=False) for sides in ((5, 8), (7, 3), (6, 6)))
    parts = copy.deepcopy(whole)
    for part in parts:
        fully_shard(part, mesh=init_device_mesh("cpu", (world,)))
    factory = MuonAdamW(1e-2, nesterov=False, weight_decay=0.1)
    one, many = (Joined([factory.muon(list(net.parameters()))]) for net in (whole, parts))
    for step in range(4):
        for own, full in zip(parts.parameters(), whole.parameters(), strict=True):
            full.grad = torch.randn_like(full) if step != 1 else None
            own.grad = None if full.grad is None else laid_out(full.grad, own)
        one.step()
        many.step()
        if step == 2:  # as a resumed run continues
            many.load_state_dict(many.state_dict())
    for own, full in zip(parts.parameters(), whole.parameters(), strict=True):
        assert own.to_local().numel() < full.numel()
        assert torch.equal(own.full_tensor(), full)
        assert torch.equal(many.state[own]["momentum_buffer"].full_tensor(), one.state[full]["momentum_buffer"])
    assert len(many.state) == 3


def test_sharded_matrices_have_the_updates_of_whole_ones(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.finish(*forked.group(2, sharded, log=log)) == [0, 0], log.read_text()


@pytest.mark.parametrize(
    "option",
    [{"matrix_learning_rate": 0}, {"momentum": 1.0}, {"ns_steps": 0}, {"ns_steps": 100}, {"adjust_lr_fn": "rms"}],
    ids=str,
)
def test_values_out_of_range_are_refused(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(InputError, match=f"optimizer.{name}="):
        MuonAdamW(1e-3, **option)
