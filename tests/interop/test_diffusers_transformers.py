"""diffusers' transformers give their recorded outputs with our modules, and have their sizes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conf_files import conf_node
from drawn_weights import drawn
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.interop.diffusers import as_official
from ldmlab.interop.diffusers.diffusers_transformers import SD3, backbone_node
from ldmlab.nn.positions import sine_cosine
from modern_cases import assert_near, networks, weights_of

CASES = networks("diffusers")
TOLERANCE = 1e-5  # of the largest output; float32 runs of one network differ by 1e-6


def case_of(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network with the case's weights, and its recorded tensors."""
    state, recorded = weights_of(CASES[name], f"diffusers_{name}")
    return as_official(CASES[name]["config"], state), recorded


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_and_parameters(name: str) -> None:
    model, recorded = case_of(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == CASES[name]["params"]
    if name == "dit":
        inputs = {"timestep": recorded["t"], "class_labels": recorded["y"]}
    else:
        texts = {"encoder_hidden_states": recorded["context"], "pooled_projections": recorded["pooled"]}
        inputs = {"timestep": recorded["t"], **texts}
    assert_near(model(recorded["x"], **inputs).sample, recorded["out"], TOLERANCE)
    if "x_wide" in recorded:
        assert_near(model(recorded["x_wide"], **inputs)[0], recorded["out_wide"], TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_the_official_tensors_come_back(name: str) -> None:
    model, recorded = case_of(name)
    state = drawn(CASES[name]) | {key: recorded[f"kept.{key}"] for key in CASES[name]["kept"]}
    state.pop("pos_embed.pos_embed", None)
    found = model.official_state()  # type: ignore[operator]
    assert found.keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.items())


@pytest.mark.parametrize("name", ["sd3", "sd35"])
def test_positions_are_the_recorded_table(name: str) -> None:
    """The outputs alone cannot show where the table of the file would differ from ours."""
    model, recorded = case_of(name)
    network: Any = model.network
    side, scale = network.position_grid, network.position_base / network.position_grid
    table = recorded["kept.pos_embed.pos_embed"][0]
    assert torch.allclose(sine_cosine(side, side, network.width, scale=scale), table, atol=1e-6)
    middle = table.unflatten(0, (side, side))[2:10, 4:8].flatten(0, 1)
    assert torch.allclose(network._places(8, 4, torch.device("cpu")), middle, atol=1e-6)


@pytest.mark.parametrize("preset", ["sd3_medium", "sd35_medium", "sd35_large"])
def test_presets_are_as_large_as_diffusers_classes(preset: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    node = conf_node("backbone", f"mmdit_{preset}")
    config = {
        **{"num_layers": node["depth"], "num_attention_heads": node["heads"], "attention_head_dim": 64},
        **{"caption_projection_dim": node["width"], "pos_embed_max_size": 2, "joint_attention_dim": 4096},
        **{"dual_attention_layers": tuple(node["dual_attention"]), "pooled_projection_dim": 2048},
        **{"qk_norm": "rms_norm" if node["qk_norm"] else None},
    }
    widths = {"in_channels": 16, "out_channels": 16, "context_width": 4096, "vector_width": 2048}
    with torch.device("meta"):
        theirs, ours = getattr(diffusers, SD3)(**config), instantiate({**node, **widths}, where="backbone")
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (ours, theirs)]
    assert counts[0] == counts[1]
    assert counts[0] > 2e9


def test_what_does_not_fit_is_refused() -> None:
    case = CASES["dit"]
    with pytest.raises(InputError, match=r"with qk_norm=layer_norm is not supported; supported: None or rms_norm"):
        backbone_node({**CASES["sd35"]["config"], "qk_norm": "layer_norm"})
    with pytest.raises(InputError, match="caption_projection_dim=32 and a width of 64 is not supported"):
        backbone_node({**CASES["sd3"]["config"], "caption_projection_dim": 32})
    with pytest.raises(InputError, match="the transformer's class UNet2DModel is not supported"):
        as_official({"_class_name": "UNet2DModel"}, {})
    less = {name: tensor for name, tensor in drawn(case).items() if ".1.attn1" not in name}
    with pytest.raises(InputError, match=r"has 8 missing \(.*\), 1 unexpected \(more\.weight\)"):
        as_official(case["config"], {**less, "more.weight": torch.zeros(3)})
