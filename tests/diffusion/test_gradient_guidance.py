"""Guides against exact answers: mixtures of Gaussians whose denoiser and classifier are known, and linear images."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmlab.contracts import Denoise, Level
from ldmlab.diffusion.guidance import ClassifierGuider, ImageGuider, guided_by_noisy, shrunk, squared_error
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule, ddim_grid
from ldmlab.errors import InputError
from ldmlab.first_stages.identity import Identity
from ldmlab.randomness import normal
from ldmlab.samplers.ddim import Ddim

SCHEDULE = Schedule()
MEANS = torch.tensor([-1.5, 0.25, 1.0], dtype=torch.float64)  # of the classes
SHARES = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
STD = 0.5  # within a class
LEVELS = [Level(math.sqrt(a), math.sqrt(1 - a), 1000 * (1 - a)) for a in (0.999, 0.7, 0.2, 0.01)]
EDM = [Level(1.0, sigma, 2000 + sigma) for sigma in (0.05, 1.0, 20.0)]  # alpha = 1


def log_joint(x: Tensor, level: Level) -> Tensor:
    """log p(class, x) up to a constant, (B, 3), for x (B, 1, 1, 1)."""
    variance = level.alpha**2 * STD**2 + level.sigma**2
    return SHARES.log() - (x.reshape(-1, 1) - level.alpha * MEANS).square() / (2 * variance)


def of_class(number: int) -> Denoise:
    """E[clean | x, class]."""

    def denoise(x: Tensor, level: Level) -> Tensor:
        gain = level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2)
        return MEANS[number] + gain * (x - level.alpha * MEANS[number])

    return denoise


def of_any(x: Tensor, level: Level) -> Tensor:
    """E[clean | x]."""
    shares = log_joint(x, level).softmax(1)  # (B, 3)
    each = torch.stack([of_class(number)(x, level).reshape(-1) for number in range(3)], dim=1)
    return (shares * each).sum(1).reshape(x.shape)


class ExactClassifier(nn.Module):
    """Logits of the class given x; the level is found by its time."""

    classes = 3

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = next(level for level in (*LEVELS, *EDM) if level.time == pytest.approx(float(t[0]), rel=1e-5))
        return log_joint(x.double(), level)


def points(level: Level) -> Tensor:
    """(200, 1, 1, 1), float64, where x lies at this level."""
    spread = math.sqrt(4 * level.alpha**2 + level.sigma**2)
    return (torch.linspace(-2, 2, 200, dtype=torch.float64) * spread).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("level", [*LEVELS, *EDM], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_an_exact_classifier_gives_the_exact_conditional_and_tilted_denoiser(level: Level, scale: float) -> None:
    """Scale 1 is Bayes; scale s tilts p(x) by p(class | x)^s, whose denoiser is D + s (D_class - D)."""
    x, wanted = points(level), torch.arange(200) % 3
    for number in range(3):
        chosen = x[wanted == number]
        guider = ClassifierGuider(ExactClassifier(), scale)
        found = guider(of_any, {"class_id": torch.full((len(chosen),), number)})(chosen, level)
        plain, told = of_any(chosen, level), of_class(number)(chosen, level)
        # the guider's gradient is float32: x is rounded to it before the classifier
        torch.testing.assert_close(found, plain + scale * (told - plain), atol=3e-5 * (1 + scale), rtol=0)
        assert not scale or (found - plain).abs().max() > 0.005


def test_it_adds_to_classifier_free_guidance() -> None:
    """Guidance g and classifier scale s together tilt as g + s do, both being exact."""
    level, x = LEVELS[2], points(LEVELS[2])

    def classifier_free(x: Tensor, level: Level) -> Tensor:
        return torch.lerp(of_any(x, level), of_class(2)(x, level), 2.5)

    guider = ClassifierGuider(ExactClassifier(), 1.5)
    found = guider(classifier_free, {"class_id": torch.full((200,), 2)})(x, level)
    plain, told = of_any(x, level), of_class(2)(x, level)
    torch.testing.assert_close(found, plain + 4.0 * (told - plain), atol=2e-4, rtol=0)


def test_the_same_shift_in_terms_of_noise() -> None:
    """eps' = eps - s sigma grad_x l(x)."""
    level, x = LEVELS[1], points(LEVELS[1])
    slope = torch.linspace(-1, 1, 200, dtype=torch.float64).reshape(-1, 1, 1, 1)
    found = guided_by_noisy(of_any, lambda x, level: (slope * x).flatten(1).sum(1), 0.7)(x, level)
    eps, eps_found = ((x - level.alpha * clean) / level.sigma for clean in (of_any(x, level), found))
    torch.testing.assert_close(eps_found, eps - 0.7 * level.sigma * slope)


