"""diffusers: import of networks and pipelines (without diffusers), export compared with diffusers' own output."""

from ldmlab.interop.diffusers.diffusers_build import build_first_stage, build_text, build_unet
from ldmlab.interop.diffusers.diffusers_networks import as_official
from ldmlab.interop.diffusers.diffusers_read import read_folder

__all__ = ["as_official", "build_first_stage", "build_text", "build_unet", "read_folder"]
