"""Image shards to latent shards by a composed configuration (conf/encode.yaml)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmlab.app.conditioning import as_states, build_conditioners, build_encoders, states_encoder, states_record
from ldmlab.app.plans import latent_spec
from ldmlab.app.progress import bar
from ldmlab.build import load_first_stage, moments_of, pick_device
from ldmlab.data.data_sheet import carry_sheet
from ldmlab.data.encode_shards import LatentSettings, encode
from ldmlab.data.manifest import ENCODE_PLAN, MANIFEST
from ldmlab.data.output_folder import Destination
from ldmlab.data.shard_data import ShardData
from ldmlab.distributed import launched
from ldmlab.errors import InputError
from ldmlab.files import read_json
from ldmlab.instantiate import instantiate
from ldmlab.model_files import DESCRIPTION, write_model_folder
from ldmlab.nn.compiling import compile_regions, wanted


def encode_splits(config: dict[str, Any]) -> None:
    """The splits of `config` one after the other; then the first stage, so that training needs no other file."""
    out = Destination.of(config["out"], "out")
    loaded = load_first_stage(config["from_run"], config["weights"])
    _check_out(out.folder, loaded.fingerprint)
    images = {**config["data"], "image_size": config["data"]["image_size"] or loaded.image_size}
    data: ShardData = instantiate(images, where="data", seed=config["seed"])
    data.check_sides("images")
    first_stage: Any = loaded.module
    if not first_stage.state_dict():
        raise InputError("the identity first stage (f = 1) needs no encoding: train on the image shards themselves.")
    conditioners, _ = build_conditioners(config["conditioner"], latent_spec(first_stage, data.image_size))
    encoders: dict[str, Any] = build_encoders(config["encoder"])
    device = pick_device(config["device"])
    for module in (first_stage, *conditioners.values(), *encoders.values()):
        module.to(device)
        if wanted(config["compile"], device):
            compile_regions(module)
    settings = LatentSettings(
        fingerprint=loaded.fingerprint,
        latent_channels=first_stage.latent_channels,
        downsampling=first_stage.downsampling,
        image_size=data.image_size,
        mirrored=config["mirror"],
        dtype=config["dtype"],
        precision=config["precision"],
        carries_images=config["carry_images"],
        first_stage=loaded.spec,
        states=states_record(makers := {**conditioners, **as_states(encoders)}),
    )
    for split in config["splits"]:
        _encode_split(split, out, config, data, first_stage, makers, settings)
    if launched()[0] == 0:
        spec = {"kind": "first_stage", "image_size": loaded.image_size, "first_stage": loaded.spec}
        write_model_folder(out.folder / "first_stage", spec, {"first_stage": first_stage.state_dict()})
    if all(path.exists() for path in _last_files(out, config["splits"])):  # the process that ends last sees them all
        with bar("sending", "files", quiet=out.address is None) as advance:
            out.send(advance, "out")


def _check_out(folder: Path, fingerprint: str) -> None:
    """InputError for a folder of somebody's shards, and for a first stage in it that is not that of these latents."""
    if (folder / MANIFEST).exists():
        raise InputError(f"out={folder} is a folder of shards itself; choose a new folder.")
    first_stage, plans = folder / "first_stage", sorted(folder.glob(f"*/{ENCODE_PLAN}"))  # of splits encoded before
    if first_stage.exists() and not plans:
        raise InputError(f"out={folder}: {first_stage} is there already and would be replaced; choose a new folder.")
    for plan in plans:
        found = read_json(plan)
        if isinstance(found, dict) and found.get("fingerprint", fingerprint) != fingerprint:
            raise InputError(f"out={folder}: {plan.parent} holds latents of another first stage; choose a new folder.")


def _last_files(out: Destination, splits: Sequence[str]) -> list[Path]:
    return [out.folder / "first_stage" / DESCRIPTION, *(out.folder / split / MANIFEST for split in splits)]


def _encode_split(
    split: str,
    where: Destination,
    config: dict[str, Any],
    data: ShardData,
    first_stage: Any,
    makers: dict[str, Any],  # of states
    settings: LatentSettings,
) -> None:
    """One split into its folder, with a bar and a closing line."""
    out, (rank, world) = where.folder / split, launched()
    with bar(f"encoding {split}", "images", quiet=rank > 0) as advance:
        manifest = encode(
            data.folder(split, "images"),
            out,
            lambda images: moments_of(first_stage, images, settings.precision),
            settings,
            rank=rank,
            world=world,
            batch_size=config["batch_size"],
            workers=data.workers,
            max_bad=config["max_bad"],
            sha256=data.sha256,
            option=f"data.{split}",
            progress=advance,
            encode_states=states_encoder(makers, config["mirror"]) if makers else None,
        )
    if rank == 0 and manifest and manifest.latents:
        carry_sheet(data.folder(split, "images"), out)
        skipped = len(manifest.extra.get("skipped", []))
        cut = sum(getattr(module, "cut", 0) for module in makers.values())
        note = f", {skipped} unreadable" if skipped else ""
        note += "".join(f", states of {name}" for name in makers) + (f" ({cut} captions cut)" if cut else "")
        std = manifest.latents["statistics"]["overall_std"]
        print(f"{where.named(split)}: {manifest.total} images{note}, standard deviation of the latents {std:.3f}")
