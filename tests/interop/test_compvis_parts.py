"""Official configurations and state dicts through the public builders: outputs, gradients, round trips, refusals."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from official_files import ASSETS, LAYOUTS, MODELS
from safetensors.torch import load_file
from torch import Tensor, nn

from drawn_weights import TOLERANCE, drawn
from ldmlab.backbones.unet import UNet
from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError
from ldmlab.interop import compvis
from ldmlab.interop.compvis import describe

FOLDER = ASSETS / "compvis"
CASES: dict[str, Any] = {
    name: case
    for file in ("unets", "autoencoders", "conditioners")
    for name, case in json.loads((FOLDER / f"{file}.json").read_text()).items()
}
TARGETS = {"text_transformer": "BERTEmbedder", "class_embedder": "ClassEmbedder", "spatial_rescaler": "SpatialRescaler"}


def official(name: str) -> dict[str, Tensor]:
    return drawn(CASES[name])


def build(name: str, state: dict[str, Tensor] | None) -> nn.Module:
    config = CASES[name]["config"]
    if name in TARGETS:
        return compvis.build_conditioner(f"ldm.modules.encoders.modules.{TARGETS[name]}", config, state)
    return (compvis.build_unet if name.startswith("unet") else compvis.build_first_stage)(config, state)


def outputs(name: str, module: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    if name.startswith("unet"):
        return {"out": module(given["x"], given["t"], Conditioning(tokens=given.get("context")))}
    if name == "autoencoder_kl":
        posterior = module.encode(given["x"])
        made = {"mean": posterior.mean, "logvar": posterior.logvar}
        return made | {"reconstruction": module.decode(posterior.mean)}
    if name == "autoencoder_vq":
        z = module.encode(given["x"]).mean
        return {"z": z, "reconstruction": module.decode(z)}
    run: dict[str, Callable[[], Tensor]] = {
        "text_transformer": lambda: module.transformer(given["tokens"]),
        "class_embedder": lambda: module({"class_id": given["y"]}, None),
        "spatial_rescaler": lambda: module.rescale(given["x"]),
    }
    return {"out": run[name]()}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str) -> None:
    state, recorded = official(name), load_file(FOLDER / f"{name}.safetensors")
    module = build(name, state)
    for key, made in outputs(name, module.eval(), recorded).items():
        torch.testing.assert_close(made, recorded[key], atol=TOLERANCE, rtol=0)
    sum(out.square().mean() for out in outputs(name, module, recorded).values()).backward()  # type: ignore[union-attr]
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert sum(p.numel() for p in module.parameters()) == CASES[name]["params"]


@pytest.mark.parametrize("name", CASES)
def test_prefix_is_optional_and_tensors_are_not_copied(name: str) -> None:
    state = official(name)
    prefix = next(
        p for p in ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.") if p in next(iter(state))
    )
    bare = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    whole = {**state, "betas": torch.ones(3), "model_ema.decay": torch.ones(())}
    ours = [build(name, given).state_dict() for given in (state, bare, whole)]
    memory = {tensor.data_ptr() for tensor in state.values()}
    for module in ours:
        assert all(torch.equal(module[key], ours[0][key]) for key in module)
        assert {tensor.data_ptr() for tensor in module.values()} <= memory
    fresh = build(name, None)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in ours[0].items()}


@pytest.mark.parametrize("name", CASES)
def test_misfits_are_listed_together(name: str) -> None:
    state = official(name)
    first, last = next(iter(state)), next(reversed(state))
    if first != last:
        lost = state.pop(first).shape
        state[f"{first}_renamed"] = torch.zeros(lost)
    state[last] = torch.zeros(1, 2, 3)
    with pytest.raises(InputError) as refused:
        build(name, state)
    bare = last.partition("model.")[2].removeprefix("diffusion_model.")
    assert f"{bare} [1, 2, 3] instead of {list(CASES[name]['keys'][last])}" in str(refused.value)
    assert first == last or ("1 missing" in str(refused.value) and "_renamed" in str(refused.value))


def test_other_precisions_become_float32() -> None:
    state = {key: tensor.half() for key, tensor in official("unet_concat").items()}
    unet = build("unet_concat", state)
    assert {p.dtype for p in unet.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": "continuous"}, "num_classes=continuous"),
        ({"conv_resample": False}, "conv_resample=False"),
        ({"model_chanels": 3}, "model_chanels=3 is no option"),
        ({"transformer_depth": [1, 2]}, "differs between levels"),
        ({"context_dim": None}, "no context_dim"),
    ],
)
def test_other_unets_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compvis.build_unet(CASES["unet_crossattn"]["config"] | change)


@pytest.mark.parametrize("change", [{"attn_type": "linear"}, {"out_ch": 4}, {"double_z": False}, {"unknown": 1}])
def test_other_first_stages_are_refused(change: dict[str, Any]) -> None:
    config = CASES["autoencoder_kl"]["config"]
    with pytest.raises(InputError, match=f"ddconfig.{next(iter(change))}="):
        compvis.build_first_stage(config | {"ddconfig": config["ddconfig"] | change})


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_released_layouts(name: str) -> None:
    """Every tensor and shape of the 22 released files, there and back, without a weight in memory."""
    layout = LAYOUTS[name]
    state = {key: torch.empty(shape, device="meta") for key, shape in layout["keys"].items()}
    if layout["config"].get("scale_by_std"):
        state["scale_factor"] = torch.tensor(0.7)
    imported = describe(state, {"target": layout["target"], "params": layout["config"]})
    sizes = {part: sum(t.numel() for t in tensors.values()) for part, tensors in imported.parts.items()}
    counted = {"unet": "denoiser"}
    assert sizes == {counted.get(part, part): count for part, count in layout["params"].items() if count}
    assert all(t.is_meta for part in imported.parts.values() for t in part.values())
    exported, config = compvis.export(imported.spec, imported.parts)
    assert {k: list(t.shape) for k, t in exported.items() if t.is_meta} == layout["keys"]
    again = describe(exported, config)
    assert again.spec == imported.spec
    assert {k: set(v) for k, v in again.parts.items()} == {k: set(v) for k, v in imported.parts.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_released_networks_through_the_builders(name: str) -> None:
    """A whole file's state dict serves each builder, and only its own part is taken."""
    layout = LAYOUTS[name]
    state = {key: torch.empty(shape, device="meta") for key, shape in layout["keys"].items()}
    config = layout["config"]
    unet = compvis.build_unet(config["unet_config"]["params"], state)
    assert isinstance(unet, UNet)
    first = config["first_stage_config"]
    stage = compvis.build_first_stage(first["params"], state, first["target"])
    for module, part in ((unet, "unet"), (stage, "first_stage")):
        assert sum(p.numel() for p in module.parameters()) == layout["params"][part]
    stage = config["cond_stage_config"]
    if isinstance(stage, dict) and "params" in stage:
        conditioner = compvis.build_conditioner(stage["target"], stage["params"], state)
        assert sum(p.numel() for p in conditioner.parameters()) == layout["params"]["conditioner"]
