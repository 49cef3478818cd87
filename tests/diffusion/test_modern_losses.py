"""Training losses and their gradients against those that SiT, DiT, LightningDiT, EDM and diffusers computed."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.diffusion.diffusion_loss import ContrastiveLoss, CosineLoss, MultiScaleLoss, Objective, VariationalLoss
from ldmlab.diffusion.latent_space import LatentScale, LatentSpace
from ldmlab.diffusion.parameterization import (
    CleanPrediction,
    EdmPrediction,
    EpsPrediction,
    LearnedVariance,
    ScorePrediction,
    VelocityPrediction,
)
from ldmlab.diffusion.paths import (
    ContinuousPath,
    CosinePath,
    EdmPath,
    LinearPath,
    VarianceExplodingPath,
    VariancePreservingPath,
)
from ldmlab.diffusion.schedule import Schedule
from ldmlab.diffusion.time_sampling import (
    AngleSigma,
    CosineInterpolatedSigma,
    LogitNormalTimes,
    LogLogisticSigma,
    LogNormalSigma,
    LogUniformSigma,
    ModeTimes,
    SplitLogNormalSigma,
    UniformTimes,
)
from ldmlab.diffusion.weighting import P2, EdmWeighting, FlowWeighting, LearnedLogVariance, MinSnr, Sd3Weighting, Snr
from ldmlab.errors import InputError
from ldmlab.first_stages.identity import Identity
from modern_cases import assert_near, drawn_noise, field, preconditioned, recorded

PATHS: dict[str, ContinuousPath] = {  # as SiT counts: 0 is noise, 1 data
    "Linear": LinearPath(1.0, 0.0),
    "GVP": CosinePath(1.0, 0.0),
    "VP": VariancePreservingPath(1.0, 0.0),
}
PREDICTIONS: dict[str, Any] = {
    "velocity": VelocityPrediction("data"),
    "noise": EpsPrediction(),
    "score": ScorePrediction(),
}
SIT, SIT_CASES = recorded("sit/losses")


def run(objective: Objective, network: Any, clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (B,), and the gradient of their sum by the network's output."""
    outputs = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        outputs.append(network(x, t).requires_grad_())
        return outputs[0]

    loss = objective(watched, clean, noise, times)
    (gradient,) = torch.autograd.grad(loss.sum(), outputs)
    return loss.detach(), gradient


@pytest.mark.parametrize("case", SIT_CASES)
def test_sit(case: str) -> None:
    kind, predicted, weight = case.split(".")
    weighting = None if weight == "None" else FlowWeighting(weight)
    objective = Objective(PATHS[kind], PREDICTIONS[predicted], weighting=weighting)
    loss, gradient = run(objective, field, SIT["x1"], SIT["x0"], SIT["t"])
    assert_near(loss, SIT[f"{case}.loss"])
    assert_near(gradient[:, :1], SIT[f"{case}.grad_output"])


@pytest.mark.parametrize("kind", PATHS)
def test_paths_of_sit(kind: str) -> None:
    tensors, _ = recorded("sit/paths")
    path, t = PATHS[kind], tensors["t"]
    for name, found in (("", path.levels(t)), ("d_", path.rates(t))):
        for part, value in zip(("alpha", "sigma"), found, strict=True):
            sign = -1 if name else 1  # SiT's derivatives are by a time that runs to the data
            assert_near(sign * value.flatten(), tensors[f"{kind}.{name}{part}"])


@pytest.mark.parametrize("kind", PATHS)
def test_velocity_and_direction_of_lightningdit(kind: str) -> None:
    tensors, _ = recorded("lightningdit/transport")
    objective = Objective(PATHS[kind], VelocityPrediction("data"), loss=CosineLoss())
    loss, gradient = run(objective, field, tensors["x1"], tensors["x0"], tensors["t"])
    assert_near(loss, tensors[f"{kind}.loss"] + tensors[f"{kind}.cos_loss"])
    assert_near(gradient / len(loss), tensors[f"{kind}.grad_output"])


