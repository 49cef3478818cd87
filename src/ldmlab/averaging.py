"""Averaged weights: of one decay while training, and power functions, whose length may be chosen afterwards.

The paper's warm-up: decay = min(decay, (1 + n) / (10 + n)), n counting optimizer updates. With `warmup` =
(inv_gamma, power) it is min(decay, 1 - (1 + n / inv_gamma)^-power), as in diffusers' EMAModel; with `warmup` = ratio it
is min(decay, 0.5^(1 / (ratio n))), a half-life of at most ratio n updates, as in EDM's training; ratio 0: no warm-up.

The power-function average (Karras et al. 2024, EDM2, section 3) of exponent g at time t is (g + 1) / t^(g+1) times the
integral of s^g w(s) over s = 0 .. t, w being the weights. Its length is the standard deviation of the profile s^g
relative to t. An average of any length is close to a linear combination of a few, saved at several times.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ldmlab.checkpoints import save_tensors
from ldmlab.disks import open_regular
from ldmlab.errors import InputError
from ldmlab.sharded import by_layout, is_sharded, laid_out


class AveragedWeights:
    """An exponential moving average of a module's trainable parameters, at least float32, besides the raw ones."""

    def __init__(
        self,
        module: nn.Module,
        decay: float,
        warmup: tuple[float, float] | float | None = None,
        start: int = 0,  # updates until which the average is a copy of the live weights; n counts from there
    ) -> None:
        self.decay, self.warmup, self.start = decay, warmup, start
        self.updates = 0
        self._live = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._average = {
            name: p.detach().clone().to(torch.promote_types(p.dtype, torch.float32)) for name, p in self._live.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """One optimizer update of the live weights has been made: average += (1 - decay) (live - average)."""
        self.updates += 1
        decay = self._kept()
        pairs = zip(self._live.values(), self._average.values(), strict=True)
        for part in by_layout(pairs, lambda pair: pair[1]):
            live = [p.detach().to(a.device, a.dtype) for p, a in part]
            torch._foreach_lerp_([a for _, a in part], live, 1 - decay)

    def _kept(self) -> float:
        """The decay at this update."""
        n = self.updates - self.start
        if n <= 0:
            return 0.0
        if self.warmup is None:
            return min(self.decay, (1 + n) / (10 + n))
        if not isinstance(self.warmup, Sequence):
            return min(self.decay, 0.5 ** (1 / (self.warmup * n))) if self.warmup else self.decay
        inv_gamma, power = self.warmup
        return min(self.decay, 1 - (1 + n / inv_gamma) ** -power)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the context the module holds the averaged weights."""
        raw = {name: p.detach().clone() for name, p in self._live.items()}
        self._write(self._average)
        try:
            yield
        finally:
            self._write(raw)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, p in self._live.items():
            p.copy_(values[name])

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights under the names of the live ones."""
        return dict(self._average)

    def state_dict(self) -> dict[str, object]:
        """Averages, the decay and the number of updates, tensors and plain types only."""
        return {"decay": self.decay, "updates": self.updates, "weights": self.weights()}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`; names must match exactly."""
        if state["weights"].keys() != self._average.keys():
            raise ValueError("the averaged weights belong to another network: parameter names differ")
        self.updates = int(state["updates"])
        for name, value in state["weights"].items():
            self._average[name].copy_(laid_out(value, self._average[name]))


FOLDER = "averages"  # in a run folder
_NAME = re.compile(r"step_(\d{8,})_length_(0\.\d{3,})\.safetensors")
_LONGEST = 0.2886  # the exponent would be negative from 1 / sqrt(12) on
ACCEPTED = 0.02  # error of a profile; with 40 snapshots of 0.05 and 0.10 it is below for lengths from 0.05 to 0.20
Numbers = NDArray[Any]  # float64


def checked_length(length: float, name: str) -> float:
    """The length; InputError where it has no exponent."""
    if not 0 < length <= _LONGEST:
        raise InputError(f"{name}={length} is not the length of an average; choose more than 0, at most {_LONGEST}.")
    return float(length)


def exponents(lengths: ArrayLike) -> Numbers:
    """g of each length l: the largest root of l^2 (g + 2)^2 (g + 3) = g + 1 (equation 126)."""
    squares = np.asarray(lengths, dtype=np.float64).flatten() ** -2.0
    return np.array([np.roots([1, 7, 16 - s, 12 - s]).real.max() for s in squares])


def correlations(times_a: Numbers, g_a: Numbers, times_b: Numbers, g_b: Numbers) -> Numbers:
    """Inner product of each profile of a with each of b, (A, B) (equation 151)."""
    t_a, t_b, a, b = times_a[:, None], times_b[None], g_a[:, None], g_b[None]
    power = np.where(t_a < t_b, b, -a)
    return (a + 1) * (b + 1) * (t_a / t_b) ** power / ((a + b + 1) * np.maximum(t_a, t_b))


def coefficients(times: ArrayLike, lengths: ArrayLike, time: float, length: float) -> tuple[Numbers, float]:
    """Weights (A,) of sum 1 whose combination of averages is closest to that of `time` and `length`, and its error.

    Least squares between profiles (algorithm 3). The error is the norm of the difference over that of the profile.
    """
    at, g = np.asarray(times, dtype=np.float64).flatten(), exponents(lengths)
    goal, g_goal = np.array([time], dtype=np.float64), exponents([length])
    own, other = correlations(at, g, at, g), correlations(at, g, goal, g_goal)[:, 0]
    found = np.linalg.solve(own, other)
    found /= found.sum()
    norm = correlations(goal, g_goal, goal, g_goal)[0, 0]
    return found, float(np.sqrt(max(norm - 2 * found @ other + found @ own @ found, 0.0) / norm))


class PowerAverage(AveragedWeights):
    """The average of a length: at update n it becomes live + (1 - 1 / n)^(g+1) (average - live) (equation 127).

    Time is counted in updates, which all have the same number of images.
    """

    def __init__(self, module: nn.Module, length: float) -> None:
        super().__init__(module, 1.0)
        self._exponent = float(exponents([length])[0])

    def _kept(self) -> float:
        return (1 - 1 / self.updates) ** (self._exponent + 1)


class Snapshot(NamedTuple):
    """An average as it was after `step` updates, on disk."""

    path: Path
    step: int
    length: float


def write_snapshot(run: Path, step: int, length: float, part: str, weights: Mapping[str, Tensor], here: bool) -> None:
    """Save an average of a part of the model in a run folder, float32.

    A collective call, since weights may be sharded; `here`: this process writes the file.
    """
    content = {}
    for name, tensor in weights.items():
        full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        if here:
            content[f"{part}.{name}"] = full.detach().float().cpu()
    if here:
        (run / FOLDER).mkdir(exist_ok=True)
        save_tensors(run / FOLDER / f"step_{step:08d}_length_{length:.3f}.safetensors", content)


def snapshots(run: Path) -> list[Snapshot]:
    """Those of a run folder, by step and length."""
    found = ((path, _NAME.fullmatch(path.name)) for path in (run / FOLDER).glob("step_*.safetensors"))
    return sorted((Snapshot(path, int(m[1]), float(m[2])) for path, m in found if m), key=lambda one: one[1:])


class Reconstruction(NamedTuple):
    """An average of any length, from snapshots."""

    parts: dict[str, dict[str, Tensor]]  # float32, by part of the model and name
    step: int  # of the latest snapshot used
    error: float  # of its profile


def reconstruct(run: Path, length: float, step: int) -> Reconstruction:
    """The average of `length` at the latest snapshot up to `step`; InputError where there is none."""
    checked_length(length, "weights")
    used = [one for one in snapshots(run) if one.step <= step]  # a killed run may have later ones
    if not used:
        raise InputError(
            f"weights={length}: {run} has no snapshots of averages up to step {step}; train with "
            "callbacks=power_averages, or take averaged or raw."
        )
    last = used[-1].step
    weights, error = coefficients([one.step for one in used], [one.length for one in used], last, length)
    if error > ACCEPTED:
        warnings.warn(
            f"weights={length}: the average made from the {len(used)} snapshots up to step {last} has an error of "
            f"{error:.0%}; train with more snapshots (callbacks.power_averages.every), or choose a length nearer to "
            "theirs.",
            stacklevel=2,
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _weighted(used, weights).items():
        part, _, own = name.partition(".")
        parts.setdefault(part, {})[own] = tensor
    return Reconstruction(parts, last, error)


def _weighted(used: Sequence[Snapshot], weights: Numbers) -> dict[str, Tensor]:
    """The weighted sum, in float64, one tensor at a time."""
    files = [_opened(one.path) for one in used]
    names = sorted(files[0].keys())
    for one, file in zip(used, files, strict=True):
        if sorted(file.keys()) != names:
            raise InputError(f"{one.path} and {used[0].path} hold different tensors; delete the file of another run.")
    result = {}
    for name in names:
        total = torch.zeros(files[0].get_slice(name).get_shape(), dtype=torch.float64)
        for one, file, weight in zip(used, files, weights, strict=True):
            tensor = file.get_tensor(name).double()
            if tensor.shape != total.shape or not tensor.isfinite().all():
                fault = "values that are no numbers" if tensor.shape == total.shape else "another shape than elsewhere"
                raise InputError(f"{one.path}: {name} has {fault}; copy the file again, or delete it.")
            total += weight * tensor
        result[name] = total.float()
    return result


def _opened(path: Path) -> "safetensors.safe_open":
    try:
        open_regular(path).close()  # the next would wait for a pipe
        return safetensors.safe_open(path, framework="pt", device="cpu")
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); copy it again, or delete it.") from error
