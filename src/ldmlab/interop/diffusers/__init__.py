"""diffusers and us: networks and pipelines in (no diffusers needed), ours out, compared with diffusers' own."""

from ldmlab.interop.diffusers.modules import build_first_stage, build_text, build_unet
from ldmlab.interop.diffusers.reading import read_folder

__all__ = ["build_first_stage", "build_text", "build_unet", "read_folder"]
