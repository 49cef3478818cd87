"""The model as training sees it: latents, conditioning, loss, guidance; tiny networks, no weight of them zero."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmlab.contracts import Conditioning, Level, Posterior, Prepared
from ldmlab.diffusion.guidance import Guidance
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule, ddim_grid
from ldmlab.errors import InputError
from ldmlab.randomness import draw, normal
from ldmlab.samplers.ddim import Ddim


class Stage(nn.Module):
    """Patches of two pixels through one matrix; half of the result is the log-variance."""

    downsampling, latent_channels = 2, 3

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 6, 2, 2), nn.ConvTranspose2d(3, 3, 2, 2)
        self.batch_norm = nn.BatchNorm2d(3)  # would change if it were ever run in training mode

    def encode(self, images: Tensor) -> Posterior:
        mean, logvar = self.down(self.batch_norm(images)).chunk(2, dim=1)
        return Posterior(3 * mean + 1, logvar - 2)

    def decode(self, raw_latents: Tensor) -> Tensor:
        return torch.tanh(self.up(raw_latents))


class Backbone(nn.Module):
    """One convolution that is told everything; counts its calls."""

    def __init__(self, slots: tuple[str, ...] = ("tokens",), extra: int = 0) -> None:
        super().__init__()
        self.accepts = frozenset(slots)
        self.conv, self.time, self.told = nn.Conv2d(3 + extra, 3, 3, padding=1), nn.Linear(1, 3), nn.Linear(4, 3)
        self.prepared, self.batches = 0, []

    def prepare(self, conditioning: Conditioning) -> Prepared:
        self.prepared += 1
        return Prepared(conditioning, cache=None)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning | Prepared) -> Tensor:
        given = conditioning.conditioning if isinstance(conditioning, Prepared) else conditioning
        self.batches.append(len(x))
        y = self.conv(x if given.spatial is None else torch.cat([x, given.spatial], dim=1))
        y = y + self.time(t[:, None] / 1000)[:, :, None, None]
        if given.tokens is not None:
            y = y + self.told(given.tokens.mean(1))[:, :, None, None]
        if given.vector is not None:
            y = y + self.told(given.vector)[:, :, None, None]
        return y


class Told(nn.Module):
    """Repeats a batch field into its slot; null is -1 everywhere."""

    def __init__(self, field: str = "told", slot: str = "tokens", drop: float = 0.1) -> None:
        super().__init__()
        self.reads, self.slot, self.drop = frozenset({field}), slot, drop
        self.shape = {"tokens": (2, 4), "vector": (4,), "spatial": (1, 4, 4)}[slot]

    def _filled(self, values: Tensor) -> Tensor:
        return values.float().reshape(-1, *[1] * len(self.shape)).expand(-1, *self.shape)

    def forward(self, batch: dict[str, Any], encode: Any) -> Tensor:
        return self._filled(batch[next(iter(self.reads))])

    def null(self, batch: dict[str, Any], encode: Any) -> Tensor:
        return self._filled(torch.full((len(batch["position"]),), -1.0))


def make(conditioners: dict[str, nn.Module] | None = None, std: float = 2.0, **options: Any) -> LatentDiffusion:
    torch.manual_seed(0)
    told = {"told": Told()} if conditioners is None else conditioners
    slots = tuple({c.slot for c in told.values()})
    backbone = Backbone(slots, extra="spatial" in slots)
    scale = LatentScale(std, 0.1)
    return LatentDiffusion(Stage(), scale, backbone, told, Schedule(), EpsPrediction(), **options)


def batch_of(count: int, first: int = 0) -> dict[str, Any]:
    position = torch.arange(first, first + count)
    image = (normal(5, "image", position, (3, 8, 8)) * 60 + 128).clamp(0, 255).to(torch.uint8)
    return {"position": position, "image": image, "told": position % 5}


def as_shards(model: LatentDiffusion, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as the reader of latent shards gives it."""
    pixels = batch["image"].float() / 127.5 - 1
    moments = model.first_stage.encode(pixels).moments().detach()
    return {name: value for name, value in batch.items() if name != "image"} | {"moments": moments}


@pytest.mark.parametrize(("factor", "agree"), [(1.0, True), (1.05, False)])
def test_latent_shards_and_images_train_alike(factor: float, agree: bool) -> None:
    """And the test can tell: a latent scale 5% off is seen."""
    batch, online, cached = batch_of(16), make(), make(std=2.0 * factor)
    stored = as_shards(online, batch)
    latents = [online.latents(batch, 3), cached.latents(stored, 3)]
    losses = [online.loss(batch, 3)[0], cached.loss(stored, 3)[0]]
    for ours, theirs in (latents, losses):
        assert bool((ours - theirs).abs().max() < 1e-4) is agree
    assert float(losses[0].detach().std()) > 0.01  # weights are not zero: the loss depends on the latents


