"""Losses of the first stages."""

from ldmlab.losses.adversary import Adversary
from ldmlab.losses.autoencoder_loss import AutoencoderLoss
from ldmlab.losses.patch_discriminator import PatchDiscriminator
from ldmlab.losses.reconstruction_loss import ReconstructionLoss

__all__ = ["Adversary", "AutoencoderLoss", "PatchDiscriminator", "ReconstructionLoss"]
