"""conditioner=text_sd3: SD3's three text encoders in a run of one's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conf_files import conf_node
from ldmlab.app.conditioning import build_conditioners
from ldmlab.app.plans import sized_backbone
from ldmlab.contracts import Conditioning, LatentSpec
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate

LATENT = LatentSpec(channels=4, height=8, width=8, downsampling=8)
OFFICIAL = {"clip": 123_650_304, "clip_2": 694_659_840, "t5": 4_762_310_656}  # as transformers counts them


@pytest.mark.slow
def test_the_encoders_have_the_published_sizes() -> None:
    with torch.device("meta"):
        text: Any = instantiate({**conf_node("conditioner", "text_sd3"), "vocab": "t5.json"}, where="conditioner")
    assert {name: sum(p.numel() for p in getattr(text, name).parameters()) for name in OFFICIAL} == OFFICIAL
    assert text.pooled_width == 2048
    assert not [p for p in text.parameters() if p.requires_grad]


def small(**more: Any) -> dict[str, Any]:
    node = conf_node("conditioner", "text_sd3")
    for name, width in (("clip", 16), ("clip_2", 24)):
        text = {**node[name]["text_cfg"], "width": width, "heads": 2, "layers": 2}
        text |= {"context_length": 12, "vocab_size": 600}
        node[name] = {**node[name], "embed_dim": width + 8, "text_cfg": text}
    return {**node, "width": 48, "t5": None, "t5_length": 3, "vocab": None, "weights": None, **more}


def test_a_run_of_ones_own(tmp_path: Path) -> None:
    """Weights of an imported model; the network's widths follow; model.yaml holds no path of weights."""
    torch.manual_seed(0)
    source: Any = instantiate(small(), where="conditioner")
    state = {f"text.{name}": tensor for name, tensor in source.state_dict().items()}
    save_file({**state, "text.t5.norm.weight": torch.ones(48)}, tmp_path / "conditioner.safetensors")
    modules, nodes = build_conditioners({"text": small(weights=f"{tmp_path}/conditioner.safetensors")}, LATENT)
    batch = {"caption": ["a red apple", ""]}
    tokens = modules["text"](batch, None)
    assert torch.equal(tokens, source(batch, None))
    assert tokens.shape == (2, 2 + 12 + 3, 48)  # pooled states of 24 + 32 in rows of 48, towers side by side
    assert torch.equal(modules["text"].null(batch, None)[1], tokens[1])
    assert "weights" not in nodes["text"]
    with pytest.raises(InputError, match=r"conditioner\.text\.weights has no value"):
        build_conditioners({"text": small()}, LATENT)
    assert instantiate(nodes["text"], where="conditioner").state_dict().keys() == source.state_dict().keys()
    node = {**conf_node("backbone", "mmdit_s_2"), "width": 32, "depth": 1, "heads": 2}
    node = sized_backbone(node, LATENT, modules)
    assert (node["context_width"], node["vector_width"], node["pooled_width"]) == (48, None, 56)
    network: Any = instantiate(node, where="backbone")
    x = torch.randn(2, 4, 8, 8)
    assert network(x, torch.tensor([1.0, 500.0]), Conditioning(tokens=tokens)).shape == x.shape


def test_weights_of_other_encoders_are_refused(tmp_path: Path) -> None:
    save_file({"text.clip.projection.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"conditioner\.weights=.* holds no encoders of these sizes"):
        instantiate(small(weights=str(tmp_path / "other.safetensors")), where="conditioner")
    with pytest.raises(InputError, match="is missing"):
        instantiate(small(weights=str(tmp_path / "none.safetensors")), where="conditioner")
