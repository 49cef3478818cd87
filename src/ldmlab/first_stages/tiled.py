"""A first stage that works on images of any size in tiles, so that the tile bounds the memory.

separate: every part is encoded or decoded on its own and neighbours are blended where they overlap. No seam, but each
    part has its own group-norm statistics, so tones drift from those of the whole image.
shared: all parts of a group norm use the statistics of the whole image, gathered part by part before they are used.
    The result is that of the full image up to rounding.

A network is then a row of steps (convolution, residual block, attention, resampling). Where the map between two steps
is small it is kept whole; the steps from one kept map to the next make a stage. A stage runs part by part, each part
with a margin as wide as its convolutions reach, so that its inside is what the whole map would give. For every group
norm in it the parts run once up to that norm and add up its mean and variance; then they run once more with all
statistics known. Attention, which is found at small maps only, always sees the whole map: fused, its memory grows with
h w.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.contracts import Posterior, Reconstruction
from ldmlab.errors import InputError, one_of
from ldmlab.first_stages.encoder_decoder import Network, PixelAttention, ResidualBlock, check_image_size
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.first_stages.vq import CodedAutoencoder
from ldmlab.nn.blocks import Grow, Shrink
from ldmlab.nn.tiling import blended, latent_side, windows

Moments = tuple[Tensor, Tensor]  # mean and variance, (B, G) each
Known = dict[nn.GroupNorm, Moments]


@dataclass(frozen=True)
class Step:
    """One piece of a network, from a map to a map."""

    run: Callable[[Tensor], Tensor]
    norms: list[nn.GroupNorm]  # in the order in which they run
    channels: int  # of its output
    reach: int  # pixels of its output that the margin of a part spoils
    grows: Fraction = Fraction(1)  # side of its output / side of its input
    whole: bool = False  # cannot run in parts


def steps_of(network: Network) -> list[Step]:
    """An encoder (images to features) or a decoder (features to images) as a row of steps."""
    pieces = [piece for piece in network.pieces() if not isinstance(piece, nn.Identity)]
    head = Step(partial(Network.head, network), [network.output_norm], network.output.out_channels, reach=1)
    return [*map(_step, pieces), head]


def _step(piece: Any) -> Step:
    run = partial(type(piece).forward, piece)  # not compiled: a graph knows no hooks on its norms
    match piece:
        case ResidualBlock():
            return Step(run, [piece.norm1, piece.norm2], piece.conv2.out_channels, reach=2)
        case PixelAttention():
            return Step(run, [], piece.out.out_channels, reach=0, whole=True)
        case Grow() | Shrink():
            grows = Fraction(2) if isinstance(piece, Grow) else Fraction(1, 2)
            return Step(run, [], piece.conv.out_channels, 1, grows)
    return Step(lambda x: piece(x.to(piece.weight.dtype)), [], piece.out_channels, reach=1)


@torch.no_grad()
def run_in_parts(steps: list[Step], x: Tensor, part: int, kept_bytes: int) -> Tensor:
    """All steps; `part` is the side of a part in pixels of x, `kept_bytes` the largest map kept between two steps."""
    scale = Fraction(1)  # side of x now / side of x at the start
    for stage in _stages(steps, x, kept_bytes):
        x = stage[0].run(x) if stage[0].whole else _run_stage(stage, x, max(int(part * scale), 1))
        scale *= math.prod(step.grows for step in stage)
    return x


def _stages(steps: list[Step], x: Tensor, kept_bytes: int) -> list[list[Step]]:
    """The steps between one kept map and the next; a step that needs the full map forms a stage of its own."""
    stages: list[list[Step]] = [[]]
    pixels = Fraction(x.shape[0] * x.shape[2] * x.shape[3])
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        pixels *= step.grows**2
        stages[-1].append(step)
        small = pixels * step.channels * x.element_size() <= kept_bytes
        if following is not None and (small or step.whole or following.whole):
            stages.append([])
    return stages


@dataclass(frozen=True)
class _Part:
    """Where a part lies, in pixels of the coarsest map of its stage."""

    inside: tuple[slice, slice]  # what it is for
    cut: tuple[slice, slice]  # with its margin


class _Reached(Exception):
    """A part has reached the norm whose statistics are needed, with this map."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


