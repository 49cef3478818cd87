"""The magnitude-preserving U-Net gives the official EDM2 outputs and gradients, and has the official sizes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conf_files import conf_node
from drawn_weights import drawn, named_normal
from ldmlab.backbones.edm2_unet import EDM2UNet
from ldmlab.conditioners.class_label import OneHotClass
from ldmlab.contracts import Conditioning
from ldmlab.diffusion.diffusion_loss import Objective
from ldmlab.diffusion.parameterization import EdmPrediction
from ldmlab.diffusion.paths import EdmPath
from ldmlab.diffusion.time_sampling import LogNormalSigma
from ldmlab.diffusion.weighting import EdmWeighting, LearnedLogVariance
from ldmlab.errors import InputError
from ldmlab.interop import edm2
from ldmlab.nn.compiling import compile_regions
from ldmlab.nn.magnitude import MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize, resample
from modern_cases import ASSETS, assert_near, networks, weights_of

CASES = networks("edm2")
TOLERANCE = 1e-5  # of the largest value; float32 runs of one network differ by 1e-6


def case_of(name: str) -> tuple[edm2.OfficialPrecond, dict[str, Tensor]]:
    """The network with the case's weights, and its recorded tensors."""
    state, recorded = weights_of(CASES[name], name)
    return edm2.as_official(CASES[name]["config"], state), recorded


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_and_log_variance(name: str) -> None:
    model, recorded = case_of(name)
    labels, data = recorded.get("labels"), CASES[name]["config"]["sigma_data"]
    out, log_variance = model(recorded["x"], recorded["sigma"], labels, return_logvar=True)
    assert_near(out, recorded["out"], TOLERANCE)
    assert_near(log_variance, recorded["logvar"], TOLERANCE)
    if labels is not None:
        assert_near(model(recorded["x"], recorded["sigma"]), recorded["out_nolabel"], TOLERANCE)
    sigma = recorded["sigma"]
    scaled = recorded["x"] / (sigma**2 + data**2).sqrt()[:, None, None, None]
    assert_near(model.raw(scaled, sigma.log() / 4, labels), recorded["raw"], TOLERANCE)
    padded = torch.cat([recorded["x"], torch.ones_like(recorded["x"][:, :1])], dim=1)
    assert_near(model.network.encoder[0](padded), recorded["first_conv"], TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_training_forces_unit_weights_and_has_the_official_gradients(name: str) -> None:
    """EDM2's loss (equations 14 to 21) with the recorded draws, with the log-variance and then without."""
    model, recorded = case_of(name)
    images, data, labels = recorded["images"], CASES[name]["config"]["sigma_data"], recorded.get("labels")
    sigma = (named_normal("noise.1", len(images), 1, 1, 1) - 0.4).exp()
    assert torch.allclose(sigma.flatten(), recorded["loss_sigma"], rtol=1e-6)
    noisy = images + sigma * named_normal("noise.2", *images.shape)
    weight = (sigma**2 + data**2) / (sigma * data) ** 2
    clean, log_variance = model.train()(noisy, sigma, labels, return_logvar=True)
    loss = weight * (clean - images) ** 2 / log_variance.exp() + log_variance
    assert_near(loss.detach(), recorded["loss"], TOLERANCE)
    loss.mean().backward()
    gradients = model.official_gradients()
    squares = weight * (model(noisy, sigma, labels) - images) ** 2  # weights change a second time, as in the run
    assert_near(squares.detach(), recorded["loss_without_logvar"], TOLERANCE)
    weights = model.official_state()
    for key, theirs in recorded.items():
        kind, _, tensor = key.partition(".")
        if kind == "after":
            assert_near(weights[tensor], theirs, TOLERANCE)
        elif kind == "grad":
            assert_near(gradients[tensor], theirs, TOLERANCE)
    for tensor, norm in CASES[name]["grad_norm"].items():
        assert abs(float(gradients[tensor].norm()) - norm) < 1e-4 * max(norm, 1e-2), tensor
    with torch.no_grad():
        again = model.eval()(recorded["x"], recorded["sigma"], labels)
    assert_near(again, recorded["out_after_training_forward"], TOLERANCE)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("learned", [True, False])
def test_our_objective_is_the_official_loss(name: str, learned: bool) -> None:
    """EDM's path, prediction and weighting, with EDM2's log-variance: the mean over the values of an image."""
    model, recorded = case_of(name)
    settings = {"P_mean": -0.4, "P_std": 1.0, "sigma_data": 0.5} | CASES[name]["arguments"]["loss"]
    images, labels = recorded["images"], recorded.get("labels")
    weighting: Any = EdmWeighting(settings["sigma_data"])
    if learned:
        model.head.weighting = weighting
        weighting = model.head
    times = LogNormalSigma(settings["P_mean"], settings["P_std"])
    objective = Objective(EdmPath(), EdmPrediction(CASES[name]["config"]["sigma_data"]), times, weighting).train()
    model.train()
    if not learned:  # the recorded run's second
        model.network.force_normal(again=True)
    u = torch.special.ndtr(named_normal("noise.1", len(images), 1, 1, 1).flatten().double())
    t = objective.times(u, torch.zeros(len(u), dtype=torch.int64), images[0].numel())
    loss = objective(lambda x, t: model.raw(x, t, labels), images, named_normal("noise.2", *images.shape), t)
    assert_near(loss, recorded["loss" if learned else "loss_without_logvar"].mean(dim=(1, 2, 3)), 5e-5)
    if not learned:
        return
    loss.mean().backward()
    gradients = model.official_gradients()
    for tensor, norm in CASES[name]["grad_norm"].items():
        assert abs(float(gradients[tensor].norm()) - norm) < 1e-4 * max(norm, 1e-2), tensor
    model.network.force_normal(again=True)  # the run's second forward pass, before its weights were recorded
    for kind, found in (("grad.", gradients), ("after.", model.official_state())):
        for key in (key for key in recorded if key.startswith(kind)):
            assert_near(found[key.removeprefix(kind)], recorded[key], TOLERANCE)


def test_parts_are_the_official_ones() -> None:
    recorded = load_file(ASSETS / "edm2_parts.safetensors")
    a, b = recorded["a"], recorded["b"]
    fourier = MPFourier(8)
    fourier.frequencies, fourier.phases = recorded["fourier.freqs"], recorded["fourier.phases"]
    ours = {
        **{"normalize.all": normalize(a), "normalize.dim1": normalize(a, 1), "normalize.small": normalize(1e-4 * a, 1)},
        **{"mp_silu": mp_silu(a), "mp_sum.0.3": mp_sum(a, b[:, :6], 0.3)},
        **{f"mp_cat.{t}": mp_cat(a, b, t) for t in (0.5, 0.7)},
        "fourier": fourier(torch.tensor([-1.5, 0, 0.4, 1.1])),
    }
    for mode in ("up", "down"):
        ours[f"resample.{mode}.1-1"] = resample(a, mode)
        ours[f"resample.{mode}.1-3-3-1"] = resample(a, mode, (1, 3, 3, 1))
    assert ours.keys() == recorded.keys() - {"a", "b", "fourier.freqs", "fourier.phases"}
    for name, tensor in ours.items():
        assert_near(tensor, recorded[name], TOLERANCE)
    assert_near(fourier.half()(torch.tensor([1.1]))[0], recorded["fourier"][3], TOLERANCE)


@pytest.mark.parametrize(
    ("preset", "millions"), [("xs", 125), ("s", 280), ("m", 498), ("l", 777), ("xl", 1119), ("xxl", 1523)]
)
def test_parameters_of_the_presets(preset: str, millions: int) -> None:
    """As table 2 of the paper gives them, for ImageNet-512 in latents of 64 x 64 x 4."""
    node = {name: value for name, value in conf_node("backbone", f"edm2_{preset}").items() if name != "_target_"}
    with torch.device("meta"):
        network = EDM2UNet(**{**node, "in_channels": 4, "out_channels": 4, "vector_width": 1000})
    assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6) == millions


