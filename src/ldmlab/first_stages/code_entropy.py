"""Entropies of codes, in nats, for penalties that make a vector sure of its code and use all codes alike.

Jansen et al., "Coincidence, Categorization, and Consolidation", ICASSP 2020; as in MAGVIT-2 (arXiv 2310.05737, eq. 6).
A mean over the batch is taken over the micro-batches of all processes, so that processes give the gradient of one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmlab.distributed import joined, mean_


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
