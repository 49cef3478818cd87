"""Official configurations and weights in and out: CompVis/latent-diffusion and Stable Diffusion 1.x and 2.x."""

from ldmlab.interop.compvis.compvis_export import export
from ldmlab.interop.compvis.compvis_read import build_conditioner, build_first_stage, build_unet, load, read

__all__ = ["build_conditioner", "build_first_stage", "build_unet", "export", "load", "read"]
