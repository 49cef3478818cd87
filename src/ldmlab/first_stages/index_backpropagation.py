"""A learned codebook of which every vector gets a gradient through the probabilities of the codes.

Shi et al., "Scalable Image Tokenization with Index Backpropagation Quantization", ICCV 2025, arXiv 2412.02692.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.errors import InputError
from ldmlab.first_stages.quantiser import MOST_CODES, Quantised, Quantiser, check_entropies, softmax_entropies
from ldmlab.nn.numerics import full_precision

_LOGITS_AT_ONCE = 2**25  # bounds the memory of decoding to 128 MiB
_EPSILON = 1e-5  # added to the shares of codes before their logarithm, as released


class IBQ(Quantiser):
    """The code of the largest z.e_k, whose vector is onehot E with the gradient of softmax(z.e) E.

    Penalties: `codebook` = mean |q - z|^2 + mean |sg(e) - z|^2 + w mean |e - sg(z)|^2, q the vector with its gradient;
    `entropy` = a mean H(p) - b H(mean p), p = softmax(z.e / T). Training holds (B h w, K) numbers several times.
    A vector e_k may be nearer to a longer e_j: `quantise` of it then chooses j.
    """

    idle_without = "temperature: sample_weight or batch_weight"
    remedy = "a larger loss.penalty_weights.entropy, fewer codes or a lower learning rate keep more of it alive"

    def __init__(
        self,
        codebook_size: int,  # K
        width: int,  # C, channels of a latent and of a codebook vector; 256 as released
        codebook_weight: float = 0.25,  # w, of the penalty that moves the codebook to the encoder
        temperature: float = 0.01,  # T, of the entropies
        sample_weight: float = 1.0,  # a, of each vector's entropy, which makes it sure of its code
        batch_weight: float = 1.0,  # b, of the mean's entropy, which uses all codes alike
    ) -> None:
        super().__init__()
        if not 2 <= codebook_size <= MOST_CODES or width < 1:
            raise InputError(
                f"first_stage.quantiser: codebook_size={codebook_size}, width={width}; choose 2 to {MOST_CODES} codes "
                "of 1 channel or more."
            )
        weights = {"sample_weight": sample_weight, "batch_weight": batch_weight, "codebook_weight": codebook_weight}
        check_entropies(temperature, **weights)
        self.codebook_size, self.width, self.codebook_weight = codebook_size, width, codebook_weight
        self.temperature, self.sample_weight, self.batch_weight = temperature, sample_weight, batch_weight
        self.codebook = nn.Embedding(codebook_size, width)

    @torch.no_grad()
    def codes_of(self, latents: Tensor) -> Tensor:
        vectors = latents.float().movedim(1, -1)  # (B, h, w, C)
        parts = vectors.flatten(0, 2).split(max(_LOGITS_AT_ONCE // self.codebook_size, 1))
        with full_precision(latents):
            codes = [(part @ self.codebook.weight.T).argmax(dim=1) for part in parts]
        return torch.cat(codes).reshape(vectors.shape[:-1])

    def vectors_of(self, codes: Tensor) -> Tensor:
        return self.codebook(codes).movedim(-1, 1)

    def forward(self, latents: Tensor) -> Quantised:
        latents = latents.float()
        with full_precision(latents):
            logits = latents.movedim(1, -1).flatten(0, 2) @ self.codebook.weight.T  # (B h w, K)
            soft = logits.softmax(dim=1) @ self.codebook.weight.detach()  # (B h w, C)
            sample, batch = softmax_entropies(logits / self.temperature, _EPSILON)
        codes = logits.argmax(dim=1).reshape(len(latents), *latents.shape[2:])
        chosen = self.vectors_of(codes)
        soft = soft.reshape(len(latents), *latents.shape[2:], self.width).movedim(-1, 1)
        vectors = chosen + (soft - soft.detach())
        codebook = F.mse_loss(vectors, latents) + F.mse_loss(chosen.detach(), latents)
        codebook = codebook + self.codebook_weight * F.mse_loss(chosen, latents.detach())
        entropy = self.sample_weight * sample - self.batch_weight * batch
        return Quantised(vectors, codes, {"codebook": codebook, "entropy": entropy})