def test_the_start_is_standard_normal_and_silent() -> None:
    model, recorded = case_of("edm2_class")
    torch.manual_seed(0)
    node = edm2.backbone_node(CASES["edm2_class"]["config"])
    network = EDM2UNet(**{name: value for name, value in node.items() if name != "_target_"})
    model.network.load_state_dict(network.state_dict())
    model.head = LearnedLogVariance(channels=32)
    state = model.official_state()
    assert state.keys() == CASES["edm2_class"]["init"].keys()
    for name, (_, deviation, largest) in CASES["edm2_class"]["init"].items():
        if name.endswith("gain"):
            assert largest == 0
            assert not state[name].any(), name
        else:
            assert abs(float(state[name].std()) / deviation - 1) < 4 / state[name].numel() ** 0.5, name
    with torch.no_grad():
        assert not network(recorded["x"], recorded["sigma"], Conditioning(vector=torch.zeros(3, 10))).any()


def small(**options: Any) -> EDM2UNet:
    torch.manual_seed(0)
    sizes = {"channel_mult": (1, 2), "num_res_blocks": 1, "attention_downsampling": (2,), "head_channels": 16}
    network = EDM2UNet(**{"in_channels": 4, "out_channels": 4, "model_channels": 16, **sizes, **options})
    for name, parameter in network.named_parameters():
        if "gain" in name:
            torch.nn.init.constant_(parameter, 0.7)
    return network


