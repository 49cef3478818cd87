"""Phases of training: only the named parts of a first stage move, everything else stays as it is to the bit."""

from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from test_autoencoder_module import critic, stage
from toy_stages import image_batch, options, train

from ldmlab import distributed
from ldmlab.checkpoints import load_checkpoint
from ldmlab.errors import InputError
from ldmlab.first_stages.deep_compression import DeepCompressionAutoencoder
from ldmlab.losses.autoencoder_loss import AutoencoderLoss
from ldmlab.training.autoencoder_module import AutoencoderStage
from ldmlab.training.fit import load_initial_weights


def deep(
    trained: list[str] | None, adversary: bool = False, norm: str = "batch_norm", **changes: Any
) -> AutoencoderStage:
    """f = 4 with another norm at the fine level of the decoder."""
    torch.manual_seed(2)
    sides = ("encoder", "decoder")
    shared: dict[str, Any] = {"block_out_channels": [8, 16, 16], "layers_per_block": [1, 1, 1]}
    shared |= {"block_types": ["ResBlock", "ResBlock", "EfficientViTBlock"], "qkv_multiscales": [[], [], []]}
    node = {f"{side}_{name}": value for side in sides for name, value in shared.items()}
    norms = [norm, "rms_norm", "rms_norm"]
    network = DeepCompressionAutoencoder(**node, latent_channels=8, attention_head_dim=8, decoder_norm_types=norms)
    loss = AutoencoderLoss(
        penalty_weights={}, lpips_weight=0.0, reduction="mean", adversary=critic() if adversary else None
    )
    return AutoencoderStage(first_stage=network, loss=loss, trained=trained, **options(**changes))


MADE = {
    "kl": lambda **more: stage(trained=["decoder", "from_latent"], **more),
    "vq": lambda **more: stage(vq=8, trained=["decoder"], **more),
    "moving codes": lambda **more: stage(
        vq=8, trained=["decoder"], network={"codebook_decay": 0.9, "restart_below": 0.9}, **more
    ),
    "deep, phase 2": lambda **more: deep(["encoder.conv_out", "decoder.conv_in"], adversary=False, **more),
    "deep, phase 3": lambda **more: deep(["decoder.conv_out"], adversary=True, **more),
}


@pytest.mark.parametrize("name", MADE)
def test_only_the_named_parts_move(name: str, tmp_path: Path) -> None:
    made = MADE[name](max_steps=3)
    network: Any = made.first_stage
    moving = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    train(made, tmp_path)
    same = {key for key, tensor in network.state_dict().items() if torch.equal(tensor, before[key])}
    assert same == before.keys() - moving  # buffers too: running statistics, counts of codes
    state = made.optimizers_by_group()["generator"].state_dict()["state"]
    assert len(state) == len(moving)
    if "phase 2" not in name:
        assert not network.encode(image_batch(range(2))["image"].float()).mean.requires_grad  # no graph behind it


def test_codes_that_are_running_means_move_in_a_run(tmp_path: Path) -> None:
    made = stage(vq=8, network={"codebook_decay": 0.9}, max_steps=2)
    quantiser: Any = made.first_stage.quantiser
    before = quantiser.codebook.weight.clone()
    train(made, tmp_path)
    assert int(quantiser.updates) == 2
    assert not torch.equal(before, quantiser.codebook.weight)


def test_a_phase_is_resumed_to_the_bit(tmp_path: Path) -> None:
    paths = []
    for folder, stops in (("straight", [4]), ("stopped", [2, 4])):
        for max_steps in stops:
            path = train(MADE["deep, phase 3"](max_steps=max_steps), tmp_path / folder)
        paths.append(path)
    straight, stopped = (load_checkpoint(path) for path in paths)
    for part in ("modules", "optimizers", "averaged"):
        forked.same(straight[part], stopped[part])


def test_a_phase_starts_from_the_one_before(tmp_path: Path) -> None:
    first = deep(None, max_steps=1)
    train(first, tmp_path)
    second = deep(["decoder.conv_out"], adversary=True)
    load_initial_weights(second, {"first_stage": first.first_stage.state_dict()})
    forked.same(second.first_stage.state_dict(), first.first_stage.state_dict())


def test_what_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"stage.trained=\['decoder', 'head'\] names no parameter; there are decoder, dec"
    ):
        deep(["decoder", "head"])
    with pytest.raises(InputError, match=r"stage.trained=\['dec'\] names no parameter"):  # no beginning of a word
        deep(["dec"])
    with pytest.raises(InputError, match=r"stage.trained=\[\] names no parameter"):
        deep([])
    with pytest.raises(InputError, match=r"stage.trained=\['encoder'\] leaves out the last layer, .*adaptive=false"):
        deep(["encoder"], adversary=True)
    loss = AutoencoderLoss(penalty_weights={}, lpips_weight=0.0, reduction="mean", adversary=critic(adaptive=False))
    AutoencoderStage(first_stage=deep(None).first_stage, loss=loss, trained=["encoder"], **options())


PARTS = ("decoder.conv_in", "encoder.conv_out")


def weights(rank: int, world: int, out: Path) -> None:
    """The weights after two steps of eight images."""
    distributed.join()
    made = deep(list(PARTS), norm="rms_norm", max_steps=2)
    train(made, out / "run", micro=8 // world)
    torch.save(made.first_stage.state_dict(), out / f"{rank}.pt")


def refused(rank: int, world: int, out: Path) -> None:
    """Batch norm over processes needs GPUs."""
    distributed.join()
    with pytest.raises(InputError, match="batch norm over 2 processes needs GPUs"):
        train(deep(None, max_steps=2), out / "refused")


@pytest.mark.slow
def test_two_processes_train_the_same_parts(tmp_path: Path) -> None:
    assert forked.finish(*forked.group(2, weights, tmp_path)) == [0, 0]
    assert forked.finish(*forked.group(2, refused, tmp_path)) == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    forked.same(one, other)
    before = deep(None, norm="rms_norm").first_stage.state_dict()
    moved = {name for name, tensor in one.items() if not torch.equal(tensor, before[name])}
    assert moved == {f"{part}.{leaf}" for part in PARTS for leaf in ("weight", "bias")}
