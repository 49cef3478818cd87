"""The loss of a first stage: reconstruction, penalties of its bottleneck, adversary."""

from collections.abc import Mapping

from torch import Tensor, nn

from ldmlab.contracts import Reconstruction
from ldmlab.errors import InputError
from ldmlab.losses.adversary import Adversary
from ldmlab.losses.latent_regularisers import LatentRegularisers
from ldmlab.losses.reconstruction_loss import ReconstructionLoss, Reduction, Spread
from ldmlab.losses.vision_alignment import Encoded, VisionAlignment
from ldmlab.nn.lpips import SMALLEST

Terms = dict[str, Tensor]


class AutoencoderLoss(nn.Module):
    """reconstruction + sum of penalty_weights[p] p + adversary's weight x adaptive weight x (- mean D(y)) + alignment.

    Esser et al., "Taming Transformers", CVPR 2021, eq. 6 and 7; the paper's appendix G. Images (B, 3, H, W)
    in [-1, 1]; losses are scalars. InputError where the weights do not name the penalties of the first stage.
    """

    def __init__(
        self,
        *,
        penalty_weights: Mapping[str, float],  # by the first stage's names: kl | codebook, entropy, commitment
        lpips_weight: float,  # 0: the LPIPS network is not built
        reduction: Reduction,  # sum_per_image (official KL models) | mean (official VQ models)
        logvar: Spread = "fixed",  # scale of the reconstruction error
        adversary: Adversary | None = None,  # None: no discriminator
        regularisers: LatentRegularisers | None = None,  # changes of latents before they are decoded, in training
        alignment: VisionAlignment | None = None,  # of latents with a frozen encoder's features
        lpips: nn.Module | None = None,  # the network, where its weight is not 0
    ) -> None:
        super().__init__()
        self.penalty_weights = dict(penalty_weights)
        self.reconstruction = ReconstructionLoss(
            lpips_weight=lpips_weight, reduction=reduction, logvar=logvar, lpips=lpips
        )
        self.adversary, self.alignment = adversary, alignment
        self.regularisers = regularisers

    @property
    def lpips(self) -> nn.Module | None:
        """The network by which reconstructions are measured in validation too."""
        return self.reconstruction.lpips

    @property
    def smallest_image(self) -> int:
        """Side in pixels below which LPIPS or the discriminator has nothing to compare."""
        critic = getattr(self.adversary and self.adversary.discriminator, "smallest_image", 1)
        return max(critic, SMALLEST if self.lpips is not None else 1)

    def autoencoder(
        self, images: Tensor, given: Reconstruction, last_layer: Tensor, step: int, encoded: Encoded | None = None
    ) -> tuple[Tensor, Terms]:
        """The autoencoder's total loss after `step` updates, and its terms; `encoded`: for alignment."""
        if given.penalties.keys() != self.penalty_weights.keys():
            raise InputError(
                f"loss.penalty_weights={self.penalty_weights} does not name what the first stage gives "
                f"({', '.join(given.penalties) or 'nothing'}); choose the loss of its kind: "
                "loss=kl, vq, fsq, lfq, bsq or ibq, or loss=plain of one without penalties."
            )
        error, terms = self.reconstruction(images, given.images)
        total = sum((self.penalty_weights[name] * value for name, value in given.penalties.items()), error)
        terms |= {"reconstruction": error, **given.penalties}
        if self.alignment is not None and encoded is not None:
            term, factor = self.alignment.weighted(error, given, encoded)
            total = total + factor * term
            terms |= {"alignment": term, "alignment/weight": factor.nan_to_num()}
        weight = self.adversary.weight_at(step) if self.adversary is not None else 0.0
        if self.adversary is not None and weight > 0:
            generator, logit = self.adversary.generator_loss(given.images)
            adaptive = self.adversary.adaptive_weight(error, generator, last_layer)
            total = total + weight * adaptive * generator
            # NaN under float16's scale: the step is left out
            shown = adaptive if self.adversary.loss_scale is None else adaptive.nan_to_num()
            terms |= {"adversary/adaptive_weight": shown, "adversary/generator": generator}
            terms["adversary/logits_generator"] = logit
        return total, {name: value.detach() for name, value in terms.items()}

    def discriminator(self, images: Tensor, reconstructed: Tensor) -> tuple[Tensor, Terms]:
        """The adversary's hinge loss on images and reconstructions, and its terms."""
        assert self.adversary is not None
        loss, logits = self.adversary.discriminator_loss(images, reconstructed)
        terms = {"adversary/discriminator": loss.detach()}
        return loss, terms | {f"adversary/{name}": value for name, value in logits.items()}