def test_times_of_lightningdit() -> None:
    tensors, _ = recorded("lightningdit/transport")
    u = torch.special.ndtr(-tensors["t_normals"])  # theirs grows towards the data
    position = torch.zeros(len(u), dtype=torch.int64)
    for name, mean, kind in (("lognorm", 0.0, "Linear"), ("lognorm_shifted", 0.7, "Linear"), ("lognorm_VP", 0.0, "VP")):
        assert_near(LogitNormalTimes(mean)(u, position, PATHS[kind]), tensors[f"times.{name}"])


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.6)])
def test_times_within_a_range(mean: float, std: float) -> None:
    """As LightningDiT's, which drops those outside: the distribution of what is left."""
    normals = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort().values
    kept = torch.sigmoid(mean + std * normals)
    kept = kept[(kept >= 0.3) & (kept <= 0.7)]
    u = (torch.arange(len(kept), dtype=torch.float64) + 0.5) / len(kept)
    found = LogitNormalTimes(mean, std, low=0.3, high=0.7)(u, torch.zeros(len(u)).long(), LinearPath(0.0, 1.0))
    assert float((found - kept).abs().max()) < 0.02  # of 1,500 draws or more
    with pytest.raises(InputError, match=r"low=0.5 and high=0.5 are no range"):
        LogitNormalTimes(low=0.5, high=0.5)


@pytest.mark.parametrize(("mean", "std", "low", "high"), [(-5.0, 0.5, 0.5, 0.9), (5.0, 0.5, 0.1, 0.5)])
def test_times_within_a_range_far_from_the_mean(mean: float, std: float, low: float, high: float) -> None:
    u = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    found = LogitNormalTimes(mean, std, low=low, high=high)(u, torch.zeros(100).long(), LinearPath(0.0, 1.0))
    assert low < float(found.min()) < float(found.max()) < high
    assert len(found.unique()) == 100


def test_a_range_without_times_is_refused() -> None:
    for mean, low, high in ((5.0, 0.0, 0.5), (-5.0, 0.5, 1.0)):
        with pytest.raises(InputError, match=f"low={low} and high={high} hold none of the times of mean={mean}"):
            LogitNormalTimes(mean, 0.1, low=low, high=high)


class Respaced:
    """Some levels of a schedule, as one of its own."""

    def __init__(self, schedule: Schedule, times: Tensor) -> None:
        self.steps, self.times, self.alpha_bar = len(times), times, schedule.alpha_bar[times]
        self.levels = lambda t: schedule.levels(times[t])


DIT, _ = recorded("dit/losses")
LINEAR = Schedule("linear", 0.0001, 0.02)
EVERY_FOURTH = torch.linspace(0, 999, 250, dtype=torch.float64).round().long()
HYBRID, ALONE = VariationalLoss(), VariationalLoss(alone=True)
DIT_CASES: dict[str, tuple[Any, Any, Any]] = {
    "hybrid": (EpsPrediction(), HYBRID, LINEAR),
    "hybrid_rescaled": (EpsPrediction(), HYBRID, LINEAR),
    "kl": (EpsPrediction(), ALONE, LINEAR),
    "x0": (CleanPrediction(), HYBRID, LINEAR),
    "mse": (EpsPrediction(), "l2", LINEAR),
    "mse_small": (EpsPrediction(), "l2", LINEAR),  # a fixed variance has no part in it
    "kl_fixed_small": (EpsPrediction(), ALONE, LINEAR),
    "kl_fixed_large": (EpsPrediction(), ALONE, LINEAR),
    "cosine_hybrid": (EpsPrediction(), HYBRID, Schedule("cosine")),
    "respaced_hybrid": (EpsPrediction(), VariationalLoss(250 / 1000), Respaced(LINEAR, EVERY_FOURTH)),
}


@pytest.mark.parametrize("case", DIT_CASES)
def test_dit(case: str) -> None:
    """The loss, its terms and its gradient; fixed variances are the ends of the learned range."""
    mean, loss_kind, schedule = DIT_CASES[case]
    plain = isinstance(loss_kind, str)
    objective = Objective(schedule, mean if plain else LearnedVariance(mean), loss=loss_kind)
    respaced = isinstance(schedule, Respaced)

    def network(x: Tensor, t: Tensor) -> Tensor:
        t = schedule.times[t.long()] if respaced else t
        first, column = field(x, t / 1000), t[:, None, None, None]
        if "fixed" in case:  # large: beta, but at 0 the posterior's after it
            v = torch.full_like(x, -1.0) if "small" in case else torch.where(column > 0, 1.0, -1.0).expand_as(x)
        else:
            v = 0.6 * torch.sin(3 * x + 2 * column / 1000)
        return first if plain else torch.cat([first, v], dim=1)

    times = DIT["respaced_hybrid.t" if respaced else "t"]
    loss, gradient = run(objective, network, DIT["x_start"], DIT["noise"], times)
    expected = DIT[f"{case}.grad_output"]
    assert_near(loss, DIT[f"{case}.loss"])
    assert_near(gradient[:4, : expected.shape[1]], expected)
    if f"{case}.vb" in DIT:
        squares = Objective(schedule, mean)
        mse, _ = run(squares, lambda x, t: network(x, t)[:, : x.shape[1]], DIT["x_start"], DIT["noise"], times)
        assert_near(mse, DIT[f"{case}.mse"])
        assert_near(loss - mse, DIT[f"{case}.vb"])


