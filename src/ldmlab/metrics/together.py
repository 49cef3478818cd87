"""Inception and CLIP in one pass: FID and IS beside CLIP score and CMMD."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from ldmlab.metrics.features import Inception2015, OpenClipFeatures, published_clip


class InceptionAndClip(nn.Module):
    """The features that are compared are Inception's, so name, hash and width are too; CLIP adds clip and text."""

    gives = Inception2015.gives | {"clip", "text"}

    def __init__(self, inception: Inception2015, clip: OpenClipFeatures) -> None:
        super().__init__()
        self.inception, self.clip = inception, clip
        self.name, self.width, self.weights_hash = inception.name, inception.width, inception.weights_hash
        self.preparation = f"{inception.preparation}; for {clip.name}: {clip.preparation}"
        self.text_name, self.text_weights_hash = clip.name, clip.weights_hash

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """features (B, 2048), logits (B, 1008), spatial (B, 2023), clip (B, D)."""
        return {**self.inception(images), "clip": self.clip(images)["clip"]}

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Captions => (B, D), in the space of `clip`."""
        return self.clip.texts(captions)


def inception_and_clip(weights: Path | str, name: str, pretrained: str) -> InceptionAndClip:
    """The Inception network's file, and a published open_clip model by architecture and tag."""
    return InceptionAndClip(Inception2015(weights), published_clip(name, pretrained))
