"""The patches of a vision transformer of timm: DINOv2 in REPA, U-REPA and VA-VAE."""

from pathlib import Path

from torch import Tensor

from ldmlab.encoders import FrozenEncoder
from ldmlab.errors import InputError
from ldmlab.nn.timm_network import TimmNetwork


class TimmPatches(FrozenEncoder):
    """Final states of the patches after the last norm, without class and register tokens."""

    def __init__(
        self,
        model: str,  # timm's name
        weights: Path | str | None = None,  # file of its weights: .safetensors, or .pth of tensors; None: fresh ones
        image_size: int | None = None,  # px the images are resized to; None: the network's own
    ) -> None:
        super().__init__()
        self.source = TimmNetwork(model, weights, image_size, "encoder.dinov2")
        self.node = {"_target_": "ldmlab.encoders.timm_patches.TimmPatches", "model": model, "image_size": image_size}
        self.name, self.width = self.source.name, int(self.source.network.num_features)
        if not hasattr(self.source.network, "num_prefix_tokens"):
            raise InputError(f"encoder.dinov2.model={model} is no vision transformer, as vit_base_patch14_dinov2 is.")
        self.train(False)

    def maps(self, images: Tensor) -> Tensor:
        """The patches alone, on their grid."""
        network = self.source.network
        tokens = network.forward_features(self.source.pixels((images + 1) / 2))[:, network.num_prefix_tokens :]
        return tokens.transpose(1, 2).unflatten(2, network.patch_embed.grid_size)