EDM, EDM_CASES = recorded("edm/losses")


@pytest.mark.parametrize(("case", "mean", "std"), [("edm", -1.2, 1.2), ("edm_wide", -0.4, 1.0)])
def test_edm(case: str, mean: float, std: float) -> None:
    """The times of the recorded draws, the loss of each image; with a log-variance as in EDM2 around it."""
    path = EdmPath()
    normals = drawn_noise("noise.1", 4, 1, 1, 1).flatten()
    noise = drawn_noise("noise.2", 4, 3, 6, 6)
    position = torch.zeros(4, dtype=torch.int64)
    times = LogNormalSigma(mean, std)(torch.special.ndtr(normals.double()), position, path)
    assert_near(torch.exp(4 * times), EDM[f"{case}.sigma"])
    images = EDM["images"]

    def network(x: Tensor, t: Tensor) -> Tensor:
        return field(x, t)

    plain = Objective(path, EdmPrediction(0.5), weighting=EdmWeighting(0.5))
    loss = plain(network, images, noise, times)
    expected = EDM[f"{case}.loss"].mean(dim=(1, 2, 3))
    assert_near(loss, expected)
    learned = LearnedLogVariance(EdmWeighting(0.5))
    found = Objective(path, EdmPrediction(0.5), weighting=learned)(network, images, noise, times)
    log_variance = learned.finished(torch.zeros(4), times)  # 0 / exp(u) + u
    assert_near(found, expected / log_variance.exp() + log_variance)
    found.sum().backward()
    assert learned.linear.weight.grad is not None
    assert float(learned.linear.weight.grad.norm()) > 0


@pytest.mark.parametrize(("case", "path"), [
    ("vp", VariancePreservingPath(0.0, 999.0, margins=(1e-5, 0.0))), ("ve", VarianceExplodingPath()),
])  # fmt: skip
def test_the_losses_that_edm_was_compared_with(case: str, path: ContinuousPath) -> None:
    """VPLoss and VELoss: uniform times and the noise's error, here of EDM's preconditioned stand-in."""
    u = torch.special.ndtr(drawn_noise("noise.1", 4, 1, 1, 1).flatten().double())
    u = 1 - u if case == "vp" else u  # a larger number is less noise there
    times = UniformTimes()(u, torch.zeros(4, dtype=torch.int64), path)
    alpha, sigma = path.levels(times)
    ratio = (sigma / alpha).flatten()
    assert_near(ratio / EDM[f"{case}.sigma"], torch.ones(4))

    def network(x: Tensor, t: Tensor) -> Tensor:
        return field(x, ratio.log() / 4)

    noise, objective = drawn_noise("noise.2", 4, 3, 6, 6), Objective(path, EdmPrediction(0.5), weighting=Snr())
    loss = objective(network, EDM["images"], noise, times)
    assert_near(loss, EDM[f"{case}.loss"].mean(dim=(1, 2, 3)))


K, K_CASES = recorded("kdiffusion/weights")


class LogVariance(LearnedLogVariance):
    """That of the recorded case: 0.1 log sigma, four times the time being log sigma."""

    def log_variance(self, times: Tensor) -> Tensor:
        return 0.4 * times