@torch.no_grad()
def test_a_network_keeps_the_magnitude() -> None:
    """Unit variance in, unit variance out, at every depth: what the paper's layers are for (section 2.3)."""
    network = small(num_res_blocks=4, channel_mult=(1, 2, 2)).eval()
    torch.nn.init.ones_(network.gain_out)
    deviations: list[float] = []
    for block in [*network.encoder, *network.decoder]:
        block.register_forward_hook(lambda _, __, out: deviations.append(float(out.std())))
    network(torch.randn(8, 4, 16, 16), torch.linspace(-1, 1, 8), Conditioning())
    assert len(deviations) == 34
    assert all(0.6 < deviation < 1.5 for deviation in deviations)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_passes_before_one_backward_and_after_an_update(checkpointing: bool) -> None:
    """Weights are made normal once an update: not between the passes of a step, and again after the next update."""
    network, x, t = small(gradient_checkpointing=checkpointing), torch.randn(2, 4, 8, 8), torch.tensor([0.1, -0.3])
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    for _ in range(2):
        (network(x, t, Conditioning()) - network(x + 1, t, Conditioning())).square().mean().backward()
        sizes = [m.weight[0].square().mean().sqrt() for m in network.modules() if isinstance(m, MPConv)]
        assert all(abs(float(size.detach()) - 0.9999) < 5e-4 for size in sizes)
        optimizer.step()
        assert any(abs(float(p[0].square().mean().sqrt().detach()) - 1) > 1e-3 for p in network.parameters())


def test_recomputed_blocks_give_the_same_gradients() -> None:
    plain, again = small(), small(gradient_checkpointing=True)
    for network in (plain, again):
        network(torch.ones(2, 4, 4, 4), torch.tensor([1.0, 0.5]), Conditioning()).square().sum().backward()
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, torch.as_tensor(b.grad))


def with_every_slot() -> tuple[EDM2UNet, Tensor, Tensor, Conditioning]:
    network = small(in_channels=7, vector_width=6, channel_mult=(2,), attention_downsampling=()).eval()
    conditioning = Conditioning(vector=torch.randn(2, 6), spatial=torch.randn(2, 3, 8, 12))
    return network, torch.randn(2, 4, 8, 12), torch.tensor([0.3, -0.5]), conditioning


@torch.no_grad()
def test_it_takes_every_slot() -> None:
    network, x, t, conditioning = with_every_slot()
    out = network(x, t, conditioning)
    assert torch.equal(network(x, t, network.prepare(conditioning)), out)
    for slot in ("vector", "spatial"):
        other = replace(conditioning, **{slot: getattr(conditioning, slot) + 1})
        assert not torch.allclose(network(x, t, other), out)


@pytest.mark.slow
@torch.no_grad()
def test_its_blocks_are_compiled() -> None:
    network, x, t, conditioning = with_every_slot()
    out = network(x, t, conditioning)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldmlab.nn.compiling.BACKEND", "aot_eager")
        assert compile_regions(network) == 9
        assert torch.allclose(network(x, t, conditioning), out, atol=1e-5)


@torch.no_grad()
def test_a_class_is_a_one_hot_vector() -> None:
    """Of unit variance, and zeros for no class, as `Precond` is called with the official labels."""
    model, recorded = case_of("edm2_class")
    conditioner = OneHotClass(10)
    batch = {"class_id": recorded["labels"].argmax(1)}
    sigma = recorded["sigma"].log() / 4
    for vector, labels in (
        (conditioner(batch, torch.clone), recorded["labels"]),
        (conditioner.null(batch, torch.clone), None),
    ):
        ours = model.network(recorded["x"], sigma, Conditioning(vector=vector))
        assert torch.equal(ours, model.raw(recorded["x"], sigma, labels))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"backbone\.head_channels=64 does not fit a level of 32 channels"):
        small(head_channels=64)
    with pytest.raises(InputError, match="the EDM2 U-Net does not take tokens conditioning"):
        small()(torch.zeros(1, 4, 4, 4), torch.zeros(1), Conditioning(tokens=torch.zeros(1, 2, 3)))
    case = CASES["edm2_narrow"]
    with pytest.raises(InputError, match=r"1 unexpected \(more\.weight\)"):
        edm2.as_official(case["config"], {**drawn(case), "more.weight": torch.zeros(3)})
