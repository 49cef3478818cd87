"""`ldmlab encode`: Hydra options like train.py's, since the images and their size come from `data=`."""

import argparse
from typing import TYPE_CHECKING, Any

from ldmlab.errors import InputError

if TYPE_CHECKING:
    from ldmlab.build import LoadedFirstStage
    from ldmlab.data.encode_shards import LatentSettings
    from ldmlab.data.manifest import Manifest
    from ldmlab.data.shard_data import ShardData

USAGE = """options are key=value, as for train.py; from_run and out must be given:
  ldmlab encode data=emoji from_run=runs/first_stage out=data/emoji-latents
  torchrun --nproc-per-node=8 -m ldmlab encode ...     several processes share the shards (or srun)
with conditioner=text conditioner.text.from_run=CLIP the states of captions are stored too, and training reads them;
conf/encode.yaml explains each option; an interrupted encode continues when the same command is run again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Everything is an override."""
    parser.epilog = USAGE
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of conf/encode.yaml")


def run(args: argparse.Namespace) -> int:
    """Encode by the composed configuration."""
    from ldmlab.app.compose import compose, plain

    encode_splits(plain(compose("encode", args.overrides)))
    return 0


def encode_splits(config: dict[str, Any]) -> None:
    """The splits of `config` (conf/encode.yaml, resolved) one after the other, then the first stage."""
    from pathlib import Path

    from ldmlab.app.conditioning import build_conditioners
    from ldmlab.app.plans import check_divides, latent_spec
    from ldmlab.build import load_first_stage, pick_device
    from ldmlab.distributed import launched
    from ldmlab.instantiate import instantiate

    loaded = load_first_stage(config["from_run"], config["weights"])
    images = {**config["data"], "image_size": config["data"]["image_size"] or loaded.image_size}
    data: ShardData = instantiate(images, where="data", seed=config["seed"])
    if not loaded.module.state_dict():
        raise InputError("the identity first stage (f = 1) needs no encoding: train on the image shards themselves.")
    check_divides(data.image_size, loaded.module.downsampling)  # type: ignore[arg-type]
    conditioners = build_conditioners(config["conditioner"], latent_spec(loaded.module, data.image_size)).modules
    for module in (loaded.module, *conditioners.values()):
        module.to(pick_device(config["device"]))
    rank, world = launched()
    out = Path(config["out"])
    for split in config["splits"]:
        _encode_split(config, data, loaded, conditioners, split, out / split, rank, world)
    if rank == 0:
        _put_first_stage(loaded, out / "first_stage")


def _encode_split(
    config: dict[str, Any],
    data: "ShardData",
    loaded: "LoadedFirstStage",
    conditioners: dict[str, Any],
    split: str,
    out: Any,
    rank: int,
    world: int,
) -> None:
    """One split into its folder, with a bar and a closing line."""
    from rich.console import Console

    from ldmlab.app.conditioning import states_encoder
    from ldmlab.app.progress import bar
    from ldmlab.build import moments_of
    from ldmlab.data.encode_shards import encode

    with bar(f"encoding {split}", "images", Console(stderr=True, quiet=rank > 0)) as advance:
        manifest = encode(
            data.folder(split, "images"),
            out,
            lambda images: moments_of(loaded.module, images),
            _settings(config, data, loaded, conditioners),
            rank=rank,
            world=world,
            batch_size=config["batch_size"],
            workers=data.workers,
            max_bad=config["max_bad"],
            sha256=data.sha256,
            option=f"data.{split}",
            progress=advance,
            encode_states=states_encoder(conditioners, config["mirror"]) if conditioners else None,
        )
    if rank == 0 and manifest and manifest.latents:
        print(f"{out}: {_summary(manifest, manifest.latents, conditioners)}")


def _summary(manifest: "Manifest", latents: dict[str, Any], conditioners: dict[str, Any]) -> str:
    """Number of encoded images, and of unreadable ones."""
    skipped = len(manifest.extra.get("skipped", []))
    note = f", {skipped} unreadable" if skipped else ""
    note += "".join(f", states of {name}" for name in conditioners)
    cut = sum(getattr(module, "cut", 0) for module in conditioners.values())
    note += f" ({cut} captions cut)" if cut else ""
    std = latents["statistics"]["overall_std"]
    return f"{manifest.total} images{note}, standard deviation of the latents {std:.3f}"


def _settings(
    config: dict[str, Any], data: "ShardData", loaded: "LoadedFirstStage", conditioners: dict[str, Any]
) -> "LatentSettings":
    """What the manifest records of the latents."""
    from ldmlab.app.conditioning import states_record
    from ldmlab.data.encode_shards import LatentSettings

    first_stage: Any = loaded.module
    return LatentSettings(
        fingerprint=loaded.fingerprint,
        latent_channels=first_stage.latent_channels,
        downsampling=first_stage.downsampling,
        image_size=data.image_size,
        mirrored=config["mirror"],
        dtype=config["dtype"],
        carries_images=config["carry_images"],
        first_stage=loaded.spec,
        states=states_record(conditioners),
    )


def _put_first_stage(loaded: "LoadedFirstStage", folder: Any) -> None:
    """The first stage is stored with its latents, so that training needs no other file."""
    from ldmlab.model_files import write_model_folder

    spec = {"kind": "first_stage", "image_size": loaded.image_size, "first_stage": loaded.spec}
    write_model_folder(folder, spec, {"first_stage": loaded.module.state_dict()})