@pytest.mark.parametrize("sd", [0.5, 1.0])
@pytest.mark.parametrize("case", ["karras", "soft-min-snr", "snr", "simple", "variance"])
@pytest.mark.parametrize("scales", [1, 4])
def test_k_diffusion(case: str, scales: int, sd: float) -> None:
    """Weightings of the network's output, the multi-scale loss, the noise's loss, a learned variance (half ours)."""
    weightings = {"karras": None, "soft-min-snr": MinSnr(gamma=sd**-2, soft=True), "snr": Snr(), "simple": Snr()}
    weighting = weightings.get(case, LogVariance(EdmWeighting(sd)))
    loss_kind = "l2" if scales == 1 else MultiScaleLoss(scales)
    objective = Objective(EdmPath(1e-4, 1e4), EdmPrediction(sd), weighting=weighting, loss=loss_kind)
    loss = objective(lambda x, t: field(x, t), K["images"], K["noise"], K["sigma"].log() / 4)
    name = f"loss.{case}.sigma_data={sd}" + ("" if case in ("simple", "variance") else f".scales={scales}")
    if scales == 1 or case in ("karras", "soft-min-snr", "snr"):
        assert_near(loss.detach() / (2 if case == "variance" else 1), K[name])


@pytest.mark.parametrize("sd", [0.5, 1.0])
def test_preconditioning_of_k_diffusion(sd: float) -> None:
    """Its scalings, weights of the output and denoised images."""
    form, path, sigma = EdmPrediction(sd), EdmPath(1e-4, 1e4), K["sigma"]
    one = torch.ones_like(sigma)
    skip, out, scale = K[f"scalings.sigma_data={sd}"]
    assert_near(form.scaled(one, 1.0, sigma), scale)
    assert_near(form.clean_slope(one, sigma), out)
    columns = one[:, None, None, None], sigma[:, None, None, None]
    for name, weighting in (("soft-min-snr", MinSnr(gamma=sd**-2, soft=True)), ("snr", Snr()), ("karras", None)):
        factor = 1.0 if weighting is None else weighting(*columns, dict).flatten() * out**2
        assert_near(one * factor, K[f"weight.{name}.sigma_data={sd}.scales=1"])
    for image, noise, value, expected in zip(
        K["images"], K["noise"], sigma, K[f"denoised.sigma_data={sd}"], strict=True
    ):
        level = path.level(float(value.log() / 4))
        x = (image + value * noise)[None]
        given = form.scaled(x, level.alpha, level.sigma)
        assert_near(form.clean(x, field(given, torch.tensor([level.time])), level).float(), expected[None])
    assert_near(form.clean(one, torch.zeros(len(sigma)), Level(1.0, sigma, None)), skip.double())  # type: ignore[arg-type]


DENSITIES = {  # of k-diffusion => ours; its strata make every draw but one of a uniform number
    "log_normal": LogNormalSigma(-1.2, 1.2),
    "log_uniform": LogUniformSigma(1e-3, 1e3),
    "log_logistic": LogLogisticSigma(math.log(0.5), 0.5, 1e-3, 1e3),
    "v_diffusion": AngleSigma(0.5, 1e-3, 1e3),
    "cosine_interpolated": CosineInterpolatedSigma(64, 32, 256, 0.5, 1e-3, 1e3),
    "split_log_normal": SplitLogNormalSigma(-1.2, 0.6, 1.2),
}


@pytest.mark.parametrize("case", DENSITIES)
def test_densities_of_k_diffusion(case: str) -> None:
    u = K["u"]
    if case == "cosine_interpolated":  # whose larger numbers are less noisy
        u = 1 - u
    if case == "split_log_normal":  # by a sign of probability 0.6 / 1.8 and the magnitude of a normal number
        n, share = K["n"].double().abs(), 1 / 3
        u = torch.where(
            u < share, 2 * share * torch.special.ndtr(-n), share + (1 - share) * (1 - 2 * torch.special.ndtr(-n))
        )
    assert_near((DENSITIES[case].quantile(u) / K[f"density.{case}"].double()), torch.ones(8).double())
    path = EdmPath(1e-4, 1e4)
    times = DENSITIES[case](u, torch.zeros(8, dtype=torch.int64), path)
    assert_near(torch.exp(4 * times), K[f"density.{case}"])


