"""Quantisers without a codebook: each channel is rounded by itself, and a code numbers the combination.

FSQ: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple", ICLR 2024. iFSQ: Lin et al., arXiv 2601.17124.
LFQ: Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation" (MAGVIT-2), ICLR 2024.
BSQ: Zhao et al., "Image and Video Tokenization with Binary Spherical Quantization", arXiv 2406.07548.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmlab.errors import InputError, one_of
from ldmlab.first_stages.quantiser import MOST_CODES, Quantised, Quantiser, bit_entropies, check_entropies
from ldmlab.nn.numerics import full_precision

_INSIDE = 1e-3  # FSQ: share of the range that rounding never reaches
_LFQ_EPSILON, _BSQ_EPSILON = 1e-5, 1e-8  # added to the shares of codes before their logarithm, as released


class Lattice(Quantiser):
    """Codes sum_c digit_c place_c of the channels' digits 0 .. L_c - 1."""

    levels: Tensor
    places: Tensor

    def __init__(self, levels: Sequence[int], option: str, *, first_lowest: bool = True) -> None:
        """option: the name and value that decide the levels, for messages; first_lowest: place of the first channel."""
        super().__init__()
        self.width, self.codebook_size = len(levels), math.prod(levels)
        if not levels or min(levels) < 2 or self.codebook_size > MOST_CODES:
            raise InputError(
                f"first_stage.quantiser.{option} makes {self.codebook_size} codes; every channel needs 2 levels or "
                f"more, and all together at most {MOST_CODES} (24 bits)."
            )
        order = list(levels) if first_lowest else list(levels)[::-1]
        places = [math.prod(order[:place]) for place in range(len(order))]
        for name, numbers in (("levels", levels), ("places", places if first_lowest else places[::-1])):
            self.register_buffer(name, torch.tensor(list(numbers))[:, None, None], persistent=False)  # (C, 1, 1)

    @abstractmethod
    def digits_of(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) => int64 of the same shape."""

    @abstractmethod
    def points_of(self, digits: Tensor) -> Tensor:
        """The inverse on the lattice, float32."""

    def codes_of(self, latents: Tensor) -> Tensor:
        return (self.digits_of(latents) * self.places).sum(dim=1)

    def vectors_of(self, codes: Tensor) -> Tensor:
        return self.points_of(codes[:, None] // self.places % self.levels)


class FSQ(Lattice):
    """round(b(z)) / (L // 2) per channel of L levels; no penalty.

    tanh, section 3: b(z) = (L - 1) (1 - 0.001) / 2 tanh(z + s) - o, with o = 1/2 and s = tan(o / half range) for an
    even L, else 0. sigmoid, iFSQ: b(z) = (L - 1) / 2 (2 sigmoid(1.6 z) - 1), nearly uniform for a Gaussian z.
    """

    remedy = "fewer levels, first_stage.quantiser.activation=sigmoid or a lower learning rate keep more of it alive"

    def __init__(
        self,
        levels: Sequence[int],  # L of each channel; [8, 5, 5, 5] is near 10 bits, [8, 8, 8, 6, 5] near 14
        activation: str = "tanh",  # tanh | sigmoid, iFSQ's, for odd levels
    ) -> None:
        super().__init__(levels, f"levels={list(levels)}")
        one_of("first_stage.quantiser.activation", activation, ("tanh", "sigmoid"))
        if activation == "sigmoid" and (even := [level for level in levels if level % 2 == 0]):
            raise InputError(
                f"first_stage.quantiser.levels={list(levels)}: activation=sigmoid is symmetric, so {even[0]} levels "
                "would lose one; choose odd numbers, or activation=tanh."
            )
        self.activation = activation

    def bounded(self, vectors: Tensor) -> Tensor:
        if self.activation == "sigmoid":
            return 2 * torch.sigmoid(1.6 * vectors) - 1
        half = (self.levels - 1) * (1 - _INSIDE) / 2
        offset = (1 - self.levels % 2) / 2
        return (torch.tanh(vectors + torch.tan(offset / half)) * half - offset) / (self.levels // 2)

    def digits_of(self, latents: Tensor) -> Tensor:
        rounded = (latents * (self.levels // 2)).round().long() + self.levels // 2
        return rounded.clamp(torch.zeros_like(self.levels), self.levels - 1)

    def points_of(self, digits: Tensor) -> Tensor:
        return digits / (self.levels // 2) - 1

    def forward(self, latents: Tensor) -> Quantised:
        return Quantised(*self.quantise(latents.float()), {})


class _Signs(Lattice):
    """One bit a channel: the sign, 0 being negative."""

    remedy = "a larger loss.penalty_weights.entropy, fewer bits or a lower learning rate keep more of it alive"

    def digits_of(self, latents: Tensor) -> Tensor:
        return (latents > 0).long()

    def points_of(self, digits: Tensor) -> Tensor:
        return self.slope * (2.0 * digits - 1)


class LFQ(_Signs):
    """sign(z); penalties `entropy` = a mean H(p(c | z)) - b H(mean p(c | z)), `commitment` = mean (z - c)^2.

    p(c | z) = softmax over all 2^d codes c of 2 z.c / T.
    """

    idle_without = "temperature: sample_weight or batch_weight"

    def __init__(
        self,
        bits: int,  # d, channels of a latent
        temperature: float = 0.01,  # T
        sample_weight: float = 1.0,  # a, of each vector's entropy, which makes it sure of its code
        batch_weight: float = 1.0,  # b, of the mean's entropy, which uses all codes alike
    ) -> None:
        super().__init__([2] * bits, f"bits={bits}")
        check_entropies(temperature, sample_weight=sample_weight, batch_weight=batch_weight)
        self.temperature, self.sample_weight, self.batch_weight = temperature, sample_weight, batch_weight

    def forward(self, latents: Tensor) -> Quantised:
        latents = latents.float()
        vectors, codes = self.quantise(latents)
        with full_precision(latents):
            logits = latents.movedim(1, -1).reshape(-1, 1, self.width) * (4 / self.temperature)
            sample, batch = bit_entropies(logits, _LFQ_EPSILON)
        entropy = self.sample_weight * sample - self.batch_weight * batch
        return Quantised(vectors, codes, {"entropy": entropy, "commitment": F.mse_loss(latents, vectors.detach())})


class BSQ(_Signs):
    """sign(u) / sqrt(d) for u = z / |z|, with `entropy` and `commitment` = mean of sums over channels of (u - c)^2.

    entropy = T (a mean H(p(c | u)) - b H(mean p(c | u))), p a softmax over codes of 2 u.c / T; H of the mean is the sum
    of those of groups of bits, as if they were independent.
    """

    idle_without = "temperature: sample_weight or batch_weight"

    def __init__(
        self,
        bits: int,  # d, channels of a latent
        group_size: int = 1,  # bits of a group
        temperature: float = 1.0,  # T
        sample_weight: float = 1.0,  # a, of each vector's entropy, which makes it sure of its code
        batch_weight: float = 1.0,  # b, of the mean's entropy, which uses all codes alike
    ) -> None:
        super().__init__([2] * bits, f"bits={bits}", first_lowest=False)
        check_entropies(temperature, sample_weight=sample_weight, batch_weight=batch_weight)
        if group_size < 1 or bits % group_size:
            raise InputError(f"first_stage.quantiser.group_size={group_size} must divide bits={bits}; 1 always does.")
        self.group_size, self.temperature, self.slope = group_size, temperature, 1 / math.sqrt(bits)
        self.sample_weight, self.batch_weight = sample_weight, batch_weight

    def bounded(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=1)

    def forward(self, latents: Tensor) -> Quantised:
        latents = latents.float()
        vectors, codes = self.quantise(latents)
        with full_precision(latents):
            logits = latents.movedim(1, -1).reshape(-1, self.width // self.group_size, self.group_size)
            sample, batch = bit_entropies(logits * (4 * self.slope / self.temperature), _BSQ_EPSILON)
        entropy = self.temperature * (self.sample_weight * sample - self.batch_weight * batch)
        commitment = (latents - vectors.detach()).square().sum(dim=1).mean()
        return Quantised(vectors, codes, {"entropy": entropy, "commitment": commitment})