MATRIX = torch.tensor([[1.0, -0.5, 0.2, 0.0], [0.3, 0.8, 0.0, -0.4]], dtype=torch.float64)  # latent of 4 => 2 pixels
TARGET = torch.tensor([0.6, -0.2], dtype=torch.float64)


def gaussian(x: Tensor, level: Level) -> Tensor:
    """E[clean | x] of clean ~ N(0.1, STD^2)."""
    return 0.1 + level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2) * (x - level.alpha * 0.1)


def pulled(x: Tensor, level: Level, weight: float) -> Tensor:
    """`gaussian` with the image guider on linear pixels; x (B, 4, 1, 1)."""
    from ldmlab.diffusion.guidance import guided_by_clean

    def log_likelihood(clean: Tensor) -> Tensor:
        return -squared_error((clean.flatten(1) @ MATRIX.T)[:, :, None, None], TARGET[None, :, None, None])

    return guided_by_clean(gaussian, log_likelihood, weight)(x, level)


@pytest.mark.parametrize("level", [*LEVELS, *EDM], ids=str)
def test_a_linear_image_pulls_by_the_posterior_variance(level: Level) -> None:
    """clean + w v A^T (y - A clean), v = Var[clean | x]: J sigma^2 / alpha = v for any denoiser J = dD/dx (Tweedie)."""
    x = points(level)[:50].repeat(1, 4, 1, 1)
    variance = STD**2 * level.sigma**2 / (level.alpha**2 * STD**2 + level.sigma**2)
    clean = gaussian(x, level).flatten(1)
    expected = clean + 2.0 * variance * (TARGET - clean @ MATRIX.T) @ MATRIX
    torch.testing.assert_close(pulled(x, level, 2.0).flatten(1), expected)


def test_it_is_the_posterior_mean_where_little_is_left_to_guess() -> None:
    """Exact: clean + v A^T (I / w + v A A^T)^-1 (y - A clean); the guider leaves out v A A^T, which falls as v."""
    errors = []
    for sigma in (0.2, 0.1, 0.05):
        level = Level(math.sqrt(1 - sigma**2), sigma, 0.0)
        x = points(level)[:50].repeat(1, 4, 1, 1)
        variance = STD**2 * sigma**2 / (level.alpha**2 * STD**2 + sigma**2)
        clean = gaussian(x, level).flatten(1)
        inverse = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + variance * MATRIX @ MATRIX.T)
        shift = variance * (TARGET - clean @ MATRIX.T) @ inverse @ MATRIX
        found = pulled(x, level, 1.0).flatten(1) - clean
        errors.append(float((found - shift).norm() / shift.norm()))
    assert errors[0] < 0.08
    assert errors[0] > 3 * errors[1] > 9 * errors[2]  # v falls by nearly four


# ---- in a model


