"""End points of SiT's, REPA's, k-diffusion's, EDM's and diffusers' samplers, on their analytic stand-in networks."""

import math
from collections.abc import Callable
from typing import Any

import exact_mixture
import pytest
import torch
from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.diffusion.parameterization import (
    CleanPrediction,
    EpsPrediction,
    Parameterization,
    ScorePrediction,
    VelocityPrediction,
    VPrediction,
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
from ldmlab.inference.likelihood import log_likelihood
from ldmlab.inference.sample_settings import sampler_by_name
from ldmlab.samplers._stepwise import ancestral
from ldmlab.samplers.lms import coefficients
from modern_cases import assert_near, drawn_noise, field, preconditioned, recorded

END = Level(1.0, 0.0, None)
EDM = EdmPath(1e-4, 1e4)
K, K_CASES = recorded("kdiffusion/samplers")
SAMPLERS = {  # of k-diffusion => ours, with their options' names
    "euler": ("euler", {}),
    "heun": ("heun", {}),
    "dpm_2": ("dpm_2", {}),
    "dpm_2_ancestral": ("dpm_2", {"eta": 1.0}),
    "euler_ancestral": ("euler_ancestral", {}),
    "lms": ("lms", {}),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", {}),
    "dpmpp_sde": ("dpmpp_sde", {}),
    "dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}),
}
RUN = [case for case in K_CASES if case.split(".")[0] in SAMPLERS and "n" in K_CASES[case]]


def by_number(shape: Any, dtype: torch.dtype = torch.float32) -> Callable[[int], Tensor]:
    """The noises of a recorded run, in their order."""
    return lambda step: drawn_noise(f"noise.{step + 1}", *shape).to(dtype)


def sigma_levels(sigmas: Tensor) -> list[Level]:
    """alpha = 1, to the clean end."""
    return [*(Level(1.0, float(s), float(s.log() / 4)) for s in sigmas.double() if s > 0), END]


def denoise(x: Tensor, level: Level) -> Tensor:
    return preconditioned(x, torch.tensor([level.sigma], dtype=torch.float64).to(x.dtype))


def grid_of(kind: str, n: int, low: float = 0.0292, high: float = 14.6146, rho: float = 1.5) -> list[Level]:
    """k-diffusion's sigmas by our spacings, as levels with alpha = 1."""
    if kind == "vp":  # even times of the VP path, whose smallest sigma float32 rounds by 1e-4
        grid = VariancePreservingPath(0.0, 1.0, 0.1, 20.0, margins=(1e-3, 0.0)).grid(n)[:-1]
        t = torch.tensor([level.time for level in grid])
        rounded = torch.sqrt(torch.exp(19.9 * t**2 / 2 + 0.1 * t) - 1)
        torch.testing.assert_close(torch.tensor([v.sigma / v.alpha for v in grid]), rounded, rtol=3e-4, atol=0)
        return sigma_levels(rounded)
    spacing = {"exponential": "log_snr", "polyexponential": f"polyexponential:{rho}"}.get(kind, kind)
    return EdmPath(low, high).grid(n, spacing)


@pytest.mark.parametrize("kind", ["karras", "exponential", "polyexponential", "vp"])
def test_steps_of_k_diffusion(kind: str) -> None:
    one = K_CASES[f"sigmas.{kind}"]
    found = grid_of(kind, one["n"], one["sigma_min"], one["sigma_max"], one.get("rho", 1.0))
    assert_near(torch.tensor([level.sigma for level in found]), K[f"sigmas.{kind}"])


@pytest.mark.parametrize("case", RUN)
def test_k_diffusion(case: str) -> None:
    settings = K_CASES[case]
    name, options = SAMPLERS[case.split(".")[0]]
    options = dict(options)
    if "s_churn" in settings:
        options |= {"churn": settings["s_churn"], "churn_min": settings["s_tmin"], "churn_max": settings["s_tmax"]}
        options["churn_noise"] = settings["s_noise"]
    if "order" in settings:
        options["depth"] = settings["order"]
    if "solver_type" in settings:
        options["midpoint"] = False
    for theirs, ours in (("eta", "eta"), ("s_noise", "temperature"), ("r", "r")):
        if theirs in settings and "s_churn" not in settings:
            options[ours] = settings[theirs]
    grid = grid_of(settings["sigmas"], settings["n"])
    x = K["x_T"] * grid[0].sigma
    sampler: Any = sampler_by_name(name, **options)
    sampler = sampler.along(EDM)
    assert_near(sampler(denoise, x, grid, noise=by_number(x.shape)), K[case])


def test_guided_steps_of_k_diffusion() -> None:
    one, x = K_CASES["guided.dpmpp_2m_sde"], K["x_T"]
    label = torch.tensor(one["c"])

    def guided(x: Tensor, level: Level) -> Tensor:
        sigma = torch.tensor([level.sigma]).to(x.dtype)
        plain = preconditioned(x, sigma)
        return plain + one["guidance"] * (preconditioned(x, sigma, label) - plain)

    grid = grid_of(one["sigmas"], one["n"])
    found = sampler_by_name("dpmpp_2m_sde")(guided, x * grid[0].sigma, grid, noise=by_number(x.shape))
    assert_near(found, K["guided.dpmpp_2m_sde"])


@pytest.mark.parametrize("case", [case for case in K_CASES if case.startswith(("dpm_fast", "dpm_adaptive"))])
def test_dpm_solver_of_k_diffusion(case: str) -> None:
    """To sigma_min; dpm_fast makes n evaluations, the other chooses its steps by the error of the batch."""
    one, x, evaluations = K_CASES[case], K["x_T"], []
    fast = case.startswith("dpm_fast")
    grid = EdmPath(one["sigma_min"], one["sigma_max"]).grid(one.get("n", 10) + fast, "log_snr")[:-1]

    def counted(x: Tensor, level: Level) -> Tensor:
        evaluations.append(level)
        return denoise(x, level)

    sampler: Any = sampler_by_name(case.split(".")[0], **{key: one[key] for key in ("eta",) if key in one})
    found = sampler.along(EDM)(counted, x * grid[0].sigma, grid, noise=by_number(x.shape))
    assert_near(found, K[case])
    assert len(evaluations) == one.get("n", one.get("nfe"))


def test_ancestral_steps_and_multistep_weights_of_k_diffusion() -> None:
    """sigma_down and sigma_up for eta 1, 0.5, 2.5; Adams-Bashforth weights of orders 1 to 4."""
    found = []
    for here, there in K["ancestral.sigmas"].tolist():
        for eta in (1.0, 0.5, 2.5):
            down, up = ancestral(Level(1.0, here, None), Level(1.0, there, None), eta)
            found.append([down.sigma, up])
    assert_near(torch.tensor(found), K["ancestral.steps"])
    one = K_CASES["lms.coefficients"]
    places, i = one["t"], one["i"]
    weights = [w for order in range(1, 5) for w in coefficients(places[i::-1][:order], places[i + 1])]
    assert_near(torch.tensor(weights, dtype=torch.float64), K["lms.coefficients"], 1e-7)


E, E_CASES = recorded("edm/samplers")


CHURN = {"S_churn": "churn", "S_min": "churn_min", "S_max": "churn_max", "S_noise": "churn_noise"}


def vp_path(sigma_min: float, sigma_max: float, least: float = 1e-3) -> VariancePreservingPath:
    """EDM's VP path between two values of sigma / alpha, the smaller of which is at the position `least`."""
    low, high = (math.log1p(sigma**2) for sigma in (sigma_min, sigma_max))
    width = 2 * (low / least - high) / (least - 1)
    beta_min = high - width / 2
    return VariancePreservingPath(0.0, 999.0, beta_min, beta_min + width, margins=(least, 0.0))


def iddpm_ratios() -> Tensor:
    """sigma / alpha of the cosine schedule, noisiest first, from alpha_bar in float32 as the program has it."""
    j = torch.arange(1001)
    alpha_bar = (0.5 * math.pi * j / 1000 / 1.008).sin() ** 2
    u = torch.zeros(1001, dtype=torch.float64)
    for i in range(1000, 0, -1):
        u[i - 1] = ((u[i] ** 2 + 1) / (alpha_bar[i - 1] / alpha_bar[i]).clamp_min(0.001) - 1).sqrt()
    return u[:-1]


def edm_grid(kind: str, schedule: str, one: dict[str, Any]) -> tuple[ContinuousPath, list[Level]]:
    """A path with the steps of EDM's comparison, which begin and end at the levels of each program."""
    vp = VariancePreservingPath(0.0, 999.0, 0.1, 20.0, margins=(1e-3, 0.0))
    n, low, high = one["num_steps"], one.get("sigma_min", 0.002), one.get("sigma_max", 80.0)
    if kind == "vp":
        return vp, vp.grid(n, "linspace")
    if kind == "ve":
        path: ContinuousPath = VarianceExplodingPath(0.02, 100.0)
        return path, path.grid(n, "log_snr")
    path = vp_path(low, high) if schedule == "vp" else EdmPath(low, high)
    if kind == "edm":
        return path, path.grid(n, f"karras:{one.get('rho', 7)}")
    ratios = iddpm_ratios()
    visited = Schedule("cosine").grid(1000, "linspace")[:-1]
    ours = torch.tensor([level.sigma / level.alpha for level in visited], dtype=torch.float64)
    assert_near(ours / ratios, torch.ones(1000), 1e-3)  # what float32 costs the program at its least noise
    ratios = ratios[(ratios >= 0.002) & (ratios <= 81)]
    return path, sigma_levels(ratios[torch.linspace(0, len(ratios) - 1, n, dtype=torch.float64).round().long()])


@pytest.mark.parametrize("case", E_CASES)
def test_edm(case: str) -> None:
    """edm_sampler and ablation_sampler: any steps, straight in any variable; every step draws a noise."""
    one = E_CASES[case]
    solver, kind, schedule = one.get("solver", "heun"), one.get("discretization", "edm"), one.get("schedule", "linear")
    path, grid = edm_grid(kind, schedule, one)
    options: dict[str, Any] = {ours: one[theirs] for theirs, ours in CHURN.items() if theirs in one}
    options |= {"alpha": one["alpha"]} if "alpha" in one else {}
    variable = {"vp": "position", "ve": "variance", "linear": "sigma"}[schedule]
    sampler: Any = sampler_by_name(solver, variable=variable, **options)
    x = E["latents" if "latents" in E else "x_T"].double() * grid[0].sigma

    def unscaled(x: Tensor, level: Level) -> Tensor:
        return denoise(x / level.alpha, Level(1.0, level.sigma / level.alpha, level.time))

    found = sampler.along(path)(unscaled, x, grid, noise=by_number(x.shape, torch.float64))
    assert_near(found, E[case], 1e-7)


PATHS: dict[str, ContinuousPath] = {
    "Linear": LinearPath(1.0, 0.0),
    "GVP": CosinePath(1.0, 0.0),
    "VP": VariancePreservingPath(1.0, 0.0, margins=(0.0, 0.0)),
}
PREDICTIONS: dict[str, Any] = {
    "velocity": VelocityPrediction("data"),
    "noise": EpsPrediction(),
    "score": ScorePrediction(),
}


def network(kind: str, predicted: str) -> Callable[[Tensor, Level], Tensor]:
    """The clean estimate of SiT's stand-in."""
    form = Parameterization(PREDICTIONS[predicted], PATHS[kind])

    def denoise(x: Tensor, level: Level) -> Tensor:
        assert level.time is not None
        time = torch.tensor([level.time], dtype=torch.float64).to(x.dtype)
        return form.clean(x, field(x, time), level)

    return denoise


def levels(kind: str, start: float, end: float, steps: int, *, clean: bool) -> list[Level]:
    """Even times of SiT; clean: and its last step, to the data."""
    times = torch.linspace(start, end, steps, dtype=torch.float64).tolist()
    grid = [PATHS[kind].level(time) for time in times]
    return [*grid, END] if clean else grid


S, S_CASES = recorded("sit/sdes")
FORMS = {"SBDM": "sbdm", "inccreasing-decreasing": "increasing_decreasing"}


@pytest.mark.parametrize("case", [c for c in S_CASES if c in S and S_CASES[c]["last_step"] is not None])
def test_sdes_of_sit(case: str) -> None:
    one = S_CASES[case]
    kind, predicted, form = one["path_type"], one["prediction"], one["diffusion_form"]
    exact = predicted == "velocity" and kind != "VP"
    start = 0.0 if exact or kind == "VP" else 0.001
    size = one["last_step_size"]
    grid = levels(kind, start, 1 - size, one["num_steps"], clean=True)
    options = {"method": one["sampling_method"].lower(), "form": FORMS.get(form, form), "norm": one["diffusion_norm"]}
    sampler: Any = sampler_by_name("sde", **options, last=one["last_step"].lower())
    x = S["x_T"]
    found = sampler.along(PATHS[kind])(network(kind, predicted), x, grid, noise=by_number(x.shape))
    assert_near(found, S[case])


ODES, ODE_CASES = recorded("sit/odes")


FLOWS = [case for case in ODE_CASES if case in ODES and not {"reverse", "guided"} & set(case.split("."))]


@pytest.mark.parametrize("case", FLOWS)
def test_odes_of_sit(case: str) -> None:
    one = ODE_CASES[case]
    kind, predicted = one["path_type"], one["prediction"]
    start, end = (0.0, 1.0) if predicted == "velocity" else (0.001, 0.999)
    start, end = (0.0, 0.999) if kind == "VP" else (start, end)
    grid = levels(kind, start, end, one["num_steps"], clean=False)
    if end == 1.0:
        grid[-1] = END
    tight = "tight" in case
    options = {"rtol": 1e-9, "atol": 1e-9} if tight else {}
    sampler: Any = sampler_by_name("ode", method=one["sampling_method"], **options)
    x = ODES["x_T"].double() if tight else ODES["x_T"]
    found = sampler.along(PATHS[kind])(network(kind, predicted), x, grid, noise=by_number(x.shape))
    assert_near(found, ODES[case], 1e-7 if tight else 5e-5)
    if one["sampling_method"] == "euler":  # which the sampler over levels takes too, on straight paths
        again = sampler_by_name("euler")(network(kind, predicted), x, grid, noise=by_number(x.shape))
        if kind == "Linear":
            assert_near(again, ODES[case])


@pytest.mark.parametrize("predicted", ["velocity", "score"])
def test_adaptive_steps_near_the_clean_end_of_vp(predicted: str) -> None:
    """Their last step looks beyond the clean end, where the flow goes on; SiT itself is off by 1.9e-4 and 6e-5."""
    path = VariancePreservingPath(1.0, 0.0, 0.7, 4.0, margins=(0.05, 0.0))
    form, x = Parameterization(PREDICTIONS[predicted], path), ODES["x_T"].double()

    def denoise(x: Tensor, level: Level) -> Tensor:
        assert level.time is not None
        return form.clean(x, field(x, torch.tensor([level.time], dtype=torch.float64)), level)

    ends = []
    for rtol in (1e-3, 1e-9):
        sampler: Any = sampler_by_name("ode", rtol=rtol, atol=rtol / 1000)
        ends.append(sampler.along(path)(denoise, x, path.grid(10), noise=by_number(x.shape)))
    assert_near(ends[0], ends[1], 3e-4)


DIT, DIT_CASES = recorded("dit/trajectories")
CHAINS = [case for case in DIT_CASES if case.startswith(("p.", "ddim.")) and "clip=False" in case and "-" not in case]


@pytest.mark.parametrize("case", [c for c in CHAINS if "learn_sigma=False.clip" not in c])
def test_chains_of_dit(case: str) -> None:
    """p_sample_loop with the learned variance, or the posterior's, and DDIM; a step's noise is drawn at its end."""
    made = DIT_CASES[case]["create_diffusion"]
    schedule, spacing = Schedule("linear", 0.0001, 0.02), made["timestep_respacing"]
    count = int(spacing.removeprefix("ddim"))
    times = list(range(0, 1000, 1000 // count))[::-1] if spacing.startswith("ddim") else None
    grid = schedule.grid(count, "linspace") if times is None else [*(schedule.level(t) for t in times), END]
    prediction = CleanPrediction() if made.get("predict_xstart") else EpsPrediction()
    learned: list[Tensor] = []

    def denoise(x: Tensor, level: Level) -> Tensor:
        assert level.time is not None
        learned[:] = [0.6 * torch.sin(3 * x + 2 * level.time / 1000)]
        return prediction.clean(x, field(x, level.time / 1000), level)

    x = DIT["x_T"]
    sampler: Any = sampler_by_name("ddim", eta=DIT_CASES[case]["eta"]) if case[0] == "d" else sampler_by_name("ddpm")
    if case[0] == "p" and made.get("learn_sigma", True):
        sampler = sampler.with_variance(learned)
    assert_near(sampler(denoise, x, grid, noise=by_number(x.shape)), DIT[case])


L, L_CASES = recorded("sit/likelihoods")


@pytest.mark.parametrize("case", L_CASES)
def test_likelihoods_of_sit(case: str) -> None:
    one = L_CASES[case]
    kind, predicted = one["path_type"], one["prediction"]
    least, most = torch.tensor([0.001, 0.999]).tolist()  # the program's times are float32
    ends = (0.0, 0.0) if predicted == "velocity" else (0.0 if kind == "VP" else least, 1 - most)
    path = type(PATHS[kind])(1.0, 0.0, margins=ends)
    x = L["x"] if "euler" in case else L["x"].double()
    options = {"steps": 10} if "euler" in case else {"rtol": 1e-9, "atol": 1e-9}
    signs = torch.ones_like(x)  # the stand-in's Jacobian is diagonal
    nats, noise = log_likelihood(network(kind, predicted), path, x, signs, **options)  # type: ignore[arg-type]
    # its alpha and sigma are float32 too, which noises feel at 0.001 from the noise end
    tolerance = 5e-5 if "euler" in case else 5e-7 if predicted == "noise" else 1e-7
    assert_near(nats, L[f"{case}.logp"], tolerance)
    assert_near(noise, L[f"{case}.latent"], tolerance)


def test_the_likelihood_of_k_diffusion() -> None:
    x = K["likelihood.x"].double()
    nats, _ = log_likelihood(denoise, EdmPath(0.02, 20.0), x, torch.ones_like(x), rtol=1e-9, atol=1e-9)
    assert_near(nats, K["likelihood.ll"], 1e-7)


def test_the_likelihood_of_a_known_density() -> None:
    """A mixture of Gaussians: the density itself, within the tolerance of the solver."""
    x = torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None, None, None]
    nats, _ = log_likelihood(exact_mixture.denoise, LinearPath(0.0, 1.0), x, torch.ones_like(x), rtol=1e-8, atol=1e-8)
    parts = [p / s * torch.exp(-0.5 * ((x - m) / s) ** 2) for p, m, s in exact_mixture.PARTS]
    known = torch.stack(parts).sum(0) / (2 * torch.pi) ** 0.5
    assert_near(nats, known.log().flatten(), 1e-4)


LIGHTNING, LIGHTNING_CASES = recorded("lightningdit/transport")


@pytest.mark.parametrize("case", [case for case in LIGHTNING_CASES if case.startswith("ode.")])
def test_shifted_times_of_lightningdit(case: str) -> None:
    """Its shift is of times that run to the data, the inverse of ours; dopri5 sees the ends alone."""
    one = LIGHTNING_CASES[case]
    path = LinearPath(1.0, 0.0).with_shift(1 / one["timestep_shift"] if one["timestep_shift"] else 1.0)
    grid = path.grid(one["num_steps"] - 1)
    x = LIGHTNING["x_T"]
    sampler: Any = sampler_by_name("ode", method=one["sampling_method"])
    assert_near(sampler.along(path)(network("Linear", "velocity"), x, grid, noise=by_number(x.shape)), LIGHTNING[case])


SD3, SD3_CASES = recorded("diffusers/flow_match")


@pytest.mark.parametrize(("case", "shift"), [("shift1", 1.0), ("sigmas.shift3", 3.0)])
def test_shifted_steps_of_sd3(case: str, shift: float) -> None:
    """FlowMatchEulerDiscreteScheduler with sigmas 1 .. 1 / N; without them it also shifts the lower end."""
    path = LinearPath(0.0, 1000.0, shift=shift)
    grid = path.grid(10) if shift > 1 else [*(path.level(float(t)) for t in SD3[f"{case}.timesteps"]), END]
    if shift > 1:
        assert_near(torch.tensor([level.sigma for level in grid]), SD3[f"{case}.sigmas"])
        assert_near(torch.tensor([level.time for level in grid[:-1]]) / 1000, SD3[f"{case}.timesteps"] / 1000)
    form = Parameterization(VelocityPrediction(), path)

    def denoise(x: Tensor, level: Level) -> Tensor:
        assert level.time is not None
        return form.clean(x, field(x, level.time / 1000), level)

    x = SD3["x_T"]
    assert_near(sampler_by_name("euler")(denoise, x, grid, noise=by_number(x.shape)), SD3[case])


REPA, REPA_CASES = recorded("repa/samplers")
UNGUIDED = [c for c in REPA_CASES if "cfg_scale=1.0" in c]


@pytest.mark.parametrize("case", UNGUIDED)
def test_samplers_of_repa(case: str) -> None:
    """Euler, Heun, and Euler-Maruyama with w = t from 1 to 0.04 and a last step without noise; data at t = 0."""
    one = REPA_CASES[case]
    path = (CosinePath if one.get("path_type") == "cosine" else LinearPath)(0.0, 1.0)
    form, label = Parameterization(VelocityPrediction(), path), REPA["y"]

    def denoise(x: Tensor, level: Level) -> Tensor:
        time, c = torch.tensor([level.time], dtype=torch.float32), 0.5 * label.float() - 0.7
        return form.clean(x, field(x.float(), time, c).double(), level)

    x, steps = REPA["x_T"].double(), one["num_steps"]
    if one["function"] == "euler_sampler":
        grid = path.grid(steps)
        sampler: Any = sampler_by_name("ode", method="heun2" if one.get("heun") else "euler")
        if one.get("heun"):  # its last step is Euler's
            x = sampler.along(path)(denoise, x, grid[:-1], noise=by_number(x.shape))
            grid, sampler = grid[-2:], sampler_by_name("ode", method="euler")
    else:
        sampler = sampler_by_name("sde", form="linear")
        times = torch.linspace(1, 0.04, steps, dtype=torch.float64).tolist()
        grid = [*(path.level(time) for time in times), END]
    found = sampler.along(path)(denoise, x, grid, noise=by_number(x.shape, torch.float64))
    assert_near(found, REPA[case])


EDM2, EDM2_CASES = recorded("edm2/samplers")


@pytest.mark.parametrize("case", [case for case, one in EDM2_CASES.items() if "guidance" not in one])
def test_edm2(case: str) -> None:
    """Heun's steps, in float32 and float64; this program draws a noise on steps with churn alone."""
    one, drawn = EDM2_CASES[case], []
    x = EDM2["x_T"].to(getattr(torch, one.get("dtype", "float32")))

    def noise(step: int) -> Tensor:
        drawn.append(step)
        return drawn_noise(f"noise.{len(drawn)}", *x.shape).to(x.dtype)

    path = EdmPath(one.get("sigma_min", 0.002), one.get("sigma_max", 80.0))
    grid = path.grid(one["num_steps"], f"karras:{one.get('rho', 7)}")
    sampler: Any = sampler_by_name("heun", **{ours: one[name] for name, ours in CHURN.items() if name in one})
    labels = EDM2["c"] if one["labels"] else None

    def denoise(x: Tensor, level: Level) -> Tensor:
        return preconditioned(x, torch.tensor([level.sigma], dtype=torch.float64).to(x.dtype), labels)

    found = sampler.along(path)(denoise, x * grid[0].sigma, grid, noise=noise)
    assert_near(found, EDM2[case], 1e-7 if x.dtype == torch.float64 else 5e-5)
    assert len(drawn) == one["noises_drawn"]


DDPM, DDPM_CASES = recorded("diffusers/ddpm_family")
MULTISTEP = ["2m_sde", "2m_sde.heun", "2m_sde.trailing", "2m_sde.v", "2m_sde.long", "2m", "2m.leading"]


@pytest.mark.parametrize("case", [*MULTISTEP, "ddpm.fixed_small", "ddim.zero_snr.v.trailing"])
def test_multistep_solvers_of_diffusers(case: str) -> None:
    """On the levels of a discrete schedule, where alpha is not 1; the times are those that it visits."""
    one = DDPM_CASES[case]
    zero = bool(one.get("rescale_betas_zero_snr"))
    schedule = Schedule("scaled_linear", 0.00085, 0.012, zero_terminal_snr=zero)
    prediction = VPrediction() if one.get("prediction_type") == "v_prediction" else EpsPrediction()
    grid = [*(schedule.level(float(t)) for t in DDPM[f"{case}.timesteps"]), END]

    def denoise(x: Tensor, level: Level) -> Tensor:
        assert level.time is not None
        return prediction.clean(x, field(x, level.time / 1000), level)

    sde = one.get("algorithm_type") == "sde-dpmsolver++"
    name = "dpmpp_2m_sde" if sde else case.split(".")[0].replace("2m", "dpmpp_2m")
    sampler: Any = sampler_by_name(name, **({"midpoint": one.get("solver_type") != "heun"} if sde else {}))
    x = DDPM["x_T"]
    assert_near(sampler.along(schedule)(denoise, x, grid, noise=by_number(x.shape)), DDPM[case])
