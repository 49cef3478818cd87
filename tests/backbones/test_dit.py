"""The diffusion transformer gives the official programs' outputs, and has their sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from drawn_weights import drawn
from ldmlab.backbones.dit import DiT
from ldmlab.backbones.tokens import modulate
from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError
from ldmlab.interop import dit, lightningdit, repa, sit
from ldmlab.nn.compiling import compile_regions
from ldmlab.nn.positions import rotary, sine_cosine

ASSETS = Path(__file__).parents[1] / "assets/reference/modern"
CASES: dict[str, dict[str, Any]] = json.loads((ASSETS / "transformers.json").read_text())
PROGRAMS = {"dit": dit, "sit": sit, "lightningdit": lightningdit, "repa": repa}
TOLERANCE = 1e-5  # of the largest output; a float32 run differs from float64 by 1e-6


def case_of(name: str) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """The network with the case's weights, its recorded tensors, and the weights."""
    case, recorded = CASES[name], load_file(ASSETS / f"{name}.safetensors")
    state = drawn(case) | {key: recorded[f"kept.{key}"] for key in case["kept"]}
    return PROGRAMS[case["kind"]].as_official(case["config"], state), recorded, state


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_guided_and_not(name: str) -> None:
    model, recorded, _ = case_of(name)
    out = model(recorded["x"], recorded["t"], recorded["y"])
    if CASES[name]["kind"] == "repa":
        out, projected = out
        assert len(projected) == sum(key.startswith("z_tilde") for key in recorded)
        for i, tokens in enumerate(projected):
            assert distance(tokens, recorded[f"z_tilde.{i}"]) < TOLERANCE
    assert distance(out, recorded["out"]) < TOLERANCE
    inputs = [recorded.get(f"cfg_{part}") for part in "xty"]
    for scale in CASES[name]["arguments"].get("cfg_scales", []):
        for channels, prefix in ((3, "cfg3"), (None, "cfgall")):
            guided = model.forward_with_cfg(*inputs, scale, channels=channels)
            assert distance(guided, recorded[f"{prefix}.{scale}"]) < TOLERANCE
    if "interval_start" in CASES[name]["arguments"]:
        start = CASES[name]["arguments"]["interval_start"]
        for where, t in (("below", start - 0.05), ("above", start + 0.05)):
            times = torch.full_like(recorded["cfg_t"], t)
            limited = model.forward_with_cfg(inputs[0], times, inputs[2], 6.7, True, start)
            assert distance(limited, recorded[f"interval.{where}"]) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if "block0" in CASES[name]["outputs"]])
@torch.no_grad()
def test_a_block_and_the_final_layer_alone(name: str) -> None:
    """On tiny tokens, where the epsilons of the norms show."""
    model, recorded, _ = case_of(name)
    network = model.network
    side = round(recorded["tokens"].shape[1] ** 0.5)
    rotation = network._places(side, side, torch.device("cpu"))[1]
    condition = torch.nn.functional.silu(recorded["cond"])
    block = network.blocks[0](recorded["tokens"], condition, rotation, None)
    assert distance(block, recorded["block0"]) < TOLERANCE
    shift, scale = network.modulation_out(condition).chunk(2, dim=1)
    final = network.out(modulate(network.norm_out(recorded["tokens"]), shift, scale))
    assert distance(final, recorded["final"]) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if "label" in CASES[name]["outputs"]])
@torch.no_grad()
def test_labels_and_dropped_ones(name: str) -> None:
    """What is dropped is the row after the classes, which a network trained without dropping lacks."""
    model, recorded, _ = case_of(name)
    labels, classes = model.labels, CASES[name]["config"]["num_classes"]
    assert torch.equal(labels.embedding(recorded["y"]), recorded["label"])
    if "drop" in recorded:
        dropped = torch.where(recorded["drop"] == 1, classes, recorded["y"])
        assert torch.equal(labels.embedding(dropped), recorded["label_dropped"])
        assert torch.equal(labels.null({"class_id": recorded["y"]}, None)[0], labels.embedding.weight[classes])
    else:
        with pytest.raises(InputError, match="has no vector for no class"):
            labels.null({"class_id": recorded["y"]}, None)


