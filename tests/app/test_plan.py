"""`ldmlab plan` against what the processor's allocator hands out, and its refusals."""

import io
import json
import re
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from ldmlab.app import estimate as estimates
from ldmlab.app import meta_stages
from ldmlab.app.cli import dispatch
from ldmlab.app.commands.plan import USED, saved_by_sharding
from ldmlab.app.compose import compose, plain
from ldmlab.errors import InputError
from ldmlab.evaluation.flops import StepCost, flops_of
from ldmlab.instantiate import instantiate
from ldmlab.nn import attention
from ldmlab.training.settings import TrainerSettings, trainer_node

SMALL_UNET = ["backbone.model_channels=64", "data.image_size=128"]
SMALL = ["backbone=dit_s_2", "backbone.depth=1", "first_stage=identity", "data.image_size=8"]
TWO_TOWERS = ["conditioner=text", "conditioner.text.name=ViT-B-32", "+conditioner.text.config={a:1}"]
ADVERSARY = ["stage=autoencoder", "loss=kl_adversary", "data.image_size=64"]
MODELS = {
    "denoiser of captions": [
        "experiment=paper/text/sd1",
        "first_stage=kl_f8",
        "conditioner=text_transformer",
        "conditioner.text.depth=2",
        "conditioner.text.width=256",
        *SMALL_UNET,
    ],
    "denoiser of classes": ["experiment=paper/class/imagenet_ldm_4", "first_stage=vq_f4", *SMALL_UNET],
    "first stage with adversary": [
        "experiment=paper/first_stage/kl_f8",
        "first_stage.channels=32",
        "data.image_size=128",
        "loss.adversary.discriminator.channels=32",
    ],
    "first stage of pixels": ["experiment=demo/gpu_first_stage", "first_stage.channels=64"],
    "clip": ["experiment=demo/gpu_clip"],
    "transformer with a learned variance": [
        *("stage=diffusion", "first_stage=kl_f8", "conditioner=class_label", "diffusion=dit", "backbone=dit_s_2"),
        *("backbone.depth=2", "data.image_size=128"),
    ],
}


def made(words: list[str]) -> tuple[dict[str, Any], TrainerSettings]:
    """Configuration and settings; LPIPS and a published tower are built without their weights."""
    config = plain(compose("train", words))
    return config, instantiate(trainer_node(config["trainer"]), where="trainer")


def allocated(config: dict[str, Any], settings: TrainerSettings, images: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Most that torch's allocator hands out during one step on real tensors, on top of what is held before."""
    monkeypatch.setattr(meta_stages, "IMAGES", images)
    monkeypatch.setattr(attention, "by_products", lambda *_: False)
    stage, _, batch = meta_stages.build(config, settings)
    estimates.filled(stage)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.fill_(0.01)
    _, _held, batch = estimates.prepared(stage, batch, settings)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        estimates.train_step(stage, batch, settings)
    results = profiled.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    now = most = 0
    for _, size in events:
        now += size
        most = max(most, now)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_agrees_with_the_allocator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, settings = made([*MODELS[name], "trainer.precision=32-true"])
    counted = sum(estimates.estimate(config, settings).step.peak(8).values())
    measured = allocated(config, settings, 8, monkeypatch)
    print(f"{name}: counted {counted / 2**20:.1f} MiB, allocated {measured / 2**20:.1f} MiB")
    assert counted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(("width", "formed"), [(64, 0), (256, 0), (512, 2 * 2)])  # scores and their softmax, bfloat16
def test_attention_counts_as_a_gpu_computes_it(width: int, formed: int) -> None:
    tokens, images = 1024, 3
    with FakeTensorMode(), estimates.attention_of_a_gpu():
        q, k, v = (torch.empty(images, 1, tokens, width, dtype=torch.bfloat16) for _ in range(3))
        step = StepCost({}, [q, k, v], images)
        with step.counting():
            attention.attend(q, k, v)
    inputs_and_outputs = 4 * images * tokens * width * 2
    assert images * tokens**2 * formed <= sum(step.peak(images).values())
    assert sum(step.peak(images).values()) < images * tokens**2 * formed + inputs_and_outputs
    assert attention.by_products("cpu", torch.bfloat16, 64, 64, 64)  # the choice of this processor is back


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 100_000])
def test_flops_are_those_of_the_step_at_hand(
    step: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before and after the adversary has joined, against torch's counter on real tensors."""
    words = [*MODELS["first stage with adversary"], "trainer.precision=32-true", "data.image_size=64"]
    config, settings = made([*words, "loss.lpips_weight=0", "first_stage.num_res_blocks=1"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"config": config, "step": step})))
    estimates.main()
    stage, _, batch = meta_stages.build(config, settings)
    estimates.filled(stage)
    _, _, batch = estimates.prepared(stage, {name: value[:1] for name, value in batch.items()}, settings)
    stage.step = step
    counted = flops_of(lambda: estimates.train_step(stage, batch, settings))
    assert float(capsys.readouterr().out) == pytest.approx(counted, rel=1e-3)


