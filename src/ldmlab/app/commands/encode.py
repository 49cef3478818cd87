"""`ldmlab encode`: Hydra options like train.py's, since the images and their size come from `data=`.

options are key=value, as for train.py; from_run and out must be given:
  ldmlab encode data=emoji from_run=runs/first_stage out=data/emoji-latents
  torchrun --nproc-per-node=8 -m ldmlab encode ...     several processes share the shards (or srun)
with conditioner=text conditioner.text.from_run=CLIP the states of captions are stored too, and training reads them;
conf/encode.yaml explains each option; an interrupted encode continues when the same command is run again.
"""

import argparse

from ldmlab.app.compose import compose, plain
from ldmlab.app.conf_files import check_added, check_effects, chosen_options
from ldmlab.errors import InputError

_READ = ("train", "val", "image_size", "fields", "flip", "workers", "sha256", "shard_cache", "shard_cache_gib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options of conf/encode.yaml")


def run(args: argparse.Namespace) -> None:
    config = plain(compose("encode", args.overrides))
    check_added("encode", args.overrides)
    check_effects(config, chosen := chosen_options(args.overrides))
    if unread := sorted(name for name in chosen if name.startswith("data.") and name[5:] not in _READ):
        raise InputError(f"{unread[0]} has no effect on latents; leave it out, or give it to the training on them.")
    from ldmlab.app.encode_splits import encode_splits

    encode_splits(config)
