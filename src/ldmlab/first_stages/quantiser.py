"""What every quantiser gives, and the one of the paper: vectors to the nearest vector of a learned codebook.

Its codes follow the gradient, or are running means of the vectors that chose them (van den Oord et al.,
"Neural Discrete Representation Learning", NeurIPS 2017, appendix A.1).

Penalties by entropies of codes, in nats, make a vector sure of its code and use all codes alike: Jansen et al.,
"Coincidence, Categorization, and Consolidation", ICASSP 2020; as in MAGVIT-2 (arXiv 2310.05737, eq. 6). A mean over
the batch is taken over the micro-batches of all processes, so that processes give the gradient of one.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.distributed import joined, mean_, sum_, world_size
from ldmlab.errors import InputError
from ldmlab.nn.numerics import full_precision


def softmax_entropies(logits: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Mean entropy of softmax(logits), and the entropy of the mean of softmax(logits); logits (N, K)."""
    shares = logits.softmax(dim=1)
    sample = -(shares * logits.log_softmax(dim=1)).sum(dim=1).mean()
    return sample, _entropy(shares.mean(dim=0), epsilon)


def bit_entropies(logits: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The same over all 2^g codes of g independent bits, log-odds (N, G, g); entropies of the G groups add up.

    Exact without the (N, 2^g) shares: a vector's entropy is the sum of its bits', and the mean share of a code is that
    of products of two halves, one matrix product of (2^(g / 2), N) and (N, 2^(g / 2)).
    """
    size = logits.abs()
    sample = (F.softplus(-size) + size * torch.sigmoid(-size)).sum(dim=(1, 2)).mean()
    low, high = logits.tensor_split([logits.shape[2] // 2], dim=2)
    mean = torch.einsum("nga,ngb->gab", _products(high), _products(low)) / len(logits)
    return sample, _entropy(mean, epsilon)


def _products(logits: Tensor) -> Tensor:
    """Share of every combination of bits: (N, G, k) => (N, G, 2^k)."""
    places = torch.arange(logits.shape[2], device=logits.device)
    bits = (torch.arange(2 ** len(places), device=logits.device) >> places[:, None] & 1).float()  # (k, 2^k)
    return torch.exp(F.logsigmoid(logits) @ bits + F.logsigmoid(-logits) @ (1 - bits))


def _entropy(shares: Tensor, epsilon: float) -> Tensor:
    """Of the mean shares over processes; the gradient is that of this process's part, as its means will be taken."""
    if joined() and torch.is_grad_enabled():
        shares = shares + (mean_(shares.detach().clone()) - shares).detach()
    return -(shares * torch.log(shares + epsilon)).sum()


MOST_CODES = 2**24  # that can be counted
_DISTANCES_AT_ONCE = 2**25  # bounds the memory of the search to 128 MiB
_USES_DECAY = 0.99  # of the running count of uses where codes follow the gradient
_CANDIDATES = 256  # vectors of an image from which codes may restart


def check_entropies(temperature: float, **weights: float) -> None:
    """InputError for a temperature that is not above 0, or a weight of a penalty below 0."""
    if temperature <= 0 or min(weights.values()) < 0:
        given = ", ".join(f"{name}={value}" for name, value in {"temperature": temperature, **weights}.items())
        raise InputError(f"first_stage.quantiser: {given}; choose a temperature above 0, and weights of 0 or more.")


class Quantised(NamedTuple):
    """Output of a quantiser."""

    latents: Tensor  # (B, C, h, w): vectors of the codes; the gradient passes straight through to the input
    codes: Tensor  # (B, h, w) int64
    penalties: dict[str, Tensor]  # by name: scalar


class Quantiser(nn.Module, ABC):
    """Raw latents (B, C, h, w) to codes (B, h, w) in 0 .. K - 1 and to their vectors (B, C, h, w), float32."""

    exact = True  # stays float32 in every precision of training
    slope = 1.0  # d vectors / d latents, passed straight through
    remedy: ClassVar[str]  # what keeps more codes alive
    codebook_size: int  # K
    width: int  # C

    def bounded(self, vectors: Tensor) -> Tensor:
        """What the encoder gives, (B, C, h, w), float32 => raw latents, where the quantiser takes bounded ones."""
        return vectors

    @abstractmethod
    def codes_of(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) => (B, h, w) int64."""

    @abstractmethod
    def vectors_of(self, codes: Tensor) -> Tensor:
        """(B, h, w) => (B, C, h, w)."""

    @abstractmethod
    def forward(self, latents: Tensor) -> Quantised:
        """(B, C, h, w) => vectors, codes and the penalties of training."""

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors and codes without penalties: what decoding needs."""
        codes = self.codes_of(latents.detach())
        return self.vectors_of(codes) + self.slope * (latents - latents.detach()), codes

    def update(self) -> Tensor | None:
        """Once a training step; (K,) bool, which codes may be new ones, or None."""
        return None


class VectorQuantiser(Quantiser):
    """Nearest codebook vector with a straight-through gradient.

    penalty = encoder_weight mean |sg(e) - z|^2 + codebook_weight mean |e - sg(z)|^2, sg: stop gradient. The released
    models weight the codebook's side by beta = 0.25 and the encoder's by 1 (the reverse of the VQ-VAE paper).
    """

    remedy = "first_stage.restart_below=0.01, fewer codes or a lower learning rate keep more of it alive"

    def __init__(
        self,
        codebook_size: int,  # K
        width: int,  # C
        encoder_weight: float,
        codebook_weight: float,
        *,
        decay: float | None = None,  # of codes that are running means; None: codes follow the gradient
        restart_below: float | None = None,  # share of the average use below which a code restarts; None: never
        cosine: bool = False,  # vectors and codes at unit length
    ) -> None:
        super().__init__()
        for name, value in (("codebook_decay", decay), ("restart_below", restart_below)):
            if value is not None and not 0 < value < 1:
                raise InputError(f"first_stage.{name}={value} must lie between 0 and 1; null switches it off.")
        self.codebook_size, self.width = codebook_size, width
        self.codebook = nn.Embedding(codebook_size, width)
        nn.init.uniform_(self.codebook.weight, -1.0 / codebook_size, 1.0 / codebook_size)
        self.codebook.weight.requires_grad_(decay is None)
        self.encoder_weight, self.codebook_weight = encoder_weight, codebook_weight
        self.decay, self.restart_below, self.cosine = decay, restart_below, cosine
        self.watched = decay is not None or restart_below is not None
        if self.watched:
            self.uses: Tensor
            self.sums: Tensor
            self.updates: Tensor
            self.register_buffer("uses", torch.ones(codebook_size))  # N: running mean of vectors a step and code
            self.register_buffer("sums", self.codebook.weight.detach().clone())  # m: running mean of their sum
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
            self.register_load_state_dict_post_hook(lambda *_: setattr(self, "_number", None))
        self._number: int | None = None  # of updates, for the host; None: to be read
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # of this step's micro-batches: n, sum of z, candidates

    def forward(self, latents: Tensor) -> Quantised:
        """(B, C, h, w) => vectors of the codebook, codes and the penalty `codebook`, in float32."""
        latents = self._shaped(latents.float(), dim=1)
        codes = self.nearest(latents.detach().movedim(1, -1))  # (B, h, w)
        chosen = self.vectors_of(codes)
        penalty = self.encoder_weight * F.mse_loss(latents, chosen.detach())
        if self.decay is None:
            penalty = penalty + self.codebook_weight * F.mse_loss(chosen, latents.detach())
        if self.watched and self.training and torch.is_grad_enabled():
            self._watch(latents.detach(), codes)
        return Quantised(latents + (chosen - latents).detach(), codes, {"codebook": penalty})

    def quantise(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return self(latents)[:2]

    def codes_of(self, latents: Tensor) -> Tensor:
        return self.nearest(self._shaped(latents.float(), dim=1).movedim(1, -1))

    def vectors_of(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self._shaped(self.codebook.weight, dim=1)).movedim(-1, 1)

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Codes of the nearest codebook vectors, (..., C) => (...) int64; the smallest code wins a tie."""
        codebook = self._shaped(self.codebook.weight.float(), dim=1)  # (K, C)
        rows = max(_DISTANCES_AT_ONCE // len(codebook), 1)
        with full_precision(vectors):
            squares = codebook.square().sum(dim=1)  # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 changes nothing
            parts = vectors.reshape(-1, vectors.shape[-1]).float().split(rows)
            codes = [torch.addmm(squares, part, codebook.T, alpha=-2.0).argmin(dim=1) for part in parts]
        return torch.cat(codes).reshape(vectors.shape[:-1])

    def _shaped(self, vectors: Tensor, dim: int) -> Tensor:
        return F.normalize(vectors, dim=dim) if self.cosine else vectors

    # ---- codes that are moved by hand, once a step ----

    def _watch(self, latents: Tensor, codes: Tensor) -> None:
        """Record how often every code was chosen, by which vectors, and some vectors of every image."""
        vectors = latents.flatten(2).transpose(1, 2)  # (B, h w, C)
        codes = codes.flatten()
        uses = torch.zeros_like(self.uses).scatter_add_(0, codes, torch.ones_like(codes, dtype=self.uses.dtype))
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors.flatten(0, 1))
        stride = -(-vectors.shape[1] // _CANDIDATES)
        self._seen.append((uses, sums, vectors[:, ::stride].flatten(0, 1).clone()))

    @torch.no_grad()
    def update(self) -> Tensor | None:
        """Once a step, the same on every process: move codes to their means; (K,) bool, which codes restarted."""
        seen, self._seen = self._seen, []
        if not seen:
            return None
        uses, sums = (sum_(torch.stack(parts).sum(0)) for parts in list(zip(*seen, strict=True))[:2])
        decay = self.decay or _USES_DECAY
        self.uses.lerp_(uses, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        if self.decay is not None:  # where nothing was added, N and m shrank alike and e = m / N is as it was
            means = self.sums / self.uses[:, None]
            self.codebook.weight.copy_(torch.where(uses[:, None] > 0, means, self.codebook.weight))
        self._number = int(self.updates) + 1 if self._number is None else self._number + 1
        self.updates += 1
        if self.restart_below is None:
            return None
        return self._restart(torch.cat([candidates for _, _, candidates in seen]), self.restart_below, self._number)

    def _restart(self, candidates: Tensor, below: float, seed: int) -> Tensor:
        """Replace rarely used codes by random vectors of the step's images, without waiting to know whether any is."""
        average = self.uses.mean()
        rare = self.uses < below * average  # (K,)
        if joined():
            parts = [torch.empty_like(candidates) for _ in range(world_size())]
            dist.all_gather(parts, candidates)
            candidates = torch.cat(parts)
        generator = torch.Generator(candidates.device).manual_seed(seed)
        places = torch.randint(len(candidates), rare.shape, generator=generator, device=candidates.device)
        fresh = candidates[places[rare.cumsum(0) - 1]]  # the first places, in the order of the codes
        self.codebook.weight.copy_(torch.where(rare[:, None], fresh, self.codebook.weight))
        self.sums.copy_(torch.where(rare[:, None], average * fresh, self.sums))
        self.uses.copy_(torch.where(rare, average, self.uses))
        return rare
