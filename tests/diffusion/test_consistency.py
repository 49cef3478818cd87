"""Consistency distillation of teachers whose flow is known: the exact function has no loss, and training comes near."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmlab.backbones.dit import DiT
from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.contracts import Conditioning
from ldmlab.diffusion.consistency_distillation import Consistency, Levels
from ldmlab.diffusion.guidance import Guidance
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import (
    CleanPrediction,
    EdmPrediction,
    EpsPrediction,
    LearnedVariance,
    ScorePrediction,
    VelocityPrediction,
    VPrediction,
)
from ldmlab.diffusion.paths import EdmPath, LinearPath
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.first_stages.identity import Identity
from ldmlab.randomness import normal
from ldmlab.samplers.consistency import Consistency as Sampler
from ldmlab.samplers.ddim import Ddim

SPREAD = 0.6  # deviation of the Gaussian data
PATHS = {"schedule": Schedule, "flow": LinearPath, "edm": EdmPath}


class Linear(nn.Module):
    """A clean estimate that is a multiple of x, by the time."""

    accepts = frozenset({"numbers"})

    def __init__(self, times: list[float], factors: list[float]) -> None:
        super().__init__()
        self.times = torch.tensor(times)
        self.factors = nn.Parameter(torch.tensor(factors))

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        return conditioning

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        found = (t[:, None] - self.times).abs().argmin(1)
        return self.factors[found][:, None, None, None] * x


def parts(backbone: nn.Module, schedule: Any, prediction: Any) -> dict[str, Any]:
    stage: dict[str, Any] = {"first_stage": Identity(), "latent_scale": LatentScale(1.0), "conditioners": {}}
    return {**stage, "backbone": backbone, "schedule": schedule, "prediction": prediction}


def gaussian(kind: str, levels: int, **options: Any) -> Consistency:
    """A student that is exact for the teacher's solver on the grid, and its teacher, E[clean | x] of Gaussian data."""
    schedule = PATHS[kind]()
    model = Consistency(**parts(nn.Identity(), schedule, CleanPrediction()) | {"backbone": Linear([0.0], [0.0])})
    grid = model.path.grid(levels, model.path.solver.spacing)
    times = [float(level.time) for level in grid[:-1]]  # type: ignore[arg-type]
    known = [v.alpha * SPREAD**2 / ((v.alpha * SPREAD) ** 2 + v.sigma**2) for v in grid[:-1]]
    steps = [factor(kind, pair, known[i : i + 2]) for i, pair in enumerate(pairwise(grid))]
    ends = [math.prod(steps[i:]) for i in range(levels)]
    skips = [model.skip(v.alpha, v.sigma) for v in grid[:-1]]
    own = [(f - s) / (1 - s * v.alpha) for f, s, v in zip(ends, skips, grid, strict=False)]
    teacher = LatentDiffusion(**parts(Linear(times, known), schedule, CleanPrediction()))
    student = Consistency(
        **parts(Linear(times, own), schedule, CleanPrediction()), levels=levels, **{"loss": "l2", **options}
    )
    student.distil(teacher, 12)
    return student


def factor(kind: str, pair: Any, known: list[float]) -> float:
    """By how much a step of DDIM, of Euler's method or, on EDM's path, of Heun's multiplies x."""
    here, there = pair
    first = there.alpha * known[0] + there.sigma / here.sigma * (1 - here.alpha * known[0])
    if kind != "edm" or there.sigma == 0:
        return first
    slopes = (1 - known[0]) / here.sigma, first * (1 - known[1]) / there.sigma
    return 1 + (there.sigma - here.sigma) * sum(slopes) / 2


def batch(count: int) -> dict[str, Any]:
    position = torch.arange(count)
    return {"position": position, "moments": SPREAD * normal(5, "data", position, (3, 2, 2))}


@pytest.mark.parametrize("kind", PATHS)
def test_the_exact_function_has_no_loss_and_no_gradient(kind: str) -> None:
    student = gaussian(kind, 40)
    loss, _ = student.loss(batch(256), seed=1)
    scale = max(float(student.table[2].max()), 1) ** 2  # x itself is that large
    assert float(loss.detach().max()) < 1e-10 * scale  # float32 rounds each of about ten operations to 1e-7
    loss.mean().backward()
    assert float(student.backbone.factors.grad.abs().max()) < 1e-4 * scale  # type: ignore[union-attr, operator]
    student.backbone.factors.data[::2] *= 1.05  # type: ignore[index, union-attr]
    assert float(student.loss(batch(256), seed=1)[0].detach().mean()) > 1e-5


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_of_the_exact_function_have_the_spread_of_the_data(kind: str, steps: int) -> None:
    student = gaussian(kind, 200)
    index = torch.arange(4000)
    grid = student.path.grid(steps, student.path.solver.spacing)
    ends = Sampler()(
        student.denoiser(Conditioning()), grid[0].sigma * normal(0, "start", index, (3, 1, 1)), grid,
        noise=lambda step: normal(0, "sample", index, (3, 1, 1), step=step + 1),
    )  # fmt: skip
    # 12,000 numbers: 3 standard errors are 2 %; the solver of 200 steps and the time between levels add a few more
    assert float(ends.detach().std()) == pytest.approx(SPREAD, rel=0.06)


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [
        (EpsPrediction(), Schedule()),
        (ScorePrediction(), Schedule()),
        (VPrediction(), Schedule(zero_terminal_snr=True)),
        (VelocityPrediction("data"), LinearPath(1.0, 0.0)),
        (EdmPrediction(), EdmPath()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_estimate_is_the_prediction_s(prediction: Any, schedule: Any) -> None:
    student = Consistency(**parts(Linear([0.0], [0.5]), schedule, prediction), levels=10)
    student.distil(LatentDiffusion(**parts(Linear([0.0], [0.5]), schedule, prediction)), 12)
    x = torch.randn(10, 3, 2, 2)
    found = student.estimate(student.backbone, x, student.at(torch.arange(10)), Conditioning())
    grid = student.path.grid(10, student.path.solver.spacing)
    exact = [student.teacher.denoiser(Conditioning())(x[i : i + 1], level) for i, level in enumerate(grid[:-1])]  # type: ignore[union-attr]
    torch.testing.assert_close(found, torch.cat(exact).float(), rtol=2e-5, atol=2e-4)


class Mixture(nn.Module):
    """E[clean | x] of two numbers around (2, 0) and (-1, 1), each with deviation 0.3, on the linear path."""

    accepts: frozenset[str] = frozenset()
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.0]])

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        return conditioning

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        s = (t / 1000)[:, None]
        variance = (1 - s) ** 2 * 0.3**2 + s**2
        off = x.flatten(1)[:, None] - (1 - s)[:, None] * self.centres  # (B, 2, 2)
        share = torch.softmax(-off.square().sum(2) / (2 * variance), dim=1)
        each = self.centres + ((1 - s) * 0.3**2 / variance)[:, None] * off
        return (share[..., None] * each).sum(1)[:, :, None, None]


