"""First stages of any quantiser: folders, plans, tiles, decoding, labels and options that cannot be."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ldmlab.app.run_records import comparison_fields
from ldmlab.build import load_first_stage
from ldmlab.errors import InputError
from ldmlab.first_stages.deep_compression_blocks import LinearAttention, check_shortcut
from ldmlab.first_stages.index_backpropagation import IBQ
from ldmlab.first_stages.lookup_free import BSQ, FSQ, LFQ
from ldmlab.first_stages.quantiser import Quantiser
from ldmlab.first_stages.tiled import TiledFirstStage
from ldmlab.first_stages.vq import QuantisedAutoencoder
from ldmlab.instantiate import instantiate
from ldmlab.interop.compvis import compvis_networks
from ldmlab.interop.diffusers import diffusers_first_stages
from ldmlab.model_files import write_model_folder

NODES: dict[str, dict[str, Any]] = {
    "fsq": {"_target_": "ldmlab.first_stages.lookup_free.FSQ", "levels": [5, 4, 3]},
    "lfq": {"_target_": "ldmlab.first_stages.lookup_free.LFQ", "bits": 6},
    "bsq": {"_target_": "ldmlab.first_stages.lookup_free.BSQ", "bits": 6, "group_size": 2},
    "ibq": {"_target_": "ldmlab.first_stages.index_backpropagation.IBQ", "codebook_size": 48, "width": 5},
}
SIZES = {"fsq": (3, 60), "lfq": (6, 64), "bsq": (6, 64), "ibq": (5, 48)}  # channels, codes


def node(kind: str) -> dict[str, Any]:
    network = {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}
    return {"_target_": "ldmlab.first_stages.vq.QuantisedAutoencoder", **network, "quantiser": NODES[kind]}


def made(kind: str) -> QuantisedAutoencoder:
    torch.manual_seed(1)
    return instantiate(node(kind), where="first_stage").eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", NODES)
def test_a_model_folder_gives_the_same_codes_and_images(kind: str, tmp_path: Path) -> None:
    stage, images = made(kind), torch.rand(2, 3, 16, 16) * 2 - 1
    spec = {"kind": "first_stage", "image_size": 16, "first_stage": node(kind)}
    write_model_folder(tmp_path / "m", spec, {"first_stage": stage.state_dict()})
    again = load_first_stage(tmp_path / "m").module
    with torch.no_grad():
        latents = stage.encode(images).mean
        assert torch.equal(again.encode(images).mean, latents)
        given = again.reconstruct(images, torch.empty(0))
        assert torch.equal(again.decode(latents), given.images)  # decoding quantises first
        assert torch.equal(given.codes, stage.quantiser.codes_of(latents))
        assert torch.equal(again.decode(stage.quantise(latents)), given.images) or kind == "ibq"
        tiled = TiledFirstStage(again, tile=8)
        torch.testing.assert_close(tiled.decode(latents), given.images, atol=1e-4, rtol=0)
    channels, codes = SIZES[kind]
    found = comparison_fields(spec)
    assert (found["first_stage_kind"], found["latent_channels"], found["codebook_size"]) == (kind, channels, codes)


@pytest.mark.parametrize("kind", NODES)
def test_a_step_without_values_and_a_step_in_half_precision(kind: str) -> None:
    with torch.device("meta"):
        given = made(kind).train().reconstruct(torch.zeros(2, 3, 16, 16), torch.zeros(0))
        sum(given.penalties.values(), given.images.mean()).backward()
    stage, images = made(kind), torch.rand(2, 3, 16, 16) * 2 - 1
    latents = stage.encode(images).mean
    with torch.autocast("cpu", torch.bfloat16):
        half = stage.quantiser(latents)
    full = stage.quantiser(latents)
    assert torch.equal(half.codes, full.codes)
    assert all(torch.equal(half.penalties[name], value) for name, value in full.penalties.items())


@pytest.mark.parametrize("quantiser", [FSQ([7, 4, 2]), FSQ([3, 5], activation="sigmoid"), LFQ(5), BSQ(5), IBQ(9, 3)])
def test_codes_are_whole_and_their_vectors_have_them(quantiser: Quantiser) -> None:
    codes = torch.arange(quantiser.codebook_size).reshape(1, 1, -1)
    vectors = quantiser.vectors_of(codes)
    assert vectors.shape == (1, quantiser.width, 1, quantiser.codebook_size)
    assert len(vectors[0, :, 0].T.unique(dim=0)) == quantiser.codebook_size
    if not isinstance(quantiser, IBQ):
        assert torch.equal(quantiser.codes_of(vectors), codes)
        far = quantiser.codes_of(1e3 * torch.randn(4, quantiser.width, 8, 8))
        assert 0 <= int(far.min()) <= int(far.max()) < quantiser.codebook_size  # a sampler's latents know no bounds


def test_entropies_of_18_bits_need_no_list_of_codes() -> None:
    given = LFQ(18)(torch.randn(1, 18, 8, 8, requires_grad=True))
    assert 0 < -given.penalties["entropy"].item() < 4.17  # at most log(64) for 64 vectors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FSQ([8, 1]), r"levels=\[8, 1\] makes 8 codes; every channel needs 2 levels"),
        (lambda: FSQ([]), r"levels=\[\] makes 1 codes"),
        (lambda: LFQ(36), r"bits=36 makes 68719476736 codes; .* at most 16777216 \(24 bits\)"),
        (lambda: FSQ([5, 4], activation="sigmoid"), "so 4 levels would lose one; choose odd numbers"),
        (lambda: FSQ([5], activation="relu"), "activation=relu"),
        (lambda: LFQ(4, temperature=0), "temperature=0, .*; choose a temperature above 0"),
        (lambda: BSQ(4, batch_weight=-1), "batch_weight=-1; .* weights of 0 or more"),
        (lambda: IBQ(8, 4, codebook_weight=-1), "codebook_weight=-1; .* weights of 0 or more"),
        (lambda: IBQ(1, 4), "codebook_size=1, width=4; choose 2 to 16777216 codes"),
        (lambda: IBQ(100_000_000, 4), "codebook_size=100000000"),
        (lambda: IBQ(8, 0), "width=0; choose .* of 1 channel or more"),
        (lambda: LinearAttention(8, 0, [], "rms_norm"), "attention_head_dim=0: choose 1 to 8"),
        (lambda: check_shortcut(8, 0), "8 channels are no multiple of 0"),
        (lambda: BSQ(10, group_size=4), "group_size=4 must divide bits=10"),
    ],
)
def test_options_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_foreign_formats_know_none_of_them() -> None:
    with pytest.raises(InputError, match="no official counterpart"):
        compvis_networks.first_stage_params_of(node("fsq"))
    with pytest.raises(InputError, match="has no class in diffusers"):
        diffusers_first_stages.configuration(node("lfq"), image_size=16, scaling_factor=1.0)
