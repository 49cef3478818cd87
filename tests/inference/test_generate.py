"""An image is a function of seed, number, conditions and settings: neither company nor processes change it."""

import pytest
import torch
from torch import Tensor

from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError
from ldmlab.inference.model import LoadedModel, generate
from ldmlab.inference.sample_settings import SampleSettings
from ldmlab.samplers.ddim import Ddim
from sampling_models import tiny_model

REQUESTS = [{"class_id": i % 10} for i in range(7)]
SETTINGS = SampleSettings(steps=5, guidance_scale=2.0, eta=1.0, seed=3)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model()


def images(model: LoadedModel, **options: int) -> dict[int, Tensor]:
    found = {}
    for numbers, batch in generate(model, REQUESTS, SETTINGS, **options):
        found |= dict(zip(numbers, batch, strict=True))
    return found


def largest_difference(a: dict[int, Tensor], b: dict[int, Tensor]) -> int:
    return max(int((a[i].int() - b[i].int()).abs().max()) for i in b)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_any_batch_size_gives_the_same_image(model: LoadedModel, batch_size: int) -> None:
    whole, parts = images(model, batch_size=7), images(model, batch_size=batch_size)
    assert whole.keys() == parts.keys() == set(range(7))
    assert largest_difference(whole, parts) <= 1
    assert len({image.numpy().tobytes() for image in whole.values()}) == 7


def test_two_processes_share_the_numbers(model: LoadedModel) -> None:
    whole = images(model, batch_size=2)
    halves = [images(model, batch_size=2, rank=rank, world=2) for rank in (0, 1)]
    assert [sorted(half) for half in halves] == [[0, 2, 4, 6], [1, 3, 5]]
    assert largest_difference(whole, halves[0] | halves[1]) <= 1


def test_one_of_many_can_be_made_again(model: LoadedModel) -> None:
    [(numbers, again)] = generate(model, REQUESTS[5:6], SETTINGS, first_index=5)
    assert numbers == [5]
    assert largest_difference(images(model), {5: again[0]}) <= 1


def test_noise_is_bit_identical(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start and at every step, whatever the batch."""
    seen: list[dict[tuple[int, int], bytes]] = []

    class Watching(Ddim):
        def __call__(self, denoise, x, grid, *, noise, after_step=None):
            numbers = next(queue)
            drawn = [x, *(noise(step) for step in range(len(grid) - 1))]
            seen[-1].update(
                {(n, s): t[i].numpy().tobytes() for s, t in enumerate(drawn) for i, n in enumerate(numbers)}
            )
            return super().__call__(denoise, x, grid, noise=noise, after_step=after_step)

    monkeypatch.setattr("ldmlab.inference.sample_settings.sampler_by_name", lambda name, **options: Watching(**options))
    for batch_size in (1, 3, 7):
        queue = iter([list(range(7))[i : i + batch_size] for i in range(0, 7, batch_size)])
        seen.append({})
        images(model, batch_size=batch_size)
    assert len(seen[0]) == 7 * 6
    assert len(set(seen[0].values())) == 7 * 6
    assert seen[0] == seen[1] == seen[2]


def test_python_face(model: LoadedModel) -> None:
    batch = model.sample(class_id=[1, 2, 3], steps=2, seed=5, batch_size=2)
    assert batch.shape == (3, 16, 16, 3)
    assert batch.dtype == torch.uint8
    assert model.sample(class_id=torch.tensor([1]), steps=2, size=(8, 20)).shape == (1, 8, 20, 3)
    latents = model.encode(batch)
    assert latents.shape == (3, 2, 8, 8)
    assert model.decode(latents).shape == (3, 16, 16, 3)
    told = model.conditioning(class_id=[1, 2, 3])
    clean = model.denoise(latents, 500, told)
    assert clean.shape == latents.shape
    assert not torch.equal(clean, model.denoise(latents, 500, model.conditioning(class_id=[4, 5, 6])))
    assert tiny_model(None).sample(count=2, steps=2).shape == (2, 16, 16, 3)
    assert tiny_model(None).denoise(latents, 500, Conditioning()).shape == latents.shape
    assert tiny_model("caption").sample(caption=["ein Apfel", "猫"], steps=2).shape == (2, 16, 16, 3)


def test_half_precision_samples_look_alike(model: LoadedModel) -> None:
    exact = model.sample(class_id=[1], steps=5).int()
    half = tiny_model().in_precision("bfloat16").sample(class_id=[1], steps=5).int()
    assert float((exact - half).abs().float().mean()) < 4


def test_defaults(model: LoadedModel) -> None:
    settings = model.resolved(SampleSettings())
    assert (settings.steps, settings.guidance_scale, settings.size, settings.spacing) == (50, 3.0, (16, 16), "official")
    assert model.resolved(SampleSettings(sampler="ddpm")).steps == 1000
    assert tiny_model(guidance_trained=False).resolved(SampleSettings()).guidance_scale == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, r"steps=3: .*steps=2 or 4"),
        ({"steps": 0}, "steps=0 is outside 1 .. 1000000"),
        ({"steps": 10**12}, "steps=1000000000000 is outside 1 .. 1000000"),
        ({"size": 15}, "size=15x15"),
        ({"sampler": "dpm"}, "choose one of consistency, ddim"),
        ({"sampler": "ddpm", "eta": 0.5}, "eta=0.5: the sampler ddpm"),
        ({"eta": -1.0}, "eta=-1.0 is outside"),
        ({"seed": -1}, "seed=-1 is outside"),
        ({"spacing": "even"}, "spacing=even"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_work(model: LoadedModel, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.resolved(SampleSettings(**options))


def test_calls_that_cannot_be_are_refused(model: LoadedModel) -> None:
    with pytest.raises(InputError, match="caption= is no setting and no input of this model, which takes class_id"):
        model.sample(caption=["a cat"])
    with pytest.raises(InputError, match="give class_id, one entry an image"):
        model.sample()
    with pytest.raises(InputError, match=r"class_id 11 is not a class of this model; classes: 0"):
        model.sample(class_id=[11], steps=2)
    with pytest.raises(InputError, match="batch_size=0"):
        model.sample(class_id=[1], batch_size=0)
    with pytest.raises(InputError, match="precision=float8"):
        model.in_precision("float8")
    with pytest.raises(InputError, match=r"encode takes uint8 \(B, H, W, 3\)"):
        model.encode(torch.zeros(1, 3, 16, 16))


def test_a_model_that_gives_no_numbers_is_not_scored_as_black() -> None:
    broken = tiny_model()
    for parameter in broken.diffusion.first_stage.parameters():
        parameter.data.view(-1)[0] = float("nan")
    with pytest.raises(InputError, match="7 of 7 images from the model hold values that are no numbers"):
        images(broken, batch_size=7)
