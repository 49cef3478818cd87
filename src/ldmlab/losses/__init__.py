"""Losses of the first stages."""

from ldmlab.losses.adversary import Adversary
from ldmlab.losses.autoencoder import AutoencoderLoss
from ldmlab.losses.patch_discriminator import PatchDiscriminator
from ldmlab.losses.reconstruction import ReconstructionLoss

__all__ = ["Adversary", "AutoencoderLoss", "PatchDiscriminator", "ReconstructionLoss"]
