"""Compiled networks: the same numbers, every network of every stage, and no graph that is made again."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked  # noqa: F401 - before the first graph
import pytest
import pytorch_lightning as pl
import test_autoencoder_module
import test_clip_module
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from toy_stages import diffusion_stage, image_batch, train

from ldmlab.backbones.dit import DiT
from ldmlab.backbones.mmdit import MMDiT
from ldmlab.backbones.unet import UNet
from ldmlab.checkpoints import load_checkpoint
from ldmlab.errors import InputError
from ldmlab.inference.model import LoadedModel
from ldmlab.losses.patch_discriminator import PatchDiscriminator
from ldmlab.nn import compiling
from ldmlab.nn.compiling import compile_regions, region, regions, wanted
from ldmlab.training.engine import Compiled, check_graphs
from ldmlab.training.stage import Stage
from sampling_models import tiny_model


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts graphs, and runs them without a compiler to wait for."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiling, "BACKEND", counter)
    return counter


class Graphs(pl.Callback):
    """The number of graphs after every step, its validation included."""

    def __init__(self, counter: CompileCounterWithBackend) -> None:
        self.counter, self.seen = counter, list[int]()

    def on_train_batch_start(self, *_: Any) -> None:
        self.seen.append(self.counter.frame_count)


def denoiser(**changes: Any) -> Stage:
    """A U-Net on 8 x 8 pixels, recomputed in the backward pass."""
    made = diffusion_stage(**changes)
    torch.manual_seed(4)
    options: dict[str, Any] = {"heads": 2, "gradient_checkpointing": True, "vector_width": 4, "dropout": 0.1}
    made.diffusion.backbone = UNet(3, 3, 32, [1, 2], 1, [2], **options)
    nn.init.normal_(made.diffusion.backbone.conv_out.weight)
    return made


def transformer(**changes: Any) -> Stage:
    """The same with a DiT that has all its parts."""
    made = diffusion_stage(**changes)
    parts = {"project_vector": True, "rotary_positions": True, "qk_norm": True, "rms_norm": True, "swiglu": True}
    made.diffusion.backbone = drawn(DiT(3, 3, 32, 2, 2, vector_width=4, gradient_checkpointing=True, **parts))
    return made


def drawn(network: nn.Module) -> nn.Module:
    """No weight is zero, so that every part has an effect."""
    torch.manual_seed(4)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network


def first_stage(**changes: Any) -> Stage:
    """With an adversary that joins at the third step."""
    return test_autoencoder_module.stage(start=2, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("make", [denoiser, transformer, first_stage])
def test_a_compiled_run_is_the_same_run_and_makes_its_graphs_once(
    make: Callable[..., Stage], tmp_path: Path, graphs: CompileCounterWithBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Graphs(graphs)
    options: dict[str, Any] = {"validate_every": 2, "log_every": 1}
    compiled = load_checkpoint(
        train(make(max_steps=8), tmp_path / "compiled", compile=True, callbacks=[watch], **options)
    )
    assert "blocks in" in capsys.readouterr().out
    plain = load_checkpoint(train(make(max_steps=8), tmp_path / "plain", **options))
    assert watch.seen[4] > watch.seen[1] > 0
    assert watch.seen[5:] == [watch.seen[4]] * 3  # groups take turns, validation and training too
    for part in ("modules", "averaged", "optimizers"):
        torch.testing.assert_close(compiled[part], plain[part], rtol=0, atol=0)


@pytest.mark.slow
def test_both_towers_of_clip_are_compiled(graphs: CompileCounterWithBackend) -> None:
    stage, plain = test_clip_module.make(), test_clip_module.make()
    assert compile_regions(stage) == 2
    losses = [one.losses("clip", test_clip_module.pairs()).total for one in (stage, plain)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    assert graphs.frame_count == 2


TRANSFORMERS = {
    "dit": partial(DiT, context="both", rotary_positions=True),  # tokens by cross-attention and in the sequence
    "mmdit": partial(MMDiT, dual_attention=[0]),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told", "network"), [("class_id", "unet"), ("caption", "unet"), ("caption", "dit"), ("caption", "mmdit")]
)
def test_sampling_makes_its_graphs_once(told: str, network: str, graphs: CompileCounterWithBackend) -> None:
    def made_model() -> LoadedModel:
        model = tiny_model(told)
        if network in TRANSFORMERS:
            backbone = drawn(TRANSFORMERS[network](2, 2, 32, 2, 2, context_width=16))
            model.diffusion.backbone = backbone.requires_grad_(False).eval()
        return model

    def sampled(model: LoadedModel, count: int, scale: float) -> torch.Tensor:
        values = [f"{i}" if told == "caption" else i for i in range(count)]
        return model.sample(**{told: values}, steps=2, guidance_scale=scale, batch_size=4)

    plain, compiled = made_model(), made_model().compiled(True)
    assert torch.equal(sampled(compiled, 7, 3.0), sampled(plain, 7, 3.0))  # 4, then 3, both doubled
    made = graphs.frame_count
    assert made > 7
    assert torch.equal(sampled(compiled, 6, 1.0), sampled(plain, 6, 1.0))
    assert graphs.frame_count == made


def test_tiles_with_shared_norms_run_outside_the_graphs(graphs: CompileCounterWithBackend) -> None:
    images = torch.randint(0, 256, (1, 96, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain, compiled = tiny_model(None), tiny_model(None).compiled(True)
    whole = [model.encode(images) for model in (plain, compiled)]
    torch.testing.assert_close(*whole, rtol=0, atol=0)
    assert graphs.frame_count > 0
    parts = [model.encode(images, tile=32) for model in (plain, compiled)]
    torch.testing.assert_close(*parts, rtol=0, atol=0)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-4, atol=1e-4)


class Mine(nn.Module):
    """Nothing is declared here."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.tanh()