@pytest.mark.parametrize("name", CASES)
def test_positions_are_the_official_tables(name: str) -> None:
    """The outputs alone cannot show them where a state dict is loaded."""
    _, recorded, _ = case_of(name)
    config, kept = CASES[name]["config"], recorded["kept.pos_embed"]
    side = config["input_size"] // config["patch_size"]
    assert torch.allclose(sine_cosine(side, side, config["hidden_size"]), kept[0], atol=1e-6)
    if config.get("use_rope"):
        cosine, sine = rotary(side, side, config["hidden_size"] // config["num_heads"])
        assert torch.allclose(cosine[0, 0], recorded["kept.feat_rope.freqs_cos"], atol=1e-6)
        assert torch.allclose(sine[0, 0], recorded["kept.feat_rope.freqs_sin"], atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_start_has_the_official_deviations(name: str) -> None:
    """Zeros exactly, deviations within the error of a sample."""
    model, _, _ = case_of(name)
    torch.manual_seed(0)
    network = model.network
    network._initialise()
    names = dit.network_names(network)
    for ours, (theirs,) in names.items():
        mean, deviation, largest = CASES[name]["init"][theirs]
        found = network.state_dict()[ours]
        if ".norm" in ours or ours.startswith("norm"):
            continue  # drawn here, ones in a new network
        if largest == 0:
            assert not found.any(), ours
        else:
            error = 6 * deviation / (2 * found.numel()) ** 0.5
            assert abs(float(found.std()) - deviation) < max(error, 0.02 * deviation) + 1e-7, ours
            assert abs(float(found.mean()) - mean) < 12 * deviation / found.numel() ** 0.5, ours


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_as_many_as_official_ones(name: str) -> None:
    """Which count the table of positions too."""
    model, recorded, _ = case_of(name)
    own = sum(parameter.numel() for parameter in model.parameters())
    assert own + recorded["kept.pos_embed"].numel() == CASES[name]["params"]


def small(**options: Any) -> DiT:
    torch.manual_seed(0)
    network = DiT(4, 4, width=32, depth=2, heads=4, **options)
    for parameter in network.parameters():  # gates and output start at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


@pytest.mark.parametrize("context", ["cross", "in_context", "both"])
@pytest.mark.parametrize("rotary_positions", [False, True])
@torch.no_grad()
def test_tokens_and_a_vector_matter_and_are_prepared_once(context: str, rotary_positions: bool) -> None:
    network = small(context_width=12, vector_width=32, context=context, rotary_positions=rotary_positions, qk_norm=True)
    x, t, tokens, vector = torch.randn(2, 4, 6, 8), torch.tensor([3.0, 90.5]), torch.randn(2, 5, 12), torch.randn(2, 32)
    conditioning = Conditioning(tokens=tokens, vector=vector)
    out = network(x, t, conditioning)
    assert out.shape == x.shape
    assert torch.equal(network(x, t, network.prepare(conditioning)), out)
    for other in (Conditioning(tokens=tokens + 1, vector=vector), Conditioning(tokens=tokens, vector=vector + 1)):
        assert not torch.allclose(network(x, t, other), out)
    order = tokens[:, torch.tensor([1, 0, 2, 3, 4])]
    assert torch.allclose(network(x, t, Conditioning(tokens=order, vector=vector)), out, atol=1e-5)


@torch.no_grad()
def test_every_image_is_its_own_and_its_places_count() -> None:
    network = small(rms_norm=True, swiglu=True, rotary_positions=True)
    x, t = torch.randn(3, 4, 8, 4), torch.tensor([1.0, 50.0, 700.0])
    out = network(x, t, Conditioning())
    assert torch.allclose(network(x[1:2], t[1:2], Conditioning()), out[1:2], atol=1e-5)
    assert not torch.allclose(network(x.roll(2, 2), t, Conditioning()), out.roll(2, 2), atol=1e-3)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    plain, again = small(), small(gradient_checkpointing=True)
    for network in (plain, again):
        network(torch.ones(2, 4, 4, 4), torch.tensor([1.0, 5.0]), Conditioning()).square().sum().backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.slow
@torch.no_grad()
def test_its_blocks_are_compiled() -> None:
    network = small(context_width=12)
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([3.0, 90.5])
    conditioning = Conditioning(tokens=torch.randn(2, 5, 12))
    out = network(x, t, conditioning)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldmlab.nn.compiling.BACKEND", "aot_eager")
        assert compile_regions(network) == 2
        assert torch.allclose(network(x, t, conditioning), out, atol=1e-6)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"backbone\.width=30 with heads=4: heads and 4 must divide the width"):
        DiT(4, 4, width=30, depth=1, heads=4)
    with pytest.raises(InputError, match=r"backbone\.context=between is unknown"):
        DiT(4, 4, width=32, depth=1, heads=4, context="between")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the DiT does not take tokens conditioning"):
        small()(torch.zeros(1, 4, 4, 4), torch.zeros(1), Conditioning(tokens=torch.zeros(1, 2, 3)))


def test_weights_of_another_configuration_are_refused() -> None:
    case = CASES["dit_p4_plain"]
    state = drawn(case)
    with pytest.raises(InputError, match=r"the network has .* missing \(blocks\.2\."):
        dit.as_official({**case["config"], "depth": 3}, state)
    with pytest.raises(InputError, match=r"1 unexpected \(more\.weight\)"):
        dit.as_official(case["config"], {**state, "more.weight": torch.zeros(3)})