@pytest.mark.slow
def test_a_plan_chooses_what_fits_and_divides(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*MODELS["denoiser of classes"], "trainer.global_batch=1200", "trainer.accumulate=1"]
    assert dispatch(["plan", *words, "--memory-gib", "4", "--devices", "8", "--json", "--price", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["micro_batch"] * found["accumulate"] * 8 == found["global_batch"] == 1200
    assert found["peak_gib"] == pytest.approx(sum(found["memory_gib"].values()))
    assert found["peak_gib"] <= USED * 4
    assert found["cost"] == pytest.approx(2 * 8 * found["hours"])
    assert found["parameters"].keys() == {"denoiser", "conditioners", "frozen first stage"}
    assert saved_by_sharding(found)
    copies = 5  # weights, gradients, two moments, averages, in float32
    assert found["trained_gib"] * 2**30 == pytest.approx(copies * 4 * found["parameters"]["denoiser"], rel=0.02)
    dispatch(["plan", *words, "--memory-gib", "0.1"])
    assert "none fits: recompute activations" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "parts"), [("fsdp", 16), ("hsdp", 8)])
def test_what_is_sharded_is_divided_by_the_processes(
    strategy: str, parts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*MODELS["denoiser of captions"], f"trainer={strategy}"]
    one, many = ({}, {})
    for found, devices in ((one, 1), (many, 16)):
        assert dispatch(["plan", *words, "--devices", str(devices), "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        found |= printed["memory_gib"]
        assert not saved_by_sharding(printed)  # of what is divided already
    for kind in ("weights of the denoiser", "gradients", "optimizer", "averaged weights"):
        assert many[kind] == pytest.approx(one[kind] / parts, rel=1e-3)
    assert many["weights of the frozen first stage"] == one["weights of the frozen first stage"]
    assert 0 < many["gathered units"] < one["weights of the denoiser"]


@pytest.mark.slow
def test_a_discriminator_is_not_divided(capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for devices in (1, 4):
        words = [*MODELS["first stage with adversary"], "trainer=fsdp", "--devices", str(devices), "--json"]
        assert dispatch(["plan", *words]) == 0
        found.append(json.loads(capsys.readouterr().out)["memory_gib"])
    one, many = found
    assert many["weights of the first stage"] < 0.26 * one["weights of the first stage"]
    assert 0.25 < many["gradients"] / one["gradients"] < 0.5


@pytest.mark.slow
def test_more_images_fit_where_weights_are_sharded(capsys: pytest.CaptureFixture[str]) -> None:
    """On cards that just hold one image beside all weights; a plan needs no GPU for what it plans."""
    words = ["backbone=dit_s_2", "backbone.depth=2", "first_stage=identity", "data.image_size=8", "--devices", "8"]
    words += ["trainer.global_batch=64", "--json"]

    def planned(*more: str) -> dict[str, Any]:
        assert dispatch(["plan", *words, *more]) == 0
        return dict(json.loads(capsys.readouterr().out))

    one = planned("--memory-gib", "0.01")
    card = ["--memory-gib", str(1.01 * one["peak_gib"] / USED)]
    whole, split = (
        planned(*card, "trainer.compile=cuda_graphs"),
        planned(*card, "trainer=fsdp", "trainer.precision=16-mixed"),
    )
    assert (one["micro_batch"], whole["micro_batch"], split["micro_batch"]) == (None, 1, 8)


def test_a_part_without_weights_is_not_divided(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["plan", *SMALL, "trainer=fsdp", "--devices", "2", "--json"]) == 0
    assert "weights of the conditioners" not in json.loads(capsys.readouterr().out)["memory_gib"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=clip", "trainer=fsdp", "--devices", "8"], "shards first stages, denoisers and latent classifiers"),
        (["stage=clip", "trainer=fsdp"], "shards first stages, denoisers and latent classifiers"),
        (["stage=autoencoder", "backbone=dit_s_2"], "stage=autoencoder reads no backbone"),
        (["first_stage=kl_f8", "stage.val_draws=few"], "stage.val_draws=few"),
        ([*SMALL, "trainer=fsdp", "trainer.compile=cuda_graphs", "--devices", "8"], "strategy shards the weights"),
        ([*SMALL, "trainer=hsdp", "trainer.global_batch=12", "--devices", "12"], "8 of 12 are on one; use"),
        (["--card", "h100"], "--card=h100 is unknown; choose one of v100-32gb"),
        (["--mfu", "35"], "--mfu 35.0 must be above 0 and at most 1"),
        (["--devices", "0"], "--devices 0 must be at least 1"),
        (["experiment=mine/text_to_image"], "name its architecture: first_stage=NAME"),
        (["stage=all"], "stage=all has no step of its own"),
        (["first_stage=kl_f8", "trainer.global_batch=10", "--devices", "3"], "does not divide trainer.global_batch=10"),
        (["first_stage=kl_f8", "backbone=edm2_s"], "data.image_size=32 is not a multiple of 64"),
        (["first_stage=kl_f8", "conditioner=text"], "give either name or config"),
        (["first_stage=kl_f8", *TWO_TOWERS], "conditioner.name=ViT-B-32 and conditioner.config={'a': 1}: give exactly"),
        (["--price", "inf"], "--price inf must be above 0 and at most 1e+06"),
        ([*ADVERSARY, "loss.adversary.discriminator.layers=1000000000000"], "discriminator.layers=1000000000000 leave"),
        ([*ADVERSARY, "loss.adversary.discriminator.layers=7"], "networks need 384 px a side"),
        (["first_stage=kl_f8", "backbone=dit_s_2", "backbone.depth=1000000000000"], "backbone.depth=1000000000000: a"),
        (["stage=clip", "clip.config.text_cfg.layers=1000000000000"], "clip.config.text_cfg.layers=1000000000000: a"),
        (["stage=clip", "clip.config.text_cfg.width=1000000000000"], "clip.config.text_cfg.width=1000000000000: no"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldmlab.part_checks._PIECES", 1000)  # absurd sizes are refused as soon
    with pytest.raises(InputError, match=re.escape(message)):
        dispatch(["plan", *words])