def test_latents_are_normalised_draws_from_the_posterior() -> None:
    model, batch = make(), batch_of(4)
    posterior = model.posterior(batch["image"].float() / 127.5 - 1)
    noise = normal(3, "posterior", batch["position"], (3, 4, 4))
    torch.testing.assert_close(model.latents(batch, 3), (posterior.sample(noise) - 0.1) / 2.0)
    torch.testing.assert_close(model.encode(batch["image"].float() / 127.5 - 1), (posterior.mean - 0.1) / 2.0)
    assert not torch.equal(model.latents(batch, 3), model.latents(batch, 4))


def test_latent_scale_is_one_object_for_both_ways() -> None:
    raw = normal(0, "raw", torch.arange(64), (2, 8, 8)) * torch.tensor([2.0, 5.0])[:, None, None] + 3
    statistics = {
        "mean": raw.mean((0, 2, 3)).tolist(),
        "std": raw.std((0, 2, 3)).tolist(),
        "overall_std": float(raw.std()),
    }
    for per_channel in (False, True):
        scale = LatentScale.measured(statistics, per_channel)
        final = scale.normalise(raw)
        torch.testing.assert_close(scale.denormalise(final), raw)
        assert float(final.std()) == pytest.approx(1, abs=0.05)
        again = LatentScale([1.0, 1.0], [0.0, 0.0]) if per_channel else LatentScale()
        again.load_state_dict(scale.state_dict())  # the scale travels with the model
        torch.testing.assert_close(again.normalise(raw), final)
    torch.testing.assert_close(LatentScale.fixed(0.18215).normalise(raw), raw * 0.18215)
    with pytest.raises(InputError, match="latent scale std=0"):
        LatentScale(0.0)


def test_the_first_stage_stays_frozen() -> None:
    model = make().train()
    before = {name: value.clone() for name, value in model.first_stage.state_dict().items()}
    model.loss(batch_of(4), 0)[0].mean().backward()
    assert not any(module.training for module in model.first_stage.modules())
    assert all(p.grad is None and not p.requires_grad for p in model.first_stage.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.first_stage.state_dict().items())
    assert all(p.grad is not None for p in model.backbone.parameters())


def test_loss_is_the_formula() -> None:
    for kind, measure in (("l2", torch.square), ("l1", torch.abs)):
        model, batch = make(loss=kind).eval(), batch_of(4)
        loss, t = model.loss(batch, 3)
        clean, noise = model.latents(batch, 3), normal(3, "noise", batch["position"], (3, 4, 4))
        alpha_bar = model.schedule.alpha_bar[t].float()[:, None, None, None]
        x = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise
        output = model.backbone(x, t.float(), model.conditioning(batch))
        torch.testing.assert_close(loss, measure(output - noise).mean((1, 2, 3)))


def test_loss_belongs_to_the_position_not_to_the_batch() -> None:
    model = make().train()
    whole, times = model.loss(batch_of(8), 3)
    parts = [model.loss(batch_of(3), 3), model.loss(batch_of(5, first=3), 3)]
    torch.testing.assert_close(torch.cat([loss for loss, _ in parts]), whole, atol=1e-6, rtol=1e-6)
    assert torch.equal(torch.cat([t for _, t in parts]), times)


def test_times_cover_the_schedule_evenly() -> None:
    batch = {"position": torch.arange(20000), "moments": torch.zeros(20000, 6, 1, 1), "told": torch.zeros(20000)}
    _, times = make().loss(batch, 0)
    assert times.min() == 0
    assert times.max() == 999
    assert float(times.float().mean()) == pytest.approx(499.5, abs=4 * 288.7 / 20000**0.5)