def test_densities_and_weights_of_sd3() -> None:
    tensors, _ = recorded("diffusers/flow_match")
    u = torch.special.ndtr(tensors["density.n"].double())
    path, position = LinearPath(0.0, 1.0), torch.zeros(len(u), dtype=torch.int64)
    for name, times in (("logit_normal", LogitNormalTimes()), ("mode", ModeTimes()), ("none", UniformTimes())):
        assert_near(times(u, position, path), tensors[f"density.{name}"])
    sigma = tensors["weighting.sigmas"][:, None, None, None]
    for kind in ("cosmap", "sigma_sqrt"):
        factor = Sd3Weighting(kind)(1 - sigma, sigma, lambda: path.rates(sigma.flatten()))
        slope = VelocityPrediction().clean_slope(1 - sigma, sigma, path.rates(sigma.flatten()))
        assert_near((factor * slope**2).flatten(), tensors[f"weighting.{kind}"])


def test_min_snr_of_each_prediction() -> None:
    """The published factors: min(SNR, 5) / SNR of the noise, / (SNR + 1) of v."""
    schedule = Schedule()
    t = torch.arange(0, 1000, 37)
    alpha, sigma = schedule.levels(t)
    snr = (alpha / sigma).double().square().flatten()
    clean, noise = torch.randn(2, len(t), 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for prediction, factor in ((EpsPrediction(), snr.clamp_max(5) / snr), (CleanPrediction(), snr.clamp_max(5))):
        plain, weighted = (
            Objective(schedule, prediction, weighting=w)(lambda x, t: 0.3 * x, clean, noise, t)
            for w in (None, MinSnr(5.0))
        )
        torch.testing.assert_close(weighted.double(), plain.double() * factor, rtol=1e-5, atol=1e-7)


def test_the_preconditioned_estimate_is_edms() -> None:
    x, sigma = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0.01, 0.7, 50.0])
    path, objective = EdmPath(), Objective(EdmPath(), EdmPrediction(0.5))
    for row, value in zip(x, sigma, strict=True):
        level = path.level(float(value.log() / 4))
        given = objective.form.scaled(row[None], level.alpha, level.sigma)
        found = objective.form.clean(row[None], field(given, torch.tensor([level.time])), level)
        assert_near(found.float(), preconditioned(row[None], value[None]))


def test_strata_and_shift() -> None:
    """n images in a row have one time in each n-th; a shift is that of SD3's eq. 23, in the grid too."""
    u = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = UniformTimes(strata=16)(u, torch.arange(64) + 5, LinearPath(0.0, 1.0))
    counts = torch.histc(times.reshape(4, 16)[1], 16, 0, 1)
    assert counts.tolist() == [1] * 16
    shifted = LinearPath(0.0, 1.0, shift_base=1024).at_size(4096)
    assert_near(shifted.quantile(u).double(), 2 * u / (1 + u), 1e-6)
    assert [level.sigma for level in shifted.grid(2)[:-1]] == pytest.approx([1.0, 2 * 0.5 / 1.5])


def test_p2_contrast_and_offset_noise() -> None:
    """By their formulas: 1 / (k + SNR) of the noise; less a part of the neighbour's loss; a number a channel."""
    schedule, t = Schedule(), torch.tensor([50, 400, 900])
    alpha, sigma = schedule.levels(t)
    clean, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    error = (0.3 * (alpha * clean + sigma * noise) - noise).square().mean(dim=(1, 2, 3))
    run_with = [{"weighting": P2(1.0, 1.0)}, {"loss": ContrastiveLoss(0.05)}]
    found = [Objective(schedule, EpsPrediction(), **o)(lambda x, t: 0.3 * x, clean, noise, t) for o in run_with]
    torch.testing.assert_close(found[0], error / (1 + (alpha / sigma).square().flatten()), rtol=1e-5, atol=1e-7)
    other = (0.3 * (alpha * clean + sigma * noise) - noise[[2, 0, 1]]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found[1], error - 0.05 * other, rtol=1e-5, atol=1e-7)
    with pytest.raises(InputError, match="two images in a micro-batch"):
        Objective(schedule, EpsPrediction(), loss=ContrastiveLoss())(lambda x, t: x, clean[:1], noise[:1], t[:1])
    space = LatentSpace(Identity(), LatentScale())
    batch = {"position": torch.arange(2000), "image": torch.zeros(2000, 3, 1, 1, dtype=torch.uint8)}
    _, numbers = space.latents_and_numbers(batch, 0, noise=True, offset=True)
    assert numbers["offset"].shape == (2000, 3, 1, 1)
    both = torch.stack([numbers["offset"].flatten(), numbers["noise"].flatten()])
    assert_near(torch.cov(both), torch.eye(2), 0.05)  # independent, each of variance 1; 6,000 draws
