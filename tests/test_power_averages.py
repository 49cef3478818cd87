"""Averages by a power of time against the official EDM2 code, and averages that are made afterwards."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldmlab.averaging import AveragedWeights, PowerAverage, coefficients, exponents, reconstruct, write_snapshot
from ldmlab.errors import InputError

RECORDED = load_file(Path(__file__).parent / "assets/reference/modern/edm2_ema.safetensors")  # float64
ROWS = (1, 2, 10, 50, 100, 150, 200)  # updates of the recorded averages


def test_exponents_and_coefficients_are_the_official_ones() -> None:
    """In float64; a solver of linear equations may differ in the last digits."""
    assert np.allclose(exponents(RECORDED["std_to_exp.std"].numpy()), RECORDED["std_to_exp.exp"].numpy(), rtol=1e-12)
    times, lengths = (RECORDED[f"posthoc.in_{part}"].numpy() for part in ("ofs", "std"))
    goals = zip(*(RECORDED[f"posthoc.out_{part}"].tolist() for part in ("ofs", "std")), strict=True)
    for column, (time, length) in enumerate(goals):
        ours, _ = coefficients(times, lengths, time, length)
        assert np.abs(ours - RECORDED["posthoc.coefficients"][:, column].numpy()).max() < 1e-7
        made = ours @ RECORDED["posthoc.snapshots"].numpy()
        assert np.abs(made - RECORDED["posthoc.reconstructed"][column].numpy()).max() < 1e-7


@pytest.mark.parametrize("length", [0.05, 0.1, 0.15])
def test_tracked_averages_are_the_official_ones(length: float) -> None:
    net = nn.Linear(6, 1, bias=False).double()
    assert torch.allclose(tracked(net, PowerAverage(net, length)), RECORDED[f"power.{length:g}"], atol=1e-7)


@pytest.mark.parametrize(("halflife", "ratio"), [(20, None), (50, 0.09), (float("inf"), 0.05)])
def test_averages_of_a_half_life_are_the_official_ones(halflife: float, ratio: float | None) -> None:
    """Half-lives in updates of 100 images, which the record counts in millions."""
    net = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        net.weight.zero_()
    average = AveragedWeights(net, 0.5 ** (1 / halflife), ratio or 0.0)
    expected = RECORDED[f"traditional.halflife={halflife * 1e-4:g}.ramp={ratio}"]
    assert torch.allclose(tracked(net, average), expected, atol=1e-7)


def tracked(net: nn.Linear, average: AveragedWeights) -> torch.Tensor:
    """The recorded run: weight k is sin(0.05 i k) + 0.01 i after update i."""
    k, rows = torch.arange(1, 7, dtype=torch.float64), []
    for i in range(1, 201):
        with torch.no_grad():
            net.weight.copy_((0.05 * i * k).sin() + 0.01 * i)
        average.update()
        if i in ROWS:
            rows.append(average.weights()["weight"][0].clone())
    return torch.stack(rows)


def walked(folder: Path, count: int, updates: int = 2000) -> dict[float, torch.Tensor]:
    """A random walk of 400 weights with `count` snapshots of two averages; those of other lengths, tracked."""
    torch.manual_seed(0)
    net = nn.Linear(400, 1, bias=False)
    tracked = {length: PowerAverage(net, length) for length in (0.05, 0.1, 0.075, 0.15, 0.2)}
    for step in range(1, updates + 1):
        with torch.no_grad():
            net.weight.add_(0.01 * torch.randn_like(net.weight))
        for length, average in tracked.items():
            average.update()
            if step % (updates // count) == 0 and length in (0.05, 0.1):
                write_snapshot(folder, step, length, "denoiser", average.weights(), True)
    return {length: average.weights()["weight"] for length, average in tracked.items()}


def test_forty_snapshots_make_any_length(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    for length, tracked in walked(tmp_path, 40).items():
        made = reconstruct(tmp_path, length, 2000)
        difference = (made.parts["denoiser"]["weight"] - tracked).norm() / tracked.norm()
        assert float(difference) < 1e-3, length
        assert made.step == 2000
        assert made.error < 0.005
    assert not recwarn.list


def test_too_few_snapshots_are_said_and_none_refused(tmp_path: Path) -> None:
    walked(tmp_path, 4, updates=200)
    with pytest.warns(
        UserWarning, match=r"weights=0\.2: the average made from the 8 snapshots up to step 200 has an error of 2\d%"
    ):
        assert reconstruct(tmp_path, 0.2, 10_000).error > 0.2
    with pytest.warns(UserWarning, match=r"the 4 snapshots up to step 100 "):
        assert reconstruct(tmp_path, 0.2, 149).step == 100
    with pytest.raises(InputError, match=r"has no snapshots of averages up to step 40; train with callbacks=power"):
        reconstruct(tmp_path, 0.1, 40)
    with pytest.raises(InputError, match=r"weights=0\.5 is not the length of an average"):
        reconstruct(tmp_path, 0.5, 200)
    (tmp_path / "averages/step_00000050_length_0.050.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"step_00000050_length_0\.050\.safetensors is damaged"):
        reconstruct(tmp_path, 0.1, 200)


@pytest.mark.parametrize("fault", ["shape", "nan", "pipe"])
def test_a_snapshot_that_does_not_fit_is_named(tmp_path: Path, fault: str) -> None:
    for step, length in ((10, 0.05), (10, 0.1), (20, 0.05), (20, 0.1)):
        odd = (step, length) == (20, 0.1)
        weight = torch.ones(1 if odd and fault == "shape" else 3) * (float("nan") if odd and fault == "nan" else 1)
        write_snapshot(tmp_path, step, length, "denoiser", {"weight": weight}, here=True)
    if fault == "pipe":
        (tmp_path / "averages/step_00000020_length_0.100.safetensors").unlink()
        os.mkfifo(tmp_path / "averages/step_00000020_length_0.100.safetensors")
    reason = {"shape": "has another shape", "nan": "values that are no numbers", "pipe": "not a regular file"}[fault]
    with pytest.raises(InputError, match=rf"step_00000020_length_0\.100\.safetensors.*{reason}"):
        reconstruct(tmp_path, 0.08, 20)
