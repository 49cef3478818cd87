"""EDM's U-Nets give the official outputs under every preconditioning, and have the official sizes and start."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conf_files import conf_node
from ldmlab.backbones.edm_unet import EdmUNet
from ldmlab.contracts import Conditioning
from ldmlab.diffusion.parameterization import (
    EdmPrediction,
    EpsPrediction,
    LearnedVariance,
    Parameterization,
    ScorePrediction,
)
from ldmlab.diffusion.paths import EdmPath, VarianceExplodingPath, VariancePreservingPath
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.interop import edm
from ldmlab.interop.renaming import unfilled
from ldmlab.nn.compiling import compile_regions
from modern_cases import assert_near, networks, weights_of

CASES = networks("edm")
TOLERANCE = 1e-5  # of the largest value; float32 runs of one network differ by 4e-6
FORMS: dict[str, tuple[Any, Any]] = {  # class => our path and prediction
    "EDMPrecond": (EdmPath(), EdmPrediction(0.5)),
    "VPPrecond": (VariancePreservingPath(0.0, 999.0), EpsPrediction()),
    "VEPrecond": (VarianceExplodingPath(), ScorePrediction(times_sigma=True)),
}


def case_of(name: str) -> tuple[edm.OfficialPrecond, dict[str, Tensor]]:
    """The network with the case's weights, and its recorded tensors."""
    state, recorded = weights_of(CASES[name], name)
    return edm.as_official(CASES[name]["config"], state), recorded


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_and_parameters(name: str) -> None:
    model, recorded = case_of(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == CASES[name]["params"]
    inputs = recorded["x"], recorded["sigma"], recorded.get("labels")
    assert_near(model(*inputs), recorded["out"], TOLERANCE)
    if "augment_labels" in recorded:
        assert_near(model(*inputs, augment_labels=recorded["augment_labels"]), recorded["out_augmented"], TOLERANCE)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_our_paths_and_predictions_are_the_preconditionings(name: str) -> None:
    model, recorded = case_of(name)
    form = Parameterization(*reversed(FORMS[CASES[name]["config"]["precond"]]))
    for i, (x, sigma) in enumerate(zip(recorded["x"], recorded["sigma"], strict=True)):
        level = form.path.level_at(float(sigma))
        x = level.alpha * x[None]  # ours is scaled where theirs is not
        labels = recorded["labels"][i : i + 1] if "labels" in recorded else None
        output = model.raw(form.scaled(x, level.alpha, level.sigma), torch.tensor([level.time]), labels)
        assert_near(form.clean(x, output, level), recorded["out"][i : i + 1])


@torch.no_grad()
def test_the_preconditioning_of_iddpm_is_a_learned_variance_on_the_cosine_schedule() -> None:
    config = {**CASES["edm_adm"]["config"], "precond": "iDDPMPrecond"}
    torch.manual_seed(0)
    model = edm.OfficialPrecond(config, {"network": replace(edm.network_part(config), module=started(config))}).eval()
    nodes = edm.diffusion_nodes(config)  # as an imported file has them
    form = Parameterization(*(instantiate(nodes[name], where=name) for name in ("prediction", "schedule")))
    assert isinstance(form.prediction, LearnedVariance)
    clean = torch.randn(1, 4, 16, 16)
    for time in (0, 500, 990):
        level = form.path.level(time)
        output = model.raw(level.alpha * clean, torch.tensor([float(time)]))
        ours = form.clean(level.alpha * clean, form.split(output)[0], level)
        assert_near(model(clean, torch.tensor([level.sigma / level.alpha])), ours)


def test_the_noise_levels_of_iddpm() -> None:
    """Levels and times that NVlabs/edm's iDDPMPrecond gave; a file holds the levels, which must be its arguments'."""
    config = {**CASES["edm_adm"]["config"], "precond": "iDDPMPrecond", "M": 100, "C_1": 0.01, "C_2": 0.02}
    levels = edm.noise_levels(config)
    recorded = [649.0689697265625, 64.8992691040039, 32.441925048828125, 1.0303349494934082, 0.03445584699511528, 0.0]
    assert_near(levels[[0, 1, 2, 50, 99, 100]], torch.tensor(recorded), 1e-7)
    part = edm.network_part(config)
    state = {name: torch.zeros(tensor.shape) for name, tensor in part.expected.items()} | {"u": levels}
    model = edm.as_official(config, state)
    sigma = torch.tensor([300.0, 80.0, 10.0, 2.0, 0.7, 0.05, 0.004])
    assert model.c_noise(sigma).tolist() == [98, 98, 92, 69, 37, 1, -1]
    with pytest.raises(InputError, match="u of the file are not the noise levels of M, C_1 and C_2"):
        edm.as_official(config | {"C_2": 0.008}, state)
    with pytest.raises(InputError, match=r"iDDPMPrecond with C_1=0\.01 is not supported"):
        edm.diffusion_nodes(config)


def started(config: dict[str, Any]) -> EdmUNet:
    """A network of the configuration with the weights that training starts from."""
    return EdmUNet(**{name: value for name, value in edm.backbone_node(config).items() if name != "_target_"})


@pytest.mark.parametrize("name", CASES)
def test_the_start_is_the_official_one(name: str) -> None:
    torch.manual_seed(0)
    part = edm.network_part(CASES[name]["config"])
    state = part.to_foreign(started(CASES[name]["config"]).state_dict())
    statistics = {key: row for key, row in CASES[name]["init"].items() if not key.endswith("resample_filter")}
    assert state.keys() == statistics.keys()
    for key, (mean, deviation, largest) in statistics.items():
        if largest == 0 or deviation == 0:
            assert torch.equal(state[key], torch.full_like(state[key], mean)), key
        else:
            assert abs(float(state[key].std()) / deviation - 1) < 4 / state[key].numel() ** 0.5, key


@pytest.mark.parametrize(
    ("preset", "classes", "millions"), [("adm", 1000, 296), ("ddpmpp", None, 56), ("ncsnpp", None, 56)]
)
def test_parameters_of_the_presets(preset: str, classes: int | None, millions: int) -> None:
    """As the paper's networks; the classes are those of ImageNet."""
    node = conf_node("backbone", f"edm_{preset}")
    network = unfilled({**node, "in_channels": 3, "out_channels": 3, "vector_width": classes}, "backbone")
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == millions


def small(form: str = "song", **options: Any) -> EdmUNet:
    torch.manual_seed(0)
    sizes = {"channel_mult": (1, 2), "num_res_blocks": 1, "attention_downsampling": (2,), "head_channels": 16}
    network = EdmUNet(**{"in_channels": 3, "out_channels": 3, "model_channels": 16, "form": form, **sizes, **options})
    for parameter in network.parameters():  # last layers are all but zero at the start
        torch.nn.init.normal_(parameter, std=0.1)
    return network


NCSN = {"encoder": "residual", "fourier": True, "resample_filter": (1, 3, 3, 1), "noise_channels": 32}


@pytest.mark.slow
@pytest.mark.parametrize(("form", "options"), [("adm", {}), ("song", NCSN), ("song", {"encoder": "skip"})])
@torch.no_grad()
def test_its_blocks_are_compiled_and_it_takes_every_slot(form: str, options: dict[str, Any]) -> None:
    network = small(form, in_channels=5, vector_width=4, augment_width=2, decoder="skip", **options).eval()
    x, t = torch.randn(2, 3, 8, 12), torch.tensor([0.3, -0.5])
    conditioning = Conditioning(vector=torch.randn(2, 6), spatial=torch.randn(2, 2, 8, 12))
    out = network(x, t, conditioning)
    assert out.shape == x.shape
    assert torch.equal(network(x, t, network.prepare(conditioning)), out)
    assert conditioning.vector is not None
    bare = conditioning.vector * (torch.arange(6) < 4)
    short = replace(conditioning, vector=conditioning.vector[:, :4])
    assert_near(network(x, t, short), network(x, t, replace(conditioning, vector=bare)), 1e-6)
    moved = [replace(conditioning, spatial=torch.zeros(2, 2, 8, 12))]
    moved += [replace(conditioning, vector=conditioning.vector + (torch.arange(6) == i)) for i in (0, 5)]
    assert not any(torch.allclose(network(x, t, other), out) for other in moved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldmlab.nn.compiling.BACKEND", "aot_eager")
        assert compile_regions(network) == 10
        assert_near(network(x, t, conditioning), out, TOLERANCE)


@pytest.mark.parametrize(("form", "width"), [("adm", None), ("song", None), ("song", 4), ("adm", 4)])
def test_augmentation_labels_may_be_left_out(form: str, width: int | None) -> None:
    """Zero labels: the same output and a gradient of zero for their layer; with them another image."""
    network = small(form, vector_width=width, augment_width=9, dropout=0.0)
    x, t, labels = torch.randn(2, 3, 4, 4), torch.tensor([0.3, -0.5]), torch.randn(2, 9)
    vector = torch.randn(2, width or 0)

    def out(*parts: torch.Tensor) -> torch.Tensor:
        given = torch.cat(parts, dim=1)
        return network(x, t, Conditioning(vector=given if given.shape[1] else None))

    plain = out(vector)
    assert_near(out(vector, torch.zeros(2, 9)), plain, 1e-6)
    assert not torch.allclose(out(vector, labels), plain, atol=1e-3)
    plain.sum().backward()
    assert network.augment is not None
    assert torch.equal(torch.as_tensor(network.augment.weight.grad), torch.zeros_like(network.augment.weight))
    with pytest.raises(InputError, match=r"the EDM U-Net (needs|does not take) vector"):
        out(torch.randn(2, 0 if width else 5))


@torch.no_grad()
def test_inputs_and_outputs_of_every_level() -> None:
    """`skip`: outputs of the levels are summed, and the input joins below the first level."""
    network = small(decoder="skip", encoder="skip").eval()
    x, t = torch.ones(1, 3, 8, 8), torch.zeros(1)
    for i, conv in enumerate(network.convs_out):
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.constant_(conv.bias, 10.0**i)  # type: ignore[arg-type]
    assert torch.equal(network(x, t, Conditioning()), torch.full_like(x, 11.0))
    names = edm.network_part({**CASES["edm_ncsnpp"]["config"], "encoder_type": "skip", "decoder_type": "skip"}).expected
    shapes = {key: tuple(names[f"model.{key}.weight"].shape) for key in ("enc.8x8_aux_skip", "dec.8x8_aux_conv")}
    assert shapes == {"enc.8x8_aux_skip": (16, 3, 1, 1), "dec.8x8_aux_conv": (3, 32, 3, 3)}


@pytest.mark.parametrize(("form", "options"), [("adm", {}), ("song", NCSN)])
def test_recomputed_blocks_give_the_same_gradients(form: str, options: dict[str, Any]) -> None:
    plain, again = (small(form, gradient_checkpointing=way, dropout=0.0, **options) for way in (False, True))
    for network in (plain, again):
        network(torch.ones(2, 3, 4, 4), torch.tensor([1.0, 0.5]), Conditioning()).square().sum().backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, torch.as_tensor(b.grad))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"form": "unet"}, r"backbone\.form=unet is unknown"),
        ({"encoder": "both"}, r"backbone\.encoder=both is unknown"),
        ({"resample_filter": (1, 2, 1)}, r"resample_filter=\[1, 2, 1\] must be of even length"),
        ({"noise_channels": 17}, "noise_channels=17 be even and above 2"),
        ({"augment_width": -1}, r"augment_width=-1 is less than 0"),
        ({"head_channels": 64}, r"head_channels=64 does not fit a level of 32 channels"),
        ({"num_res_blocks": 0}, r"num_res_blocks=0 is less than 1"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        small(**options)


def test_weights_that_do_not_fit_are_refused() -> None:
    config, (state, _) = CASES["edm_ncsnpp"]["config"], weights_of(CASES["edm_ncsnpp"], "edm_ncsnpp")
    with pytest.raises(InputError, match=r"resample_filter of the file is not resample_filter=\[1\.0, 1\.0\]"):
        edm.as_official({**config, "resample_filter": [1, 1]}, state)
    with pytest.raises(InputError, match=r"1 unexpected \(more\.weight\)"):
        edm.as_official(config, {**state, "more.weight": torch.zeros(3)})
    with pytest.raises(InputError, match="depth is no argument of the official network"):
        edm.as_official({**config, "depth": 3}, state)
    with pytest.raises(InputError, match="precond=Precond is unknown"):
        edm.as_official({**config, "precond": "Precond"}, state)
    with pytest.raises(InputError, match="the EDM U-Net does not take vector conditioning"):
        small()(torch.zeros(1, 3, 4, 4), torch.zeros(1), Conditioning(vector=torch.zeros(1, 2)))
