"""Log-likelihoods by the probability flow (Song et al. 2021, eq. 39; Chen et al. 2018), and DDPM's variational bound.

Along d x / d s = u, d log p(x) / d s = -div u, so log p(x_0) = log N(x_1; 0, sigma_1^2) + the integral of div u.
The divergence is estimated by one vector of signs for each image (Hutchinson), which is exact for diagonal Jacobians.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torchdiffeq import odeint

from ldmlab.contracts import Conditioning, Denoise, Level, Noise, Path
from ldmlab.diffusion.consistency_distillation import Consistency
from ldmlab.diffusion.diffusion_loss import log_of_bins
from ldmlab.errors import InputError
from ldmlab.inference.model import LoadedModel
from ldmlab.randomness import normal
from ldmlab.samplers.ode import slope


def log_likelihood(
    denoise: Denoise,
    path: Path,
    clean: Tensor,  # (B, C, h, w)
    signs: Tensor,  # +1 and -1, of clean's shape
    *,
    steps: int | None = None,  # of Euler's method; None: dopri5 by the tolerances
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Nats (B,) and the noise that the flow takes the latents to (B, C, h, w); a path with derivatives only."""

    def change(s: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            velocity = slope(denoise, path, x, s)
            (pulled,) = torch.autograd.grad((velocity * signs).sum(), x)
        return velocity.detach(), (pulled * signs).flatten(1).sum(1)

    first, last = getattr(path, "first", 0.0), getattr(path, "last", 1.0)
    count = 2 if steps is None else steps + 1
    places = torch.linspace(first, last, count, dtype=torch.float64, device=clean.device)
    start = clean, torch.zeros(len(clean), dtype=clean.dtype, device=clean.device)
    how = {"method": "dopri5", "rtol": rtol, "atol": atol} if steps is None else {"method": "euler"}
    noise, gained = (part[-1] for part in odeint(change, start, places, **how))
    end = path.level(float(path.time(torch.tensor(last, dtype=torch.float64))))
    spread = end.sigma if end.alpha == 1 else 1.0  # as sampling begins
    flat = noise.flatten(1) / spread
    prior = -0.5 * flat.square().sum(1) - flat.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(spread))
    return prior + gained, noise


def variational_bound(
    denoise: Denoise,
    grid: Sequence[Level],  # from the noisiest to the clean end
    clean: Tensor,  # (B, C, h, w) in -1 .. 1
    noise: Noise,  # of each level
    learned: Sequence[Tensor] | None = None,  # a network's v of its last evaluation, as in `Ddpm.with_variance`
) -> Tensor:
    """Terms of the bound on -log2 p(clean) in bits a dimension, (B, 1 + steps); their sum is the bound.

    The prior's KL, KL(q(x_s | x_t, clean) | p) of each step, and the likelihood of bins of 1/255 at the clean end
    (Ho et al. 2020, eq. 5 and 13; Nichol & Dhariwal 2021, eq. 15); without `learned` the variance is the posterior's.
    """
    top, low = grid[0], 0.0
    terms = [0.5 * ((top.alpha * clean).square() + top.sigma**2 - 1 - 2 * math.log(top.sigma))]
    for number, (here, there) in enumerate(pairwise(grid)):
        estimate = denoise(here.alpha * clean + here.sigma * noise(number), here).to(clean.dtype)
        beta = here.sigma**2 - (here.alpha / there.alpha) ** 2 * there.sigma**2
        if there.sigma > 0:  # at the clean end the variance before it, as theirs would be 0
            low = math.log(beta * there.sigma**2 / here.sigma**2)
        fraction = torch.zeros_like(clean) if learned is None else (learned[-1] + 1) / 2
        log_variance = fraction * math.log(beta) + (1 - fraction) * low
        if there.sigma == 0:
            terms.append(-log_of_bins(clean, estimate, 0.5 * log_variance))
        else:
            gap = (there.alpha * beta / here.sigma**2 * (estimate - clean)).square() * torch.exp(-log_variance)
            terms.append(0.5 * (log_variance - low - 1 + torch.exp(low - log_variance) + gap))
    return torch.stack([term.flatten(1).mean(1) for term in terms], dim=1) / math.log(2)


def bits_per_dimension(
    model: LoadedModel,
    latents: Tensor,  # final ones
    conditioning: Conditioning | None = None,
    *,
    index: Tensor | None = None,  # (B,) int64, the numbers of the images; None: 0, 1, ...
    seed: int = 0,
    **options: float,  # of `log_likelihood`
) -> Tensor:
    """-log2 p(latents) / (C h w), (B,); of the density of final latents, so only models of one latent space compare."""
    if isinstance(model.diffusion, Consistency):
        raise InputError("a consistency model gives the end of a flow, not the flow; take the bits of its teacher.")
    index = torch.arange(len(latents), device=latents.device) if index is None else index
    signs = normal(seed, "signs", index, tuple(latents.shape[1:])).sign().to(latents.dtype)
    denoise = model.diffusion.denoiser(conditioning or Conditioning())
    nats, _ = log_likelihood(denoise, model.diffusion.path, latents, signs, **options)  # type: ignore[arg-type]
    return -nats / (math.log(2) * latents[0].numel())
