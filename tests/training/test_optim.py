"""Learning rates at known steps, and the optimizer that is asked for."""

import math

import pytest
import torch
from torch import nn

from ldmlab.errors import InputError
from ldmlab.training.optim import AdamW, Constant, Cosine, InverseSqrt, Linear, WarmupStableDecay, restore_optimizer

TABLE = [
    (Constant(), {0: 1.0, 50: 1.0, 100: 1.0}),
    (Constant(warmup_steps=9), {0: 0.1, 4: 0.5, 9: 1.0, 100: 1.0}),
    (Linear(max_steps=100), {0: 1.0, 25: 0.75, 100: 0.0, 120: 0.0}),
    (Linear(max_steps=110, warmup_steps=10, final=0.5), {10: 1.0, 60: 0.75, 110: 0.5}),
    (InverseSqrt(steady_steps=50, warmup_steps=9), {0: 0.1, 9: 1.0, 50: 1.0, 200: 0.5}),
    (WarmupStableDecay(max_steps=110, warmup_steps=10, final=0.1), {0: 1 / 11, 90: 1.0, 100: 0.55, 110: 0.1}),
    (Cosine(max_steps=100), {0: 1.0, 50: 0.5, 100: 0.0}),
    (Cosine(max_steps=110, warmup_steps=10, final=0.2), {0: 1 / 11, 10: 1.0, 60: 0.6, 110: 0.2}),
]


@pytest.mark.parametrize(("schedule", "factors"), TABLE)
def test_rates_at_known_steps(schedule: Constant, factors: dict[int, float]) -> None:
    assert {step: schedule(step) for step in factors} == pytest.approx(factors)


def test_the_official_scaling_is_an_explicit_choice() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    assert AdamW(4.5e-6, global_batch=48)([weight]).param_groups[0]["lr"] == 4.5e-6
    scaled = AdamW(4.5e-6, lr_scaling="official", global_batch=48)
    assert scaled([weight]).param_groups[0]["lr"] == pytest.approx(4.5e-6 * 48)
    assert str(scaled) == "AdamW, learning rate 0.000216 (4.5e-06 x 48 images a step)"
    with pytest.raises(InputError, match="lr_scaling=linear is unknown"):
        AdamW(1e-4, lr_scaling="linear")
    with pytest.raises(InputError, match="learning_rate=-1"):
        AdamW(-1)


def test_gains_and_biases_may_be_left_undecayed() -> None:
    matrix, gain = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    decays = [
        (len(g["params"]), g["weight_decay"]) for g in AdamW(1e-4, decay_vectors=False)([matrix, gain]).param_groups
    ]
    assert decays == [(1, 0.01), (1, 0.0)]
    assert len(AdamW(1e-4)([matrix, gain]).param_groups) == 1


def test_states_of_another_memory_layout_move_the_same_weights() -> None:
    """A checkpoint of a GPU, channels-last, goes on on a CPU: a fused update pairs elements by place."""
    moved: dict[torch.memory_format, torch.Tensor] = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        saved = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=layout)
        before = AdamW(0.1)(list(saved.parameters()))
        saved(torch.ones(1, 3, 5, 6)).square().mean().backward()
        before.step()
        here = nn.Conv2d(3, 4, 3, bias=False)
        here.load_state_dict(saved.state_dict())
        optimizer = AdamW(0.1)(list(here.parameters()))
        restore_optimizer(optimizer, before.state_dict(), "main")
        assert optimizer.state[here.weight]["exp_avg"].is_contiguous()
        here(torch.ones(1, 3, 5, 6)).square().mean().backward()
        optimizer.step()
        moved[layout] = here.weight.detach()
    torch.testing.assert_close(*moved.values(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("images", "factor"), [(1e7, 1.0), (1e8, 1.0), (1e9, 0.3786291061183754)])
def test_the_inverse_root_is_edm2s(images: float, factor: float) -> None:
    """Recorded from its learning_rate_schedule: 2,048 images a step, steady for 70,000 steps, after the rise."""
    schedule = InverseSqrt(steady_steps=70_000)
    below, above = (schedule(int(images / 2048) + more) for more in (0, 1))  # the official time is not a whole step
    assert above <= factor <= below
    assert below - above < 1e-6


def test_schedules_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match=r"lr_schedule\.decay=0\.0 must be above 0"):
        WarmupStableDecay(max_steps=10, decay=0.0)
    with pytest.raises(InputError, match=r"lr_schedule\.steady_steps=0 must be at least 1"):
        InverseSqrt(steady_steps=0)


def test_the_rise_differs_from_that_of_edm2_by_one_step_at_most() -> None:
    """learning_rate_schedule of NVlabs/edm2, by its number of images; the same after the rise."""
    batch, warmup, steady = 2048, 4882, 70_000
    schedule = InverseSqrt(steady_steps=steady, warmup_steps=warmup)
    for step in (0, 1, 2441, 4881, 4882, 4883, 69_999, 70_000, 300_000):
        images = step * batch
        rise = min(images / (warmup * batch), 1.0)
        official = rise / math.sqrt(max(images / (steady * batch), 1.0))
        assert 0 <= schedule(step) - official <= (0.00021 if step < warmup else 1e-15)
    assert schedule(0) > 0
