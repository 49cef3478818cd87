"""Feature extractors: 8-bit images to the features (and logits) that scores compare.

Shapes: B batch, D feature width, K logits; images are uint8 (B, 3, H, W).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.checkpoints import fingerprint
from ldmlab.errors import InputError, check_side
from ldmlab.nn import numerics
from ldmlab.nn.openclip import OpenClip, build_clip
from ldmlab.nn.pixels import to_float
from ldmlab.nn.timm_network import safe_file

SPATIAL_CHANNELS = 7
SPATIAL_WIDTH = SPATIAL_CHANNELS * 17 * 17  # 2023, whatever the images' size


def check_images(images: Tensor) -> None:
    """Refuse anything but uint8 (B, 3, H, W)."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise InputError(
            f"images of shape {tuple(images.shape)} and type {images.dtype} cannot be scored; "
            "give (batch, 3, height, width) of uint8."
        )


class Inception2015(nn.Module):
    """The Inception network of 2015-12-05, the one of published FID and IS (torch-fidelity's port of the graph).

    Pooled features of 2048, the 1008 logits without bias and the spatial features of sFID (ADM's script: the first 7
    channels of mixed_6/conv, 17 x 17 positions); any image size, resized inside as TensorFlow 1 did.
    """

    name = "inception-2015-12-05"
    width = 2048
    gives = frozenset({"features", "logits", "spatial"})
    preparation = "8-bit RGB, inside the network to 299 px as TensorFlow 1 (bilinear, no antialiasing), (x - 128) / 128"

    def __init__(self, weights: Path | str) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = Path(weights)
        self.weights_hash = safe_file(path, "run `ldmlab fetch inception` or give another path")
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except (RuntimeError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise InputError(f"features.weights={path} is not the Inception network's file; fetch it again.") from error
        self._map: Tensor | None = None  # (B, 192, 17, 17), of the last images
        # TensorFlow counts its mixed blocks from 0 at Mixed_5b, so mixed_6 is Mixed_6d.
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._map = output

    @numerics.exact()
    @torch.inference_mode()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """features (B, 2048), logits (B, 1008), spatial (B, 2023) with the channel as the fastest axis."""
        check_images(images)
        features, logits = self.network(images.to(next(self.network.parameters()).device))
        assert self._map is not None
        spatial, self._map = self._map[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1), None
        return {"features": features, "logits": logits, "spatial": spatial}


class Pixels(nn.Module):
    """The pixels of small copies, less the image's mean colour: their cosine is the normalised cross-correlation."""

    gives = frozenset({"features"})
    weights_hash = "none"

    def __init__(self, side: int = 32) -> None:
        super().__init__()
        check_side("features.side", side)
        self.side, self.name, self.width = side, f"pixels at {side} px", 3 * side * side
        self.preparation = f"8-bit RGB, averaged to {side} px, minus the mean of each channel"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """features (B, 3 side side)."""
        check_images(images)
        small = F.interpolate(to_float(images), size=(self.side, self.side), mode="area")
        return {"features": (small - small.mean(dim=(2, 3), keepdim=True)).flatten(1)}


class OpenClipFeatures(nn.Module):
    """An open_clip model: its embeddings of images, and of captions, before they are brought to unit length."""

    gives = frozenset({"features", "clip", "text"})
    own_parameters: int | None = None  # of a CLIP that was trained here; None: a published one

    def __init__(self, clip: OpenClip, name: str) -> None:
        super().__init__()
        self.name = name
        self.model = clip.model.eval().requires_grad_(False)
        self.weights_hash = fingerprint(self.model.state_dict())
        self._pixels, self._ids = clip.pixels, clip.ids
        self.preparation = f"8-bit RGB, bicubic with antialiasing to {clip.image_size} px"
        self.eval()
        blank = torch.zeros(1, 3, clip.image_size, clip.image_size, dtype=torch.uint8)
        self.width = int(self(blank)["features"].shape[1])

    @numerics.exact()
    @torch.inference_mode()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """features and clip, both (B, D); images are resized to the tower's size, bicubic with antialiasing."""
        check_images(images)
        encode = self.model.encode_image
        assert callable(encode)
        found = encode(self._pixels(to_float(images.to(next(self.model.parameters()).device))))
        return {"features": found, "clip": found}

    @numerics.exact()
    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Captions => (B, D), in the space of the images' features."""
        encode = self.model.encode_text
        assert callable(encode)
        return torch.as_tensor(encode(self._ids(captions).to(next(self.model.parameters()).device)))


def published_clip(name: str, pretrained: str) -> OpenClipFeatures:
    """A published open_clip model by architecture and tag, such as ViT-B-32 and openai."""
    return OpenClipFeatures(build_clip(name, pretrained), f"open_clip {name} {pretrained}")


def clip_of_run(run: str, clip: OpenClip) -> OpenClipFeatures:
    """The CLIP of a run of `stage=clip`, read from its folder by the caller."""
    found = OpenClipFeatures(clip, f"clip run {Path(run).name}")
    found.own_parameters = sum(p.numel() for p in clip.model.parameters())
    return found


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
