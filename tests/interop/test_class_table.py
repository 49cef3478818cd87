"""U-Nets with a class table inside (`num_classes`): their rows become a vector conditioner, and go back."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from official_files import VOCABULARY, official_state, small_config
from torch import Tensor

import ldmlab
from drawn_weights import weight_by_rule
from ldmlab.app.cli import dispatch
from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError
from ldmlab.interop import compvis
from ldmlab.interop.compvis import compvis_networks, describe
from ldmlab.interop.diffusers.diffusers_networks import unet_part
from ldmlab.interop.diffusers.diffusers_unets import configuration

diffusers = pytest.importorskip("diffusers")
CLASSES, WIDTH = 5, 128
TABLE = "model.diffusion_model.label_emb.weight"
AVERAGED = "model_ema.diffusion_modellabel_embweight"
State = dict[str, Tensor]


def config_of(layout: str, key: str) -> dict[str, Any]:
    """A released configuration at small width whose U-Net has a class table."""
    config = small_config(layout)
    params = config["model"]["params"]
    params["unet_config"]["params"]["num_classes"] = CLASSES
    params["conditioning_key"] = key
    if key == "adm":
        params |= {"cond_stage_key": "class_label", "cond_stage_config": {"target": "torch.nn.Identity"}}
    return config


PLAIN = config_of("ldm__celeba256", "adm")
TEXT = config_of("txt2img-1p4B-eval", "crossattn-adm")


def whole_file(config: dict[str, Any], *, averages: bool = True) -> State:
    state = official_state(config, averages=averages)
    state.pop("cond_stage_model.label_emb.weight")
    state[TABLE] = 15 * weight_by_rule(TABLE, (CLASSES, WIDTH))  # rows of about unit variance
    return state | ({AVERAGED: 15 * weight_by_rule(TABLE, (CLASSES, WIDTH), salt=1)} if averages else {})


def their_network(arguments: dict[str, Any], state: State, table: Tensor) -> Any:
    """diffusers' class for an architecture of ours, with our weights and the table inside."""
    kind, config = configuration(arguments, sample_size=8, linear_projection=False, classes=len(table))
    theirs = getattr(diffusers, kind).from_config(config).eval()
    node = {"_target_": "ldmlab.backbones.unet.UNet", **arguments}
    tensors = unet_part(node, kind, linear_projection=False).to_foreign(state)
    theirs.load_state_dict({**tensors, "class_embedding.weight": table})
    return theirs


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("config", [PLAIN, TEXT], ids=["classes", "classes and text"])
def test_the_official_network_gives_what_diffusers_gives_with_its_table(config: dict[str, Any]) -> None:
    params = config["model"]["params"]["unet_config"]["params"]
    state = whole_file(config)
    unet = compvis.build_unet(params, state)
    theirs = their_network(compvis_networks.unet_arguments(params), dict(unet.state_dict()), state[TABLE])
    for network in (unet, theirs):
        network.double()  # group norms of single pixels magnify float32's rounding to 1e-4
    table = state[TABLE].double()
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(3, params["in_channels"], 8, 8, generator=drawn, dtype=torch.float64)
    t, classes = torch.tensor([1, 500, 999]), torch.tensor([0, 4, 2])
    shape = (3, 6, params.get("context_dim", 0))
    tokens = torch.randn(shape, generator=drawn, dtype=torch.float64) if "context_dim" in params else None
    inputs = {} if tokens is None else {"encoder_hidden_states": tokens}
    expected = theirs(x, t, class_labels=classes, **inputs).sample
    found = unet(x, t, Conditioning(tokens=tokens, vector=table[classes]))
    assert torch.allclose(found, expected, atol=1e-5)  # diffusers embeds times in float32, whatever its weights
    other = unet(x, t, Conditioning(tokens=tokens, vector=table[classes.flip(0)]))
    assert not torch.allclose(other, expected, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("config", [PLAIN, TEXT], ids=["classes", "classes and text"])
@pytest.mark.parametrize("weights", ["averaged", "raw"])
def test_a_whole_file_gives_a_class_conditioner_and_comes_back(config: dict[str, Any], weights: str) -> None:
    state = whole_file(config)
    imported = describe(state, config, weights=weights)
    node = imported.spec["conditioners"]["class_label"]
    assert {name: node[name] for name in ("classes", "slot", "null_row")} == {
        "classes": CLASSES,
        "slot": "vector",
        "null_row": False,
    }
    table = imported.parts["conditioner"]["class_label.embedding.weight"]
    assert torch.equal(table, state[AVERAGED if weights == "averaged" else TABLE])
    exported, again = compvis.export(imported.spec, imported.parts)
    assert torch.equal(exported[TABLE], table)
    assert not any(key.startswith("cond_stage_model.") and "label" in key for key in exported)
    params = again["model"]["params"]
    assert params["unet_config"]["params"]["num_classes"] == CLASSES
    assert params["conditioning_key"] == config["model"]["params"]["conditioning_key"]
    back = describe(exported, again)
    assert back.spec["conditioners"] == imported.spec["conditioners"]
    assert back.spec["backbone"] == imported.spec["backbone"]
    for part, tensors in imported.parts.items():
        assert tensors.keys() == back.parts[part].keys()
        assert all(torch.equal(tensor, back.parts[part][name]) for name, tensor in tensors.items())


@pytest.mark.slow
def test_the_commands_there_and_back(tmp_path: Path) -> None:
    torch.save({"state_dict": whole_file(PLAIN)}, tmp_path / "official.ckpt")
    (tmp_path / "official.yaml").write_text(yaml.safe_dump(PLAIN))
    paths = [str(tmp_path / name) for name in ("official.ckpt", "model", "official.yaml", "back", "pipeline")]
    assert dispatch(["import", paths[0], paths[1], "--config", paths[2]]) == 0
    model = ldmlab.load(paths[1], device="cpu")
    one, two = (model.sample(class_id=[number], steps=2, seed=0) for number in (1, 3))
    assert one.shape == (1, 32, 32, 3)
    assert not torch.equal(torch.as_tensor(one), torch.as_tensor(two))
    with pytest.raises(InputError, match="guidance"):
        model.sample(class_id=[1], steps=2, guidance_scale=2.0)
    for target, kind in ((paths[3], "compvis"), (paths[4], "diffusers")):
        assert dispatch(["export", "--without-card", paths[1], target, "--format", kind]) == 0
    again = compvis.load(tmp_path / "back/model.ckpt", tmp_path / "back/config.yaml", device="cpu")
    assert torch.equal(torch.as_tensor(again.sample(class_id=[1], steps=2, seed=0)), torch.as_tensor(one))


@pytest.fixture(autouse=True)
def vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few words for the text transformers, where fetched files lie."""
    monkeypatch.setenv("LDMLAB_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/bert-base-uncased-vocab.txt").write_text("\n".join(VOCABULARY))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditioning_key": None}, r"conditioning_key: None with num_classes=5"),
        ({"conditioning_key": "hybrid-adm"}, r"conditioning_key: hybrid-adm cannot be imported"),
        (
            {"cond_stage_config": {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {}}},
            r"ClassEmbedder in front of the U-Net's own class table",
        ),
    ],
)
def test_conditioning_that_is_no_class_number_is_refused(change: dict[str, Any], message: str) -> None:
    config = {"model": {"params": PLAIN["model"]["params"] | change}}
    with pytest.raises(InputError, match=message):
        describe(whole_file(PLAIN, averages=False), config)


def test_tables_that_do_not_fit_are_refused() -> None:
    params = PLAIN["model"]["params"]["unet_config"]["params"]
    state = whole_file(PLAIN, averages=False)
    lost = {name: tensor for name, tensor in state.items() if name != TABLE}
    with pytest.raises(InputError, match=r"1 missing \(label_emb.weight\)"):
        describe(lost, PLAIN)
    small = state | {TABLE: torch.zeros(4, WIDTH)}
    for build in (lambda: describe(small, PLAIN), lambda: compvis.build_unet(params, small)):
        with pytest.raises(InputError, match=r"label_emb.weight \[4, 128\] instead of \[5, 128\]"):
            build()
    with pytest.raises(InputError, match=r"num_classes=continuous is not supported"):
        compvis.build_unet(params | {"num_classes": "continuous"})
    plain = small_config("ldm__celeba256")
    with pytest.raises(InputError, match=r"1 unexpected \(label_emb.weight\)"):
        describe(state, plain)
    adm = {"model": {"params": plain["model"]["params"] | {"conditioning_key": "adm"}}}
    with pytest.raises(InputError, match=r"conditioning_key: adm with num_classes=None"):
        describe(lost, adm)


def test_vectors_of_another_kind_have_no_official_place() -> None:
    imported = describe(whole_file(PLAIN, averages=False), PLAIN)
    projected = imported.spec["backbone"] | {"project_vector": True}
    with pytest.raises(InputError, match=r"as they are \(backbone.project_vector=false\)"):
        compvis_networks.unet_params_of(projected, CLASSES)
