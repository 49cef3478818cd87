"""First stages: images to raw latents and back."""

from ldmlab.first_stages.identity import Identity
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.first_stages.vq import VQModel

__all__ = ["Identity", "KLAutoencoder", "VQModel"]