def _run_stage(stage: list[Step], x: Tensor, part: int) -> Tensor:
    """(B, C, h, w) => (B, C', h', w'); parts have `part` pixels of x, less one where the coarsest map needs it."""
    scales = [Fraction(1)]  # side of every map / side of x
    for step in stage:
        scales.append(scales[-1] * step.grows)
    coarsest = min(scales)
    margin = math.ceil(sum(Fraction(s.reach) * coarsest / scale for s, scale in zip(stage, scales[1:], strict=True)))
    size = (int(x.shape[2] * coarsest), int(x.shape[3] * coarsest))
    parts = _parts(size, max(int(part * coarsest), 1), margin)
    fine_in, fine_out = int(1 / coarsest), int(scales[-1] / coarsest)  # pixels of x and of the result per coarsest one

    def run(one: _Part) -> Tensor:
        y = x[:, :, _scaled(one.cut[0], fine_in), _scaled(one.cut[1], fine_in)]
        for step in stage:
            y = step.run(y)
        return y

    if len(parts) == 1:
        return run(parts[0])
    known: Known = {}
    for norm in (norm for step in stage for norm in step.norms):
        known[norm] = _statistics(norm, parts, run, known)
    result: Tensor | None = None
    with _using(known):
        for one in parts:
            y = run(one)
            if result is None:
                result = y.new_empty(*y.shape[:2], size[0] * fine_out, size[1] * fine_out)
            inside = _inside(y, one)
            result[:, :, _scaled(one.inside[0], fine_out), _scaled(one.inside[1], fine_out)] = inside
    assert result is not None
    return result


