"""diffusers and us: networks and pipelines in (no diffusers needed), ours out, compared with diffusers' own."""

from ldmlab.interop.diffusers.diffusers_build import build_first_stage, build_text, build_unet
from ldmlab.interop.diffusers.diffusers_read import read_folder

__all__ = ["build_first_stage", "build_text", "build_unet", "read_folder"]
