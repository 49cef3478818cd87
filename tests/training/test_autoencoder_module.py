"""The autoencoder stage: who is updated when, what is logged and seen, and that processes do not change gradients."""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from torch import Tensor
from toy_stages import image_batch, options, train, unreadable_batch

from ldmlab import distributed
from ldmlab.checkpoints import inventory, load_checkpoint, save_checkpoint
from ldmlab.errors import InputError
from ldmlab.first_stages.encoder_decoder import Autoencoder
from ldmlab.first_stages.identity import Identity
from ldmlab.first_stages.index_backpropagation import IBQ
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.first_stages.lookup_free import BSQ, FSQ, LFQ
from ldmlab.first_stages.quantiser import Quantiser
from ldmlab.first_stages.vq import QuantisedAutoencoder, VQModel
from ldmlab.losses.adversary import Adversary
from ldmlab.losses.autoencoder_loss import AutoencoderLoss
from ldmlab.losses.patch_discriminator import PatchDiscriminator
from ldmlab.metrics.reconstruction import CodebookWindow
from ldmlab.training.autoencoder_module import AutoencoderStage
from ldmlab.training.optim import AdamW
from ldmlab.training.optimizer_groups import MeanGradients

NETWORK: dict[str, Any] = {
    "channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "latent_channels": 2, "norm_groups": 4
}  # fmt: skip


QUANTISERS: dict[str, tuple[Callable[[], Quantiser], dict[str, float]]] = {  # and the weights of its penalties
    "fsq": (lambda: FSQ([4, 4, 3]), {}),
    "lfq": (lambda: LFQ(5, temperature=1.0), {"entropy": 0.1, "commitment": 0.25}),
    "bsq": (lambda: BSQ(5), {"entropy": 0.1, "commitment": 0.1}),
    "ibq": (lambda: IBQ(32, 2, temperature=1.0), {"codebook": 1.0, "entropy": 0.05}),
}


def critic(start: int = 0, adversary_start: int | None = None, **changes: Any) -> Adversary:
    chosen = {"weight": 0.5, "discriminator_start": start, "adversary_start": adversary_start or start, **changes}
    return Adversary(discriminator=PatchDiscriminator(8, layers=1), **chosen)


def stage(
    adversary: bool = True, start: int = 0, logvar: str = "fixed", vq: int | str = 0, **changes: Any
) -> AutoencoderStage:
    """A tiny first stage with its loss; `vq` is the size of a codebook, or the name of another quantiser."""
    torch.manual_seed(2)
    architecture = NETWORK | changes.pop("network", {})
    penalties = {"codebook": 1.0} if vq else {"kl": 1e-6}
    network: Autoencoder
    if isinstance(vq, str):
        make, penalties = QUANTISERS[vq]
        del architecture["latent_channels"]
        network = QuantisedAutoencoder(**architecture, quantiser=make())
    else:
        network = VQModel(**architecture, codebook_size=vq) if vq else KLAutoencoder(**architecture)
    loss = AutoencoderLoss(
        penalty_weights=penalties,
        lpips_weight=0.0,
        reduction="mean",
        logvar=logvar,  # type: ignore[arg-type]
        adversary=critic(start) if adversary else None,
    )
    own = {name: changes.pop(name) for name in ("codebook_window", "codebook_alert") if name in changes}
    return AutoencoderStage(first_stage=network, loss=loss, **own, **options(**changes))


def updates(trained: AutoencoderStage, group: str) -> int:
    """Updates a group's optimizer has made."""
    state = trained.optimizers_by_group()[group].state_dict()["state"]
    return int(state[0]["step"]) if state else 0


# -- who plays when --------------------------------------------------------------------------------------------------


def test_both_groups_are_updated_with_every_batch(tmp_path: Path) -> None:
    made = stage(max_steps=10)
    train(made, tmp_path)
    assert (made.step, made.position) == (10, 40)
    assert (updates(made, "generator"), updates(made, "discriminator")) == (10, 10)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_discriminator_starts_exactly_at_its_step(tmp_path: Path, accumulate: int) -> None:
    for steps, expected in ((4, 0), (5, 1), (10, 6)):
        made = stage(start=4, max_steps=steps, accumulate=accumulate)
        before = {name: value.clone() for name, value in made.loss.state_dict().items()}
        train(made, tmp_path / f"{steps}", micro=2)
        assert updates(made, "discriminator") == expected
        unchanged = all(torch.equal(before[name], value) for name, value in made.loss.state_dict().items())
        assert unchanged == (expected == 0)