def _parts(size: tuple[int, int], part: int, margin: int) -> list[_Part]:
    """Parts that tile a map, the last ones smaller, each with its margin as far as the map goes."""
    axes = []
    for side in size:
        count = math.ceil(side / part)
        ends = [side * k // count for k in range(count + 1)]
        insides = [slice(a, b) for a, b in pairwise(ends)]
        axes.append([(s, slice(max(s.start - margin, 0), min(s.stop + margin, side))) for s in insides])
    return [_Part((row, column), (rows, columns)) for row, rows in axes[0] for column, columns in axes[1]]


def _scaled(pixels: slice, factor: int) -> slice:
    return slice(pixels.start * factor, pixels.stop * factor)


def _inside(y: Tensor, one: _Part) -> Tensor:
    """A map of a part without its margin, whatever the map's resolution."""
    factor = y.shape[2] // (one.cut[0].stop - one.cut[0].start)
    rows, columns = (
        slice((inside.start - cut.start) * factor, (inside.stop - cut.start) * factor)
        for inside, cut in zip(one.inside, one.cut, strict=True)
    )
    return y[:, :, rows, columns]


def _statistics(norm: nn.GroupNorm, parts: list[_Part], run: Callable[[_Part], Tensor], known: Known) -> Moments:
    """Mean and variance of each image's groups over the whole map; `known`: of the norms before it."""
    sums: list[Tensor] = []
    count = 0
    for one in parts:
        handle = norm.register_forward_pre_hook(_gather)
        try:
            with _using(known):
                run(one)
        except _Reached as reached:
            groups = _inside(reached.x, one).float().unflatten(1, (norm.num_groups, -1))  # (B, G, C / G, h, w)
            variance, mean = (v.double() for v in torch.var_mean(groups, dim=(2, 3, 4), correction=0))
            pixels = groups[0, 0].numel()
            sums.append(torch.stack([mean, variance + mean.square()]) * pixels)
            count += pixels
        finally:
            handle.remove()
    mean, square = torch.stack(sums).sum(0) / count
    return mean, (square - mean.square()).clamp_min(0)


def _gather(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    raise _Reached(inputs[0])


@contextmanager
def _using(known: Known) -> Iterator[None]:
    """Inside, these norms use the given statistics instead of those of their input."""
    handles = []
    try:
        for norm, (mean, variance) in known.items():
            spread = torch.rsqrt(variance + norm.eps)  # (B, G)
            each = norm.num_channels // norm.num_groups
            scale = spread.repeat_interleave(each, 1) * norm.weight.double()  # (B, C)
            shift = norm.bias.double() - mean.repeat_interleave(each, 1) * scale
            hook = partial(_affine, scale.float()[:, :, None, None], shift.float()[:, :, None, None])
            handles.append(norm.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _affine(scale: Tensor, shift: Tensor, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return torch.addcmul(shift, inputs[0].float(), scale).to(output.dtype)


NORMS = ("shared", "separate")


class TiledFirstStage:
    """A frozen first stage that works in square tiles, with the interface of the one inside."""

    def __init__(
        self,
        first_stage: nn.Module,
        tile: int = 512,  # side of a part, px of the image
        norms: str = "shared",  # shared | separate: group-norm statistics
        kept_mib: int | None = None,  # shared only: larger feature maps of an image are computed again in every pass;
        # None: twice a part's map at the finest level, 256 MiB for the paper's first stages and parts of 512
    ) -> None:
        self.inner: Any = first_stage
        self.downsampling: int = first_stage.downsampling  # type: ignore[assignment]
        self.latent_channels: int = first_stage.latent_channels  # type: ignore[assignment]
        one_of("tile_norms", norms, NORMS)
        if norms == "shared" and not isinstance(first_stage, KLAutoencoder | CodedAutoencoder):
            if any(isinstance(module, nn.GroupNorm) for module in first_stage.modules()):
                kind = type(first_stage).__name__
                raise InputError(f"tile_norms=shared supports KL and VQ first stages, not {kind}; choose separate.")
            norms = "separate"  # there are no statistics to share
        if kept_mib is not None and kept_mib < 1:
            raise InputError(f"kept_mib={kept_mib} keeps nothing between two layers; choose 1 or more.")
        self.tile, self.norms, self.latent_tile = tile, norms, latent_side("tile", tile, self.downsampling, least=2)
        first = getattr(getattr(self.inner, "encoder", None), "input", None)
        pixel_bytes = (
            0 if first is None else int(first.out_channels) * first.weight.element_size()
        )  # at the finest level
        self.kept_bytes = 2 * tile**2 * pixel_bytes if kept_mib is None else kept_mib * 2**20

    def encode(self, images: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] => raw latents (B, C, H / f, W / f), float32."""
        check_image_size(images, self.downsampling)
        if max(images.shape[2:]) <= self.tile:
            return self.inner.encode(images)
        if self.norms == "shared":
            features = run_in_parts(steps_of(self.inner.encoder), images, self.tile, self.kept_bytes * len(images))
            return self.inner.posterior_of(features)
        cut, put = self._windows((images.shape[2] // self.downsampling, images.shape[3] // self.downsampling))
        moments = blended(lambda i: self.inner.encode(put[i].of(images)).moments(), cut)
        return Posterior.from_moments(moments, self.latent_channels)

    def decode(self, raw_latents: Tensor) -> Tensor:
        """(B, C, h, w) => (B, 3, f h, f w), about [-1, 1]."""
        if max(raw_latents.shape[2:]) * self.downsampling <= self.tile:
            return self.inner.decode(raw_latents)
        if self.norms == "shared":
            features = self.inner.features_of(raw_latents)
            kept = self.kept_bytes * len(features)
            return run_in_parts(steps_of(self.inner.decoder), features, self.latent_tile, kept)
        cut, put = self._windows((raw_latents.shape[2], raw_latents.shape[3]))
        return blended(lambda i: self.inner.decode(cut[i].of(raw_latents)), put)

    def _windows(self, size: tuple[int, int]) -> tuple[list[Any], list[Any]]:
        """The same windows of a latent of `size` and of its image; they overlap by a quarter."""
        part = self.latent_tile
        return windows(size, part, part // 4), windows(size, part, part // 4, scale=self.downsampling)

    def reconstruct(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Encode, draw a latent with the given noise (B, C, h, w), decode; no penalties, which only training needs."""
        return Reconstruction(self.decode(self.encode(images).sample(noise)), {})

    @property
    def last_layer(self) -> Tensor:
        """Not available: tiles are for trained first stages."""
        raise InputError("a first stage in parts cannot be trained; train it on crops of one size.")