class Small(nn.Module):
    accepts: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        return conditioning

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), t[:, None] / 1000], dim=1))[:, :, None, None]


class TwoNumbers(Identity):
    latent_channels = 2


@pytest.mark.slow
@pytest.mark.parametrize("target_decay", [None, 0.9])
def test_one_step_comes_near_the_teacher_s_end(target_decay: float | None) -> None:
    """Where 200 steps of the teacher end, one step of the student is less than a third as far as the teacher's own."""
    torch.manual_seed(0)
    made = {**parts(Mixture(), LinearPath(), CleanPrediction()), "first_stage": TwoNumbers()}
    teacher = LatentDiffusion(**made)
    student = Consistency(**{**made, "backbone": Small()}, levels=16, loss="l2", target_decay=target_decay).train()
    student.distil(teacher, 2)
    optimizer = torch.optim.Adam(student.backbone.parameters(), 4e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for step in range(500):
        centres = Mixture.centres[torch.randint(2, (256,))]
        clean = (centres + 0.3 * torch.randn(256, 2))[:, :, None, None]
        loss, _ = student.loss({"moments": clean, "position": torch.arange(256) + 256 * step}, seed=0)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        student.step_taken()
        rates.step()
    x = torch.randn(2000, 2, 1, 1)
    ends = {}
    with torch.no_grad():
        for name, model, steps in (("exact", teacher, 200), ("teacher", teacher, 1), ("student", student, 1)):
            ends[name] = Ddim()(model.denoiser(Conditioning()), x, model.path.grid(steps), noise=lambda _: x)  # type: ignore
    off = {name: float((end - ends["exact"]).square().mean().sqrt()) for name, end in ends.items()}
    assert off["student"] < off["teacher"] / 3, off


def test_the_student_of_a_guided_teacher() -> None:
    """The teacher's estimate at the image's own scale is eps() + w (eps(c) - eps()), in one doubled pass."""
    labels = {"label": ClassEmbedder(4, width=32, slot="vector", drop=0.5)}
    network = DiT(3, 3, 32, 1, 2, vector_width=32)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    known = {**parts(network, Schedule(), EpsPrediction()), "conditioners": labels}
    teacher = LatentDiffusion(**known, guidance_trained=True)
    student = Consistency(
        **{**known, "backbone": DiT(3, 3, 32, 1, 2, vector_width=32, numbers=1)}, guidance=(1.0, 4.0), levels=10
    )
    student.distil(teacher, 192)
    given = {"class_id": torch.tensor([1, 2])}
    both = teacher.conditioning(given), teacher.null(given)
    x, at, scale = torch.randn(2, 3, 8, 8), student.at(torch.tensor([3, 7])), torch.tensor([1.5, 4.0])
    stacked = Conditioning(vector=torch.cat([both[0].vector, both[1].vector]))  # type: ignore[list-item]
    found = student.estimate(teacher.backbone, x, at, stacked, scale)
    grid = student.path.grid(10, "trailing")
    for image, level in enumerate((grid[3], grid[7])):
        alone = [Conditioning(vector=part.vector[image : image + 1]) for part in both]  # type: ignore[index]
        exact = teacher.denoiser(*alone, guidance=Guidance(float(scale[image])))(x[image : image + 1], level)
        torch.testing.assert_close(found[image : image + 1], exact.float(), rtol=2e-5, atol=2e-4)


def test_the_clean_end_is_kept() -> None:
    student = Consistency(**parts(Linear([0.0], [0.5]), EdmPath(), CleanPrediction()), boundary=0.1)
    at = Levels(*(torch.full((1, 1, 1, 1), value) for value in (0.0, 1.0, 1e-5, 0.0, 1.0)))
    x = torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(student.f(student.backbone, x, at, Conditioning()), x)


def test_what_does_not_fit_is_refused() -> None:
    for words, options in {
        "levels=1": {"levels": 1},
        "boundary=0": {"boundary": 0.0},
        "target_decay=2": {"target_decay": 2.0},
        "diffusion.loss=l1": {"loss": "l1"},
        "guidance=2.0 needs conditions": {"guidance": 2.0},
        "never trains the variance": {"prediction": LearnedVariance(EpsPrediction())},
    }.items():
        with pytest.raises(InputError, match=words):
            Consistency(**{**parts(Linear([0.0], [0.5]), Schedule(), EpsPrediction()), **options})