def test_adversary_enters_the_loss_at_its_own_step() -> None:
    made = stage(start=2)
    assert made.loss.adversary is not None
    made.loss.adversary.adversary_start = 5
    for step in range(8):
        made.step = step
        assert made.active("discriminator") == (step >= 2)
        terms = made.losses("generator", image_batch(range(4))).metrics
        assert ("adversary/adaptive_weight" in terms) == (step >= 5)
        assert {"l1", "reconstruction", "kl"} <= terms.keys()
    assert {"adversary/logits_real", "adversary/logits_fake"} <= made.losses(
        "discriminator", image_batch(range(4))
    ).metrics.keys()


@pytest.mark.parametrize("logvar", ["fixed", "learned"])
def test_every_trainable_parameter_has_exactly_one_optimizer(logvar: str) -> None:
    made = stage(logvar=logvar)
    groups = [group for optimizer in made.configure_optimizers()[0] for group in optimizer.param_groups]
    owned = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in made.parameters() if parameter.requires_grad]
    assert sorted(owned) == sorted(trainable)
    assert (id(made.loss.reconstruction.logvar) in owned) == (logvar == "learned")


def test_a_learned_logvar_moves(tmp_path: Path) -> None:
    for logvar in ("fixed", "learned"):
        made = stage(adversary=False, logvar=logvar, max_steps=3)
        train(made, tmp_path / logvar)
        assert (made.loss.reconstruction.logvar.item() != 0.0) == (logvar == "learned")


