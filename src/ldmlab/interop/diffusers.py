"""diffusers and us: networks and pipelines in (no diffusers needed), ours out, compared with diffusers' own."""

from ldmlab.interop.diffusers_folder import read_folder
from ldmlab.interop.diffusers_modules import build_first_stage, build_text, build_unet

__all__ = ["build_first_stage", "build_text", "build_unet", "read_folder"]