class Net(nn.Module):
    """The noise in pixels drawn from N(0, STD^2), disturbed a little by a convolution with drawn weights."""

    accepts: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def prepare(self, conditioning: Any) -> Any:
        return conditioning

    def forward(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        alpha, sigma = SCHEDULE.levels(t.long())
        return sigma / (alpha**2 * STD**2 + sigma**2) * x + 0.02 * self.conv(x)


class MeanClassifier(nn.Module):
    """Class 1 is bright, class 0 dark; judged by the clean pixels that the noisy ones suggest."""

    classes = 2

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = SCHEDULE.levels(t.long())
        brightness = (alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * x).mean(dim=(1, 2, 3))
        return torch.stack([-brightness, brightness], dim=1)


def model() -> LatentDiffusion:
    torch.manual_seed(0)
    made = LatentDiffusion(Identity(), LatentScale(), Net(), {}, SCHEDULE, EpsPrediction())
    return made.eval().requires_grad_(False)


def sample(batch: dict[str, Any], count: int = 4, first: int = 0, **options: Any) -> Tensor:
    index = torch.arange(first, first + count)
    grid = ddim_grid(SCHEDULE, 10)
    return model().sample(batch, sampler=Ddim(), grid=grid, index=index, size=(16, 16), **options)


def test_samples_follow_the_classifier_and_do_not_depend_on_their_company() -> None:
    batch = {"class_id": torch.tensor([0, 1, 0, 1])}
    guider = ClassifierGuider(MeanClassifier(), 300.0)
    guided, free = sample(batch, guiders=[guider]), sample(batch)
    change = (guided - free).mean(dim=(1, 2, 3))
    assert (change[0::2] < -0.05).all()
    assert (change[1::2] > 0.05).all()
    alone = sample({"class_id": torch.tensor([1])}, count=1, first=3, guiders=[guider])
    torch.testing.assert_close(alone, guided[3:])
    torch.testing.assert_close(sample(batch, guiders=[ClassifierGuider(MeanClassifier(), 0.0)]), free)


def test_samples_come_near_to_a_smaller_image_and_both_guides_work_together() -> None:
    target = (normal(3, "target", torch.arange(4), (3, 4, 4)) * 30 + 128).clamp(0, 255).byte()
    batch = {"low_resolution": target, "class_id": torch.tensor([0, 1, 0, 1])}
    aim = target.float() / 127.5 - 1

    def away(images: Tensor) -> Tensor:
        return (shrunk(images, (4, 4)) - aim).square().mean(dim=(1, 2, 3))

    pull = ImageGuider(model().pixels, squared_error, 100.0)
    push = ClassifierGuider(MeanClassifier(), 300.0)
    free, guided, both = sample(batch), sample(batch, guiders=[pull]), sample(batch, guiders=[push, pull])
    assert (away(guided) < 0.3 * away(free)).all()
    assert (both - guided).abs().max() > 1e-3
    assert (away(both) < 0.4 * away(free)).all()
    one = ImageGuider(model().pixels, squared_error, 100.0, target=target[2])
    assert one.reads == frozenset()
    torch.testing.assert_close(sample({}, count=1, first=2, guiders=[one]), guided[2:3], atol=1e-5, rtol=0)


def test_the_guides_say_what_they_did() -> None:
    assert ClassifierGuider(MeanClassifier(), 10.0, "runs/c").as_text() == {
        "classifier": "runs/c", "classifier_scale": 10.0
    }  # fmt: skip
    guider = ImageGuider(model().pixels, squared_error, 0.5, name="squared")
    assert guider.as_text() == {"guider": "squared", "guider_weight": 0.5}
    assert guider.reads == {"low_resolution"}


def test_shrinking_is_that_of_the_super_resolution_task() -> None:
    """As Pillow shrinks, which makes the low-resolution images; it rounds to bytes between its two passes."""
    import numpy as np
    from PIL import Image

    image = (normal(0, "p", torch.arange(1), (3, 32, 32)) * 40 + 128).clamp(0, 255).byte()
    rows = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((8, 8), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(rows)).permute(2, 0, 1).float()
    torch.testing.assert_close(shrunk(image.float(), (8, 8))[0], expected, atol=1.1, rtol=0)
    assert shrunk(image.float(), (32, 32)).shape == (1, 3, 32, 32)


def test_what_cannot_be_is_refused() -> None:
    guider = ClassifierGuider(MeanClassifier(), 10.0)
    with pytest.raises(InputError, match=r"class_id 0 \.\. 2 is outside the classifier's 0 \.\. 1"):
        sample({"class_id": torch.tensor([0, 2])}, count=2, guiders=[guider])
    for strength in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="is not a finite number of 0 or more"):
            ClassifierGuider(MeanClassifier(), strength)
        with pytest.raises(InputError, match="is not a finite number of 0 or more"):
            ImageGuider(model().pixels, squared_error, strength)
    with pytest.raises(InputError, match="no signal is left"):
        guider(of_any, {"class_id": torch.tensor([0])})(torch.zeros(1, 1, 1, 1), Level(0.0, 1.0, 999.0))
    large = ImageGuider(model().pixels, squared_error, 1.0, target=torch.zeros(3, 32, 16, dtype=torch.uint8))
    with pytest.raises(InputError, match="32x16 is larger than the sample of 16x16"):
        sample({}, count=1, guiders=[large])


class LinearClassifier(nn.Module):
    """One matrix, which autocast would round."""

    classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(48, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.matrix(x.flatten(1))


def test_half_precision_around_a_guide_keeps_its_gradient() -> None:
    torch.manual_seed(0)
    level, batch = LEVELS[1], {"class_id": torch.tensor([1, 0])}
    x = normal(0, "x", torch.arange(2), (3, 4, 4))
    guided = ClassifierGuider(LinearClassifier(), 2.0)(lambda x, level: x, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = guided(x, level)
    assert torch.equal(found, guided(x, level))
    assert (found - x).abs().max() > 0.01
