"""`ldmlab first-stage MODEL...`: a sheet of each first stage, and one page for all.

Reconstruction does not rank first stages for generation, so the sheet also has the latents' spectrum, the decoder's
response to noise, half-way latents, scale and rotation, the use of a codebook, and generation: a small denoiser is
trained on the latents, at FLOPs equal for every first stage, and its samples are scored.

examples:
  ldmlab first-stage runs/mine/first_stage --features clip_run features.clip_run.run=emoji/clip
  ldmlab first-stage runs/a runs/b --out sheets --features clip_run,pixels features.clip_run.run=emoji/clip --seeds 5
  ldmlab first-stage emoji data=shards data.train=data/mine/train data.val=data/mine/val --without-generation

What was trained or scored once is kept in --out: more models, more seeds take only their own time.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmlab.app.cli import at_least
from ldmlab.errors import InputError, one_of

_OF_DENOISERS = ("flip", "mix", "balance", "balance_temperature")  # options of `data`
_GENERATION = {"generation_steps": 600, "seeds": 3, "samples": 500}  # options without effect where nothing is generated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL|KEY=VALUE", help="run folders, model folders, latents; data.val=FOLDER")
    add("--features", default="inception", help="files of conf/features, several by commas (inception)")
    add("--images", type=int, default=500, metavar="N", help="validation images whose latents are measured (500)")
    add("--generation-steps", type=int, help="of 32 images at 8 x 8 tokens; others by equal FLOPs (600)")
    add("--seeds", type=int, metavar="N", help="denoisers trained on each first stage (3)")
    add("--samples", type=int, metavar="N", help="of each denoiser, which are scored (500)")
    add("--without-generation", action="store_true", help="train no denoiser")
    add("--out", type=Path, metavar="FOLDER", help="of page, sheets, latents, denoisers (sheet in the first model)")
    add("--batch-size", type=int, default=32, help="images at once; changes the speed only (32)")
    add("--device", default="auto", help="auto | cpu | cuda (auto)")


def run(args: argparse.Namespace) -> None:
    options = [word for word in args.models if "=" in word and not Path(word).exists()]
    folders = [Path(word) for word in dict.fromkeys(args.models) if word not in options]
    if not folders:
        raise InputError("ldmlab first-stage needs a MODEL: a run folder or a model folder.")
    for name, usual in _GENERATION.items():
        if (value := getattr(args, name)) is not None and args.without_generation:
            raise InputError(f"--{name.replace('_', '-')}: --without-generation makes no use of it; leave one out.")
        setattr(args, name, usual if value is None else value)
    at_least(args, images=2, generation_steps=1, samples=2, seeds=1, batch_size=1)

    from ldmlab.app.compose import compose, plain
    from ldmlab.app.conf_files import check_compared, check_effects, chosen_options, group_choices, without_size
    from ldmlab.build import load_first_stage
    from ldmlab.files import write_json
    from ldmlab.model_files import model_folder
    from ldmlab.report.first_stage_page import write_sheets

    for name in (names := list(dict.fromkeys(args.features.split(",")))):
        one_of("--features", name, group_choices("features"))
    options[:0] = [f"+features@features.{name}={name}" for name in names]
    found = [load_first_stage(folder) for folder in folders]  # all are read before the first is measured
    config: Mapping[str, Any] = plain(without_size(compose("first_stage_sheet", options)))
    check_effects(config, chosen := chosen_options(options))
    generation = () if args.without_generation else _OF_DENOISERS
    for loaded in found:
        check_compared(config, chosen, loaded.image_size, ("object_background", *generation))
    out, sheets = args.out or model_folder(folders[0]) / "sheet", []
    for folder, loaded in zip(folders, found, strict=True):
        label = f"{folder.resolve().name}-{loaded.fingerprint[:6]}"
        sheets.append({"label": label, **_sheet(args, config, folder, loaded, out / label)})
        write_json(out / label / "sheet.json", sheets[-1])
    print(write_sheets(out, sheets))
    print(out / "report.html")


def _sheet(args: argparse.Namespace, config: Mapping[str, Any], given: Path, loaded: Any, out: Path) -> dict[str, Any]:
    from ldmlab.app.evaluate import reference_data, run_config, run_folder
    from ldmlab.app.first_stage_sheet import GenerationScore, sheet_of
    from ldmlab.build import pick_device
    from ldmlab.model_files import DESCRIPTION, write_model_folder

    data = reference_data({**config, "model": str(given)}, loaded.image_size)
    node = config.get("data") or run_config(run_folder(given))["data"]
    node = {**node, "image_size": loaded.image_size, "latents": None}
    folder = given
    if loaded.files.spec["kind"] != "first_stage" or not (given / DESCRIPTION).exists():  # a denoiser's, of latents
        folder, spec = out / "first_stage", {"image_size": loaded.image_size, "first_stage": loaded.spec}
        write_model_folder(folder, {"kind": "first_stage", **spec}, {"first_stage": loaded.module.state_dict()})
    loaded.module.to(pick_device(args.device))
    settings = (args.generation_steps, args.samples, args.batch_size, args.device)
    score = GenerationScore(folder, loaded, node, config["features"], out.parent, *settings)
    return sheet_of(score, data, args.images, 0 if args.without_generation else args.seeds)