def test_precision() -> None:
    """In bfloat16 autocast latents, schedule and loss stay float32, and the loss is near the float32 one."""
    model, batch = make().eval(), batch_of(8)
    exact, _ = model.loss(batch, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.latents(batch, 0), make().latents(batch, 0))
        loss, _ = model.loss(batch, 0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("together", [False, True])
def test_guidance_dropout_rate(together: bool) -> None:
    conditioners = {"a": Told("a", "vector", 0.1), "b": Told("b", "tokens", 0.3), "kept": Told("kept", "spatial", 0.0)}
    model = make(conditioners, drop_together=together)
    count = 10_000
    batch = {"position": torch.arange(count)} | {name: torch.zeros(count) for name in conditioners}
    drops = model.drops(draw(7, batch["position"], {}, sorted(set(model.drop_purposes.values()))))
    assert drops.keys() == {"a", "b"}
    told = model.conditioning(batch, drops)
    null_a, null_b = told.vector[:, 0] == -1, told.tokens[:, 0, 0] == -1
    assert float(null_a.float().mean()) == pytest.approx(0.1, abs=0.012)  # four standard errors
    assert float(null_b.float().mean()) == pytest.approx(0.3, abs=0.018)
    assert float((null_a & null_b).float().mean()) == pytest.approx(0.1 if together else 0.03, abs=0.012)
    assert not told.spatial.any()


@pytest.mark.parametrize("drop", [1.0, -0.1, float("nan")])
def test_a_drop_that_is_no_rate_is_refused_of_any_conditioner(drop: float) -> None:
    with pytest.raises(InputError, match=rf"conditioner\.told\.drop={drop} is no fraction"):
        make({"told": Told(drop=drop)})


def test_dropout_happens_in_training_only_and_once() -> None:
    model = make({"told": Told(drop=0.5)}, guidance_trained=True)
    batch = batch_of(32)
    assert not torch.equal(model.train().loss(batch, 0)[0], model.eval().loss(batch, 0)[0])


def test_several_conditioners_on_one_slot() -> None:
    conditioners = {
        "a": Told("a"), "b": Told("b"), "c": Told("a", "vector"), "d": Told("b", "vector"),
        "e": Told("a", "spatial"), "f": Told("b", "spatial"),
    }  # fmt: skip
    told = make(conditioners).conditioning({"a": torch.tensor([1.0]), "b": torch.tensor([2.0])})
    assert told.tokens[0, :, 0].tolist() == [1, 1, 2, 2]
    assert told.spatial[0, :, 0, 0].tolist() == [1, 2]
    assert told.vector[0].tolist() == [3, 3, 3, 3]


def test_what_training_never_dropped_stays_without_guidance() -> None:
    conditioners = {"text": Told("text"), "mask": Told("mask", "spatial", 0.0)}
    batch = {"position": torch.arange(2), "text": torch.ones(2), "mask": torch.ones(2)}
    for trained in (True, None):
        null = make(conditioners, guidance_trained=trained).null(batch)
        assert (null.tokens == -1).all()
        assert (null.spatial == 1).all()


def test_a_backbone_that_is_not_told_refuses_the_conditioner() -> None:
    with pytest.raises(InputError, match="conditioner=told fills the slot tokens but the backbone takes vector"):
        LatentDiffusion(Stage(), LatentScale(), Backbone(("vector",)), {"told": Told()}, Schedule(), EpsPrediction())
    with pytest.raises(InputError, match=r"diffusion\.loss=l3"):
        make(loss="l3")
    with pytest.raises(InputError, match="neither latents nor images"):
        make().loss({"position": torch.arange(2)}, 0)


def test_guidance_is_one_doubled_pass_prepared_once() -> None:
    model, batch = make(guidance_trained=True).eval(), {"told": torch.tensor([3, 4])}
    options = {"sampler": Ddim(), "grid": ddim_grid(model.schedule, 5), "size": (8, 8), "index": torch.arange(2)}
    model.sample(batch, guidance=Guidance(1), **options)
    assert model.backbone.batches == [2] * 5
    model.backbone.batches.clear()
    model.sample(batch, guidance=Guidance(3), **options)
    assert model.backbone.batches == [4] * 5
    assert model.backbone.prepared == 2


def test_guidance_formula() -> None:
    model = make(guidance_trained=True).eval()
    batch = {"told": torch.tensor([3, 4]), "position": torch.arange(2)}
    x, level = torch.randn(2, 3, 4, 4), Level(0.6, 0.8, 500.0)
    given, null = model.conditioning(batch), model.null(batch)
    clean = [model.denoiser(told)(x, level) for told in (given, null)]
    for scale in (0.0, 0.5, 3.0):
        guided = model.denoiser(given, null, Guidance(scale))(x, level)
        torch.testing.assert_close(guided, clean[1] + scale * (clean[0] - clean[1]), atol=1e-5, rtol=1e-5)


def test_guidance_that_the_model_cannot_know() -> None:
    batch = {"told": torch.tensor([3, 4])}

    def sample(model: LatentDiffusion, guidance_scale: float, batch: dict[str, Any] = batch) -> Tensor:
        grid = ddim_grid(model.schedule, 2)
        return model.eval().sample(
            batch, sampler=Ddim(), grid=grid, size=(8, 8), index=torch.arange(2), guidance=Guidance(guidance_scale)
        )

    with pytest.raises(InputError, match="guidance_scale=3 needs a model trained with dropped conditions"):
        sample(make(guidance_trained=False), 3)
    with pytest.raises(InputError, match="guidance_scale=3 needs conditions"):
        sample(make({}, guidance_trained=True), 3, {})
    with pytest.raises(InputError, match="guidance_scale=nan is no number"):
        sample(make(guidance_trained=True), float("nan"))
    with pytest.warns(UserWarning, match="nothing is known about dropped conditions"):
        sample(make(guidance_trained=None), 3)
    assert sample(make(guidance_trained=False), 1).shape == (2, 3, 8, 8)
    assert sample(make({}), 1, {}).shape == (2, 3, 8, 8)


def test_other_sizes_and_sizes_that_do_not_fit() -> None:
    model = make().eval()
    options = {"sampler": Ddim(), "grid": ddim_grid(model.schedule, 2), "index": torch.arange(1)}
    assert model.sample({"told": torch.ones(1)}, size=(6, 12), **options).shape == (1, 3, 6, 12)
    with pytest.raises(InputError, match=r"size=7x12 \(height x width\) is not a multiple of 2.*nearest is 8x12"):
        model.sample({"told": torch.ones(1)}, size=(7, 12), **options)


def test_noise_prediction_says_nothing_without_signal() -> None:
    with pytest.raises(InputError, match="alpha = 0"):
        EpsPrediction().clean(torch.zeros(1), torch.zeros(1), Level(0.0, 1.0, 999.0))
