"""Entry point of training: compose, check, wire, run."""

import sys
from typing import Any

from ldmlab.app.cli import run_command

OPENING = """usage: python train.py experiment=NAME [group=name ...] [key=value ...]

Trains one stage: an autoencoder, a CLIP, or a denoiser. An experiment file sets everything for one known run."""
EXAMPLES = """examples:
  python train.py experiment=demo/cpu_first_stage
  python train.py experiment=demo/cpu_text_to_image trainer.max_steps=10000 seed=1
  python train.py -m experiment=tradeoff/emoji first_stage=f1,f2,f4,f8,f16,f32     every stage of every factor
  torchrun --nproc-per-node=8 train.py experiment=...      several GPUs: start one process for each"""


def main() -> None:
    """`python train.py`."""
    sys.exit(run_command(run))


def run() -> int:
    """Hydra's command line, or its help."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        from ldmlab.app.help import hydra_help

        print(hydra_help("train", OPENING, EXAMPLES))
        return 0
    from ldmlab.app.compose import hydra_main

    hydra_main("train", job)
    return 0


def job(config: Any) -> None:
    """One training run from its composed configuration."""
    from ldmlab.app.compose import plain

    content = plain(config)
    if content["stage"]["name"] == "all":
        from ldmlab.app.all_stages import train_all_stages

        train_all_stages(content)
    else:
        from ldmlab.app.choices import chosen_options
        from ldmlab.app.wiring import train

        train(content, chosen=chosen_options())