@region
class MineInOneGraph(Mine):
    """The same as one graph."""


def test_what_is_compiled(graphs: CompileCounterWithBackend) -> None:
    whole, patches = PatchDiscriminator(8, layers=1), PatchDiscriminator(8, layers=1, norm="sync_batch")
    assert [method for _, method in regions(whole)] == ["forward"]
    assert list(regions(patches)) == []  # it waits for the other processes
    mine, x = MineInOneGraph(), torch.randn(3, 2)
    assert (compile_regions(Mine()), compile_regions(mine)) == (0, 1)
    assert torch.equal(mine(x), x.tanh())
    assert graphs.frame_count == 1
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [wanted("auto", cpu), wanted("auto", gpu), wanted(True, cpu), wanted(False, gpu)] == [
        False,
        True,
        True,
        False,
    ]


def test_more_sizes_than_graphs_are_run_without_them(
    graphs: CompileCounterWithBackend, caplog: pytest.LogCaptureFixture
) -> None:
    mine = MineInOneGraph()
    compile_regions(mine)
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in range(2, 6):
            x = torch.randn(3, size)
            assert torch.equal(mine(x), x.tanh())
    assert graphs.frame_count == 2
    assert caplog.text.count("it runs uncompiled from here on") == 1


@pytest.mark.slow
def test_recorded_passes_are_those_with_gradients_and_steps_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: Any, inputs: Any, mode: str | None = None) -> Any:
        modes.append((mode, torch.is_grad_enabled()))
        return graph

    modes: list[tuple[str | None, bool]] = []
    marks: list[int] = []
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", backend)
    monkeypatch.setattr("torch.compiler.cudagraph_mark_step_begin", lambda: marks.append(stage.step))
    stage = denoiser()
    callback: Any = Compiled("cuda_graphs", print)
    callback.on_fit_start(None, stage)
    for stage.step, stage.step_complete in ((0, True), (0, False), (1, True)):  # two micro-batches, one
        callback.on_train_batch_start(None, stage, None, 0)
    assert marks == [0, 1]
    stage.losses("denoiser", image_batch(range(4)))
    with torch.no_grad():
        stage.losses("denoiser", image_batch(range(4)))
    assert set(modes) == {("reduce-overhead", True), (None, False)}


def test_what_cannot_be_recorded_is_refused() -> None:
    one, two = denoiser(), first_stage()
    check_graphs("cuda_graphs", one)
    check_graphs(True, two)
    with pytest.raises(
        InputError, match=r"cuda_graphs: an adversary runs parts of a pass twice; use trainer.compile=true"
    ):
        check_graphs("cuda_graphs", two)
    one.sharded = True
    with pytest.raises(InputError, match=r"cuda_graphs: trainer.strategy shards the weights"):
        check_graphs("cuda_graphs", one)


def test_networks_without_regions_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(diffusion_stage(max_steps=1), tmp_path, compile=True)
    assert "no network here declares a region" in capsys.readouterr().out


@pytest.mark.slow
def test_the_compiler_gives_the_same_loss_and_gradients() -> None:
    torch._dynamo.reset()
    compiled, plain = (denoiser().eval() for _ in range(2))
    assert compile_regions(compiled) > 5
    for one in (compiled, plain):
        one.losses("denoiser", image_batch(range(4))).total.backward()
    gradients = ([p.grad for p in one.parameters() if p.requires_grad] for one in (compiled, plain))
    torch.testing.assert_close(*map(list, gradients), rtol=1e-3, atol=1e-5)
