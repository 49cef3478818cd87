"""Contracts of the parts: the interface of a class from outside, with the values that parts hand to each other.

A part is any class with the attributes and methods of its contract below; it inherits from nothing of ldmlab.
`part_checks.py` lists the contract of each configuration group and holds what was built to it.
Shapes: B batch, C latent channels, h w latent height and width, H W image height and width, L tokens, D width.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn, optim

from ldmlab.values import (
    AfterStep,
    Conditioning,
    Denoise,
    Encode,
    LatentSpec,
    Level,
    Noise,
    Posterior,
    Prepared,
    Reconstruction,
    Solver,
)


class FirstStage(Protocol):
    """Images to raw latents and back; a `torch.nn.Module`.

    Optional: `uses_noise = False` where `reconstruct` draws no latents; its noise is then an empty tensor.
    For regularisers: `reconstruct(images, noise, change)`, change being None or applied to the raw latents; for
    alignment with an encoder: `latents` of the Reconstruction, and `encoder_last_layer`, the weight of its last
    convolution.
    """

    downsampling: int
    latent_channels: int

    def encode(self, images: Tensor) -> Posterior: ...  # (B, 3, H, W) in [-1, 1]
    def decode(self, raw_latents: Tensor) -> Tensor: ...  # => (B, 3, H, W) in [-1, 1]; a quantiser comes first
    def reconstruct(self, images: Tensor, noise: Tensor) -> Reconstruction: ...  # noise: (B, C, h, w)
    @property
    def last_layer(self) -> Tensor: ...  # weight of the last convolution, for the adversary's adaptive weight


class Backbone(Protocol):
    """The denoising network; a `torch.nn.Module`.

    Its constructor receives, where it has arguments of these names: `in_channels` (latent and spatial conditioning),
    `out_channels`, `context_width` (D of tokens, or None), `vector_width` (D of the vector, or None), `numbers` (how
    many the slot of that name has, which models of few steps need).
    Optional: `size_step`, an int; latent heights and widths must be multiples of it (a patch size, a product of
    strides), and other sizes are refused in one sentence. Without it every size is passed on.
    `aligned(block)`, the module whose output an encoder's features can be compared with, (B, D, h, w) or tokens
    (B, .., D) that end with the patches, and D; block: an int from 1, or None for its own choice.
    """

    accepts: frozenset[str]  # slots of Conditioning

    def prepare(self, conditioning: Conditioning) -> Prepared: ...  # once per sample
    # x: (B, in_channels, h, w); t: (B,) float32, the path's time: 0 .. steps - 1 of a discrete schedule, with a
    # fraction between two of them; 0 .. 1000 of a flow unless its yaml says otherwise => (B, out_channels, h, w)
    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning | Prepared) -> Tensor: ...


class Conditioner(Protocol):
    """Batch fields to one slot of the conditioning; a `torch.nn.Module`.

    Its constructor receives `downsampling` (the first stage's factor) where it has an argument of this name.
    """

    reads: frozenset[str]  # batch fields
    slot: str  # tokens | spatial | vector
    drop: float  # in [0, 1): rate at which training replaces it by `null`, for classifier-free guidance

    def width(self, latent: LatentSpec) -> int: ...  # D of tokens and vectors, channels of spatial
    def __call__(self, batch: dict[str, Any], encode: Encode) -> Tensor: ...
    # the value without this condition, of the same shape; it may hold learned parameters
    def null(self, batch: dict[str, Any], encode: Encode) -> Tensor: ...


class Schedule(Protocol):
    """Noise levels: either discrete ones, with `steps` and `levels`, or all of `Path`.

    Discrete: an int `steps` (T), and times t (B,) int64 in 0 .. T - 1, 0 the least noisy; a backbone's t is the same.
    `betas` (T,) float64 is needed only by `ldmlab export --format compvis` and diffusers' formats.
    """

    # alpha and sigma, float32 (B, 1, 1, 1), of times t (B,); sampling uses these levels too
    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]: ...


class Path(Protocol):
    """Noise levels over times, discrete or continuous; a time is what the network receives."""

    solver: Solver

    def levels(self, times: Tensor) -> tuple[Tensor, Tensor]: ...  # (B,) => alpha, sigma, float32 (B, 1, 1, 1)
    def rates(self, times: Tensor) -> tuple[Tensor, Tensor]: ...  # their derivatives by the position, likewise
    def level(self, time: float) -> Level: ...  # also between discrete ones
    def level_at(self, ratio: float) -> Level: ...  # of a sigma / alpha, also between discrete ones
    def quantile(self, u: Tensor) -> Tensor: ...  # uniform numbers (B,) => times (B,); a larger one is noisier
    def time(self, s: Tensor) -> Tensor: ...  # the inverse of `position`
    def position(self, times: Tensor) -> Tensor: ...  # times => 0, the clean end, to 1, the noise end
    def time_of(self, ratio: Tensor) -> Tensor: ...  # sigma / alpha (B,) => times (B,)
    def grid(self, steps: int, spacing: str) -> list[Level]: ...  # from the noise end; `auto`: the solver's spacing
    def with_shift(self, shift: float) -> "Path": ...  # with another shift of its times
    def at_size(self, values: int) -> "Path": ...  # for latents of that many values, where the times depend on it


class Noised(NamedTuple):
    """A training batch at its noise levels."""

    clean: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    x: Tensor  # alpha clean + sigma noise
    times: Tensor  # (B,)
    alpha: Tensor  # (B, 1, 1, 1)
    sigma: Tensor
    path: Path
    prediction: "Prediction"
    output: Tensor  # of the network, (B, C or 2 C, h, w) float32


class Prediction(Protocol):
    """Prediction type: training target, and network output => estimate of the clean latent.

    Optional: `outputs = 2`, channels out per channel of the latent, of which the first half is compared with the
    target; `scaled(x, alpha, sigma)`, the network's input; `compared(output, alpha, sigma)`, what the target is
    compared with; `uses_rates = True`, then `target` and `clean` take the path's `rates` as a last argument;
    `clean_slope(alpha, sigma)`, d clean / d output, which weightings need.
    """

    def target(self, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor: ...  # alpha: (B, 1, 1, 1)
    def clean(self, x: Tensor, output: Tensor, level: Level) -> Tensor: ...  # float64


class TimeSampling(Protocol):
    """Distribution of the training times; a time depends only on the random number and the position of its image."""

    # u (B,) uniform in (0, 1), position (B,) int64 of the image in training => times (B,)
    def __call__(self, u: Tensor, position: Tensor, path: Path) -> Tensor: ...


class Weighting(Protocol):
    """Factor of an image's loss by its noise level, as if the squared error were that of the clean estimate.

    Optional: `finished(loss, times)`, (B,) => (B,), for weights that are learned; `of_flows = True` where it needs
    `rates`, which discrete schedules lack.
    """

    def __call__(self, alpha: Tensor, sigma: Tensor, rates: Callable[[], tuple[Tensor, Tensor]]) -> Tensor: ...


class DiffusionLoss(Protocol):
    """Loss of each image (B,); factor: (B,), of the weighting, or None.

    Optional: `learns_variance = True` of a loss for prediction=LearnedVariance.
    """

    def __call__(self, output: Tensor, target: Tensor, factor: Tensor | None, at: Noised) -> Tensor: ...


class Sampler(Protocol):
    """From the first, noisiest level of a grid to its last."""

    def __call__(
        self, denoise: Denoise, x: Tensor, grid: list[Level], *, noise: Noise, after_step: AfterStep | None = None
    ) -> Tensor: ...


class NamedSampler(Sampler, Protocol):
    """A sampler of the group `sampler`, with the grid that it is used with unless the command line names another.

    Optional: `one_image = True` where its steps depend on all of a batch: images are then sampled one by one.
    """

    spacing: str  # of diffusion/respacing.py (SPACINGS), or auto, the path's
    steps: int


class Guider(Protocol):
    """Wraps the denoiser of one batch, to guide it beyond the classifier-free scale."""

    @property
    def reads(self) -> frozenset[str]: ...  # batch fields that it needs in addition to the model's own
    def __call__(self, denoise: Denoise, batch: Mapping[str, Any]) -> Denoise: ...
    def as_text(self) -> dict[str, Any]: ...  # plain values for records


class Task(Protocol):
    """Conditioning inputs and target derived from an image."""

    adds: ClassVar[frozenset[str]]  # batch fields it derives

    @property
    def needs(self) -> frozenset[str]: ...  # stored parts: image (as stored, so latents cannot serve) | mask | ...
    @property
    def held_out(self) -> "Task": ...  # the same for images that are compared
    @property
    def keeps(self) -> Callable[[Mapping[str, Any]], bool] | None: ...  # by KEY.json; None: every image is used
    def give(self, sample: dict[str, Any], random: Any) -> dict[str, Any]: ...  # per image, in loader workers
    def finish(self, images: Tensor, batch: dict[str, Any]) -> Tensor: ...  # after decoding


class AutoencoderLoss(Protocol):
    """Loss of a first stage (stage=autoencoder); a `torch.nn.Module`.

    Its parameters outside `adversary` are trained with the first stage. Optional: `lpips`, the network by which
    validation measures reconstructions; `l1` among the scalars, watched for a rise once the adversary has joined.
    """

    adversary: Any  # None, or ldmlab.losses.adversary.Adversary

    # total of the autoencoder after `step` updates, and scalars to log
    def autoencoder(
        self, images: Tensor, given: Reconstruction, last_layer: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]: ...
    def discriminator(self, images: Tensor, reconstructed: Tensor) -> tuple[Tensor, dict[str, Tensor]]: ...


class OptimizerFactory(Protocol):
    """Parameters => optimizer; the learning rate of its groups is the rate used (times the lr schedule's factor).

    A class of torch.optim serves with `_partial_: true`. `global_batch` (images a step) is handed over where taken.
    """

    def __call__(self, parameters: list[nn.Parameter]) -> optim.Optimizer: ...


class LrSchedule(Protocol):
    """Factor of the learning rate for the update that follows `step` updates.

    `max_steps` (of the run) is handed to the constructor where it has an argument of this name.
    """

    def __call__(self, step: int) -> float: ...


class Data(Protocol):
    """Image or latent shards of a training and a validation set (conf/data)."""

    def manifest(self, split: str) -> Any: ...
    def train_loader(self, micro_batch: int, accumulate: int, world: int, rank: int, position: int) -> Any: ...
    def eval_loader(self, split: str, batch_size: int) -> Any: ...


class PatchEncoder(Protocol):
    """Images to the features of their patches by a frozen network; a `torch.nn.Module`."""

    name: str  # of the network and its version, for records
    weights_hash: str
    width: int  # D

    # (B, 3, H, W) in [-1, 1], any square size => (B, D, h', w') float32, class tokens left out
    def __call__(self, images: Tensor) -> Tensor: ...


class FeatureExtractor(Protocol):
    """Images => features that metrics compare."""

    name: str  # of the network and its version, for records
    weights_hash: str
    width: int  # D
    gives: frozenset[str]  # of features | logits | spatial | clip | text

    # uint8 (B, 3, H, W) => features (B, D) and the rest but text, by name
    def __call__(self, images: Tensor) -> dict[str, Tensor]: ...


class Metric(Protocol):
    """A `torchmetrics.Metric`; `compute` returns values by name, NAME_std being the spread of NAME.

    Optional class attributes for reports: `higher_is_better`, `title`, `meaning`. `width` (of the features) is handed
    to the constructor where it has an argument of this name.
    """

    def update(self, features: Any, real: bool) -> None: ...
    def compute(self) -> dict[str, Tensor]: ...
    def reset(self) -> None: ...