def test_a_first_stage_without_weights_is_refused() -> None:
    loss = AutoencoderLoss(penalty_weights={}, lpips_weight=0.0, reduction="mean")
    with pytest.raises(InputError, match="first_stage=identity"):
        AutoencoderStage(first_stage=Identity(), loss=loss, **options())


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fifty_steps_in_bfloat16_with_and_without_accumulation(tmp_path: Path) -> None:
    """Accumulation only makes the adaptive weight each micro-batch's own; batches of one image are safe."""
    errors = {}
    for accumulate in (1, 4):
        made = stage(start=10, max_steps=50, accumulate=accumulate, network={"mid_attention": False, "channels": 4})
        train(made, tmp_path / f"{accumulate}", micro=4 // accumulate, precision="bf16-mixed")
        assert made.step == 50
        errors[accumulate] = made.validate([image_batch(range(40))])["psnr"]
    assert errors[1] == pytest.approx(errors[4], abs=0.5)


def test_a_bad_number_stops_the_run_by_name(tmp_path: Path) -> None:
    made = stage(max_steps=6)
    with torch.no_grad():
        made.first_stage.decoder.output.bias.fill_(float("nan"))
    with pytest.raises(Exception, match="l1 became nan at step"):
        train(made, tmp_path)


def test_posterior_noise_belongs_to_the_position() -> None:
    made = stage()
    images = torch.zeros(4, 3, 8, 8)
    together, _ = made._noise(torch.arange(4, 8), images)
    assert torch.equal(together[2:], made._noise(torch.arange(6, 8), images[2:])[0])
    assert together.shape == (4, 2, 4, 4)
    assert not torch.equal(together, made._noise(torch.arange(54, 58), images)[0])  # same images, an epoch later


def test_a_first_stage_that_draws_no_latents_gets_no_noise() -> None:
    assert [len(noise) for noise in stage(vq=8)._noise(torch.arange(4), torch.zeros(4, 3, 8, 8))] == [0, 0]


def test_held_out_numbers_and_what_decides() -> None:
    made = stage()
    assert (made.monitor, made.monitor_mode) == ("psnr", "max")
    with torch.no_grad():
        whole = made.validate([image_batch(range(8))])
        parts = made.validate([unreadable_batch(), image_batch(range(3)), image_batch(range(3, 8))])
    assert {"psnr", "psnr_object", "ssim", "latent_std"} <= whole.keys()
    assert {f"latent_{kind}/{channel}" for kind in ("mean", "std", "min", "max") for channel in (0, 1)} <= whole.keys()
    assert parts == pytest.approx(whole, rel=1e-4)
    assert not any("adversary" in name or "loss" in name for name in whole)
    made.loss.reconstruction.lpips = torch.nn.Identity()
    again = AutoencoderStage(first_stage=made.first_stage, loss=made.loss, **options())
    assert (again.monitor, again.monitor_mode) == ("lpips", "min")


def test_panels_show_input_reconstruction_difference() -> None:
    made = stage()
    batch = image_batch(range(6))
    with torch.no_grad():
        (name, panel), *others = made.panels([batch, image_batch(range(6, 12))]).items()
    assert (name, others) == ("reconstructions", [])  # nothing decoded from noise
    assert panel.shape == (8, 8, 24, 3)
    assert panel.dtype == torch.uint8
    shown, rebuilt, difference = (part.movedim(-1, 1) for part in panel[:6].split(8, dim=2))
    assert torch.equal(shown, batch["image"])
    expected = 127.5 + (rebuilt.float() - shown.float()) / 2
    assert (difference.float() - expected).abs().max() <= 1.0


# -- the codebook ----------------------------------------------------------------------------------------------------


def codebook_run(made: AutoencoderStage, path: Path) -> dict[str, float]:
    """Train; codebook use of the last full window."""
    train(made, path)
    assert made.codebook is not None
    return made.codebook.numbers


def test_an_unused_codebook_raises_the_alert(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = stage(vq=32, adversary=False, max_steps=9, codebook_window=16)
    with torch.no_grad():
        made.first_stage.to_latent.weight.zero_()  # every vector is the same: one code
    for parameter in made.first_stage.encoder.parameters():
        parameter.requires_grad_(False)
    for name in ("to_latent", "from_latent", "quantiser"):
        getattr(made.first_stage, name).requires_grad_(False)
    with caplog.at_level(logging.WARNING, logger="ldmlab"):
        found = codebook_run(made, tmp_path)
    assert found == pytest.approx({"codebook_use": 1 / 32, "codebook_perplexity": 1.0, "codebook_entropy": 0.0})
    alerts = [record.getMessage() for record in caplog.records if "codebook" in record.getMessage()]
    assert len(alerts) == 2  # 9 steps of 4 images hold two full windows of 16
    assert "only 3.1 % of the codebook was used over the last 16 images" in alerts[0]


@pytest.mark.parametrize("kind", QUANTISERS)
def test_a_rigged_encoder_raises_the_alert_of_every_quantiser(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = stage(vq=kind, adversary=False, max_steps=2, codebook_window=8, optimizer=AdamW(1e-12))
    with torch.no_grad():
        made.first_stage.to_latent.weight.zero_()  # every vector is the same: one code
    with caplog.at_level(logging.WARNING, logger="ldmlab"):
        found = codebook_run(made, tmp_path)
    one = {"codebook_use": 1 / made.first_stage.codebook_size, "codebook_perplexity": 1.0, "codebook_entropy": 0.0}
    assert found == pytest.approx(one)
    alerts = [record.getMessage() for record in caplog.records if "codebook was used" in record.getMessage()]
    assert len(alerts) == 1
    assert alerts[0].endswith(f"over the last 8 images; {made.first_stage.quantiser.remedy}")


def test_counting_codes_of_18_bits_is_cheap() -> None:
    window = CodebookWindow(2**18, 10_000, 0.5)
    codes = torch.randint(2**18, (8, 16, 16))
    start = time.process_time()
    for step in range(20):
        window.add(codes)
        window.end_step(step, 8)
    assert (time.process_time() - start) / 20 < 0.05  # about 1 ms, where a step of such a model takes a second
    assert int(window.counts.sum()) == 20 * codes.numel()


@pytest.mark.parametrize(
    "kind", ["ibq", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fsq", "lfq", "bsq"))]
)
def test_every_quantiser_resumes_to_the_bit(kind: str, tmp_path: Path) -> None:
    for name, steps in (("straight", [4]), ("stopped", [2, 4])):
        for max_steps in steps:
            train(stage(vq=kind, adversary=False, codebook_window=12, max_steps=max_steps), tmp_path / name)
    straight, stopped = (
        load_checkpoint(tmp_path / name / "checkpoints" / "step_00000004.ckpt") for name in ("straight", "stopped")
    )
    forked.same(straight["codebook"], stopped["codebook"])
    forked.same(straight["modules"], stopped["modules"])


def test_a_used_codebook_is_quiet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = stage(vq=4, adversary=False, max_steps=5, codebook_window=16)
    with torch.no_grad():
        made.first_stage.quantiser.codebook.weight.copy_(torch.tensor([[1.0, 1], [-1, 1], [1, -1], [-1, -1]]) / 10)
    with caplog.at_level(logging.WARNING, logger="ldmlab"):
        found = codebook_run(made, tmp_path)
    assert found["codebook_use"] >= 0.5
    assert not [record for record in caplog.records if "codebook" in record.getMessage()]


@pytest.mark.slow
def test_an_open_window_and_moved_codes_survive_a_restart(tmp_path: Path) -> None:
    rules = {"codebook_decay": 0.9, "restart_below": 0.2}
    for name, steps in (("straight", [8]), ("stopped", [4, 8])):
        for max_steps in steps:
            made = stage(vq=32, codebook_window=20, network=rules, max_steps=max_steps)
            train(made, tmp_path / name)
    straight, stopped = (
        load_checkpoint(tmp_path / name / "checkpoints" / "step_00000008.ckpt") for name in ("straight", "stopped")
    )
    assert straight["codebook"]["counted"] == 12  # images since the window of 20 was full
    forked.same(straight["codebook"], stopped["codebook"])
    forked.same(straight["modules"], stopped["modules"])


def test_a_checkpoint_without_a_window_is_gone_on_from_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = train(stage(vq=32, codebook_window=16, max_steps=2), tmp_path)
    content = {name: part for name, part in load_checkpoint(path).items() if name not in ("codebook", "inventory")}
    save_checkpoint(path, {**content, "inventory": inventory(content)})
    made = stage(vq=32, codebook_window=16, max_steps=6)
    with caplog.at_level(logging.WARNING, logger="ldmlab"):
        found = codebook_run(made, tmp_path)
    assert made.step == 6
    assert "codebook_use" in found  # of the four steps since
    told = [record.getMessage() for record in caplog.records if "older ldmlab" in record.getMessage()]
    assert told[0].startswith("the checkpoint of step 2 holds no count of used codes")


def test_averaged_weights_follow_a_restarted_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stage(vq=8, adversary=False, max_steps=1, averaging_decay=0.999)
    codes = made.first_stage.quantiser.codebook.weight

    def restart() -> dict[str, Tensor]:
        codes[3] = 7.0
        return {"quantiser.codebook.weight": torch.arange(8) == 3}

    monkeypatch.setattr(made.first_stage, "update_codebook", restart)
    train(made, tmp_path)
    assert made.average is not None
    average = made.average.weights()["quantiser.codebook.weight"]
    torch.testing.assert_close(average[3], torch.full((2,), 7.0), atol=0.01, rtol=0)
    assert float(average[[0, 1, 2, 4, 5, 6, 7]].abs().max()) < 1


def test_a_rise_after_the_adversary_joined_is_told(caplog: pytest.LogCaptureFixture) -> None:
    made = stage(start=3)
    made.rise_alarm.every_steps = 1
    with caplog.at_level(logging.WARNING, logger="ldmlab"):
        for step, error in enumerate([1.0] * 3 + [1.5]):
            made.step = step
            made._watch(torch.tensor(error))
    assert [record.getMessage()[:53] for record in caplog.records] == [
        "step 3: reconstruction is 50 % worse than before the "
    ]


# -- processes -------------------------------------------------------------------------------------------------------


def gradients(made: AutoencoderStage, positions: range) -> dict[str, Any]:
    """Gradients of both groups for these images, averaged over processes, and what was logged."""
    found: dict[str, Any] = {}
    for group, parameters in made.groups().items():
        means = MeanGradients(parameters) if distributed.joined() else None
        with made._only(group), means.during() if means is not None else nullcontext():
            losses = made.losses(group, image_batch(positions))
            losses.total.backward()
        if means is not None:
            means.wait()
        found[group] = [p.grad for p in parameters]
        found[f"{group} metrics"] = {name: distributed.mean_(value.clone()) for name, value in losses.metrics.items()}
    return found


def share_of_gradients(rank: int, world: int, vq: int | str, out: Path) -> None:
    distributed.join()
    made = stage(vq=vq)
    size = 8 // world
    found = gradients(made, range(rank * size, (rank + 1) * size))
    with torch.no_grad():
        held_out = made.validate([image_batch(range(5) if rank == 0 else range(5, 8))])  # uneven shares
    torch.save({**found, "val": held_out}, out / f"{rank}.pt")


def moved_codes(rank: int, world: int, out: Path) -> None:
    """Codebook and bookkeeping after three steps of eight images."""
    distributed.join()
    made = stage(vq=16, network={"codebook_decay": 0.9, "restart_below": 0.9})
    assert made.codebook is not None
    size, restarted = 8 // world, 0
    for step in range(3):
        for part in range(2):  # two micro-batches
            start = 8 * step + rank * size + part * size // 2
            made.losses("generator", image_batch(range(start, start + size // 2)))
        made.codebook.end_step(step, 8)
        restarted += int(made.first_stage.update_codebook()["quantiser.codebook.weight"].sum())
    state = {"quantiser": made.first_stage.quantiser.state_dict(), "counts": made.codebook.counts}
    torch.save(state | {"restarted": torch.tensor(restarted)}, out / f"{rank}.pt")


def test_two_processes_move_the_codes_of_one(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    assert forked.finish(*forked.group(2, moved_codes, tmp_path)) == [0, 0]
    moved_codes(0, 1, tmp_path / "one")
    expected = torch.load(tmp_path / "one" / "0.pt")
    assert int(expected["restarted"]) > 0
    assert int(expected["counts"].sum()) == 24 * 16
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, atol=1e-6, rtol=1e-5)


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("vq", [0, 16, "lfq", "ibq"], ids=["kl", "vq", "lfq", "ibq"])
def test_two_processes_give_the_gradients_of_one(tmp_path: Path, vq: int | str) -> None:
    """4 + 4 images against 8: reconstruction, penalties, entropies over all, adversary terms, the adaptive weight."""
    assert forked.finish(*forked.group(2, share_of_gradients, vq, tmp_path)) == [0, 0]
    made = stage(vq=vq)
    expected = gradients(made, range(8))
    with torch.no_grad():
        held_out = made.validate([image_batch(range(8))])
    scale = max(float(g.abs().max()) for g in expected["generator"])
    assert scale > 1e-3
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for group in ("generator", "discriminator"):
            assert largest_difference(found[group], expected[group]) < 1e-5
            torch.testing.assert_close(found[f"{group} metrics"], expected[f"{group} metrics"], atol=1e-5, rtol=1e-4)
        assert found["val"] == pytest.approx(held_out, rel=1e-4)
    assert float(expected["generator metrics"]["adversary/adaptive_weight"]) > 0


def channels_last(rank: int, world: int, out: Path) -> None:
    """Four steps without an adversary, in a GPU's memory format."""
    AutoencoderStage._memory_format = torch.channels_last
    optimizer = AdamW(0.1, epsilon=1.0)  # its updates are about the gradients, which Adam would divide away
    train(stage(adversary=False, max_steps=4, optimizer=optimizer), out, micro=8 // world, world=world, rank=rank)


@pytest.mark.slow
def test_two_processes_in_a_gpus_memory_format_are_one(tmp_path: Path) -> None:
    assert forked.finish(*forked.group(2, channels_last, tmp_path / "two")) == [0, 0]
    assert forked.finish(forked.start(channels_last, 0, 1, tmp_path / "one")) == [0]
    one, two = (load_checkpoint(tmp_path / name / "checkpoints" / "step_00000004.ckpt") for name in ("one", "two"))
    assert one["modules"]["first_stage"]["encoder.input.weight"].is_contiguous(memory_format=torch.channels_last)
    for name, value in one["modules"]["first_stage"].items():
        torch.testing.assert_close(two["modules"]["first_stage"][name], value, rtol=0, atol=1e-5)
