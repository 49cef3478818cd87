"""The stages of one downsampling factor in order, reusing the parts that exist.

PATHS.RUNS/shared holds first_stage-KEY, clip-KEY and latents-KEY; the denoiser's run folder is NAME-fF-seedS-KEY. A key
is a hash of everything that decides the content, so the same command again trains nothing twice and continues where
it stopped.
"""

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ldmlab import distributed
from ldmlab.app.commands.encode import encode_splits
from ldmlab.app.compose import compose, plain
from ldmlab.app.conditioning import build_conditioners, context_widths
from ldmlab.app.plans import backbone_sizes, latent_spec
from ldmlab.app.wiring import train
from ldmlab.build import LoadedFirstStage, load_first_stage
from ldmlab.contracts import LatentSpec
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.flops import DenoiserCost, denoiser_cost
from ldmlab.files import FileLock
from ldmlab.instantiate import accepts, instantiate
from ldmlab.training.run_folder import FINISHED

Config = Mapping[str, Any]
OWN = ("optimizer", "lr_schedule", "trainer", "stage")  # of each stage before the denoiser
_WAIT_SECONDS = 5.0
# How images are read, not which.
_NOT_OF_DATA = {
    *("train", "val", "latents", "states", "workers", "cache", "cache_limit_gib", "sha256", "object_background"),
}
_NOT_OF_TRAINER = ("log_every", "validate_every", "checkpoint_every", "keep", "accelerator", "devices", "compile")


@dataclass(frozen=True)
class Parts:
    """Parts of one job, new or reused."""

    first_stage: Path | None  # None: f = 1
    clip: Path | None  # None: the features that are compared need none
    latents: Path | None  # None: f = 1
    denoiser: Path
    trained: bool  # by this call


class Factor:
    """The stages of one factor, each as an ordinary run with its own options."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.options = config["stage"]
        self.shared = Path(self.options["shared"])
        self.data: ShardData = instantiate(config["data"], where="data", seed=config["seed"])
        self.content = data_content(config["data"], self.data)
        self.identity = not instantiate(config["first_stage"], where="first_stage").state_dict()
        self._first_stage_run = Path(config["from_run"]) if config["from_run"] else None

    def train(self) -> Parts:
        """All parts in order."""
        self.widths, self.cost  # noqa: B018 - what cannot be built is refused before hours of training
        if not self.identity and self._first_stage_run is None:
            self._first_stage_run = self._shared_run("first_stage", ("first_stage", "loss"), "autoencoder")
        clip = self._shared_run("clip", ("clip",), "clip") if self._needs_clip() else None
        latents = None if self.identity else self._encode()
        return self._denoiser(clip, latents)

    # ---- what a factor is

    @cached_property
    def latent(self) -> LatentSpec:
        """Of the first stage as configured, or of the run that from_run names."""
        module: Any = instantiate(self.config["first_stage"], where="first_stage")
        return latent_spec(self.loaded.module if self._first_stage_run else module, self.data.image_size)

    @property
    def loaded(self) -> LoadedFirstStage:
        """The trained first stage; not of f = 1."""
        assert self._first_stage_run is not None
        return load_first_stage(self._first_stage_run)

    @cached_property
    def widths(self) -> dict[str, int]:
        """Of the denoiser's conditioning, by slot."""
        return context_widths(build_conditioners(self.config["conditioner"], self.latent), self.latent)

    @cached_property
    def cost(self) -> DenoiserCost:
        """Parameters and FLOPs of the denoiser."""
        conditioners = build_conditioners(self.config["conditioner"], self.latent)
        sizes = backbone_sizes(self.latent, conditioners, self.config["backbone"])
        return denoiser_cost({**self.config["backbone"], **sizes}, self.latent, self.widths)

    @property
    def images_per_step(self) -> int:
        """Over all processes."""
        trainer = self.config["trainer"]
        return int(trainer["micro_batch"] * trainer["accumulate"] * distributed.world_size())

    @property
    def max_steps(self) -> int:
        """trainer.max_steps, or the number of steps within the compute budget."""
        if self.options["compute_budget"] is None:
            return int(self.config["trainer"]["max_steps"])
        budget, step = float(self.options["compute_budget"]) * 1e18, self.cost.training * self.images_per_step
        if budget < step:
            raise InputError(
                f"stage.compute_budget={self.options['compute_budget']} (1e18 FLOPs) is less than the cost of one "
                f"step ({step / 1e18:.3g}); raise it."
            )
        return int(budget // step)

    # ---- the stages

    def _shared_run(self, name: str, groups: tuple[str, ...], stage: str) -> Path:
        """A run of an earlier stage, reused by every job with the same content."""
        own = {group: self.options[name][group] for group in OWN}
        assert own["stage"]["name"] == stage
        content = {group: self.config[group] for group in groups} | own
        content |= {"trainer": trainer_content(own["trainer"]), "seed": self.options["shared_seed"]}
        folder = self.shared / f"{name}-{content_key(content, self.content, distributed.world_size())}"
        changed = {**own, "seed": self.options["shared_seed"], "from_run": None, "task": None}
        once(folder, FINISHED, lambda: self._run(folder, changed))
        return folder

    def _run(self, folder: Path, changed: Config) -> None:
        run = {**self.config["run"], "dir": str(folder)}
        train({**self.config, **changed, "run": run}, resume=_this_command())

    def _needs_clip(self) -> bool:
        features = self.options["evaluation"]["features"]
        return accepts(features, "clip", where="stage.evaluation.features") and features.get("run") is None

    def _encode(self) -> Path:
        """Latents of both splits, by the first stage's weights and the images."""
        encoding = {name: self.options["encode"][name] for name in ("mirror", "dtype")}
        images = [self.data.manifest(split, "images").hash for split in ("train", "val")]
        key = content_key(self.loaded.fingerprint, images, self.data.image_size, encoding)
        folder = self.shared / f"latents-{key}"
        content = {
            **plain(compose("encode", ["from_run=given", "out=given"])),  # options that the sweep leaves as they are
            **self.options["encode"],
            **{"data": self.config["data"], "from_run": str(self._first_stage_run), "out": str(folder)},
            **{"splits": ["train", "val"], "device": self.device, "seed": self.config["seed"]},
        }

        def encode() -> None:
            encode_splits(content)
            if distributed.rank() == 0:
                (folder / FINISHED).write_text("{}\n")

        once(folder, FINISHED, encode)
        return folder

    def _denoiser(self, clip: Path | None, latents: Path | None) -> Parts:
        """The denoiser's run; a checkpoint is kept for every point of the curves."""
        points, steps = int(self.options["evaluation"]["points"]), self.max_steps
        trainer = {
            **self.config["trainer"],
            "max_steps": steps,
            "checkpoint_every": -(-steps // points),
            "keep": points + 2,  # and what interruptions may add
        }
        stage = self.options["denoiser"]["stage"]
        names = ("backbone", "conditioner", "diffusion", "task", "optimizer", "lr_schedule", "seed")
        content = {name: self.config[name] for name in names} | {"stage": stage, "trainer": trainer_content(trainer)}
        key = content_key(content, self.content, latents and latents.name, distributed.world_size())
        label = f"{self.config['run']['name']}-f{self.latent.downsampling}-seed{self.config['seed']}-{key}"
        folder = Path(self.config["paths"]["runs"]) / label
        data = {**self.config["data"], "latents": latents and str(latents)}
        changed = {"stage": stage, "trainer": trainer, "data": data, "from_run": None}
        trained = once(folder, FINISHED, lambda: self._run(folder, changed))
        return Parts(self._first_stage_run, clip, latents, folder, trained)

    @property
    def device(self) -> str:
        """For encoding and scoring."""
        return {"cpu": "cpu", "gpu": "cuda"}.get(self.config["trainer"]["accelerator"], "auto")


def _this_command() -> str:
    return " ".join(["python", "train.py", *map(shlex.quote, sys.argv[1:])])


# ---- parts that several jobs share: made once, by one job at a time


def content_key(*parts: Any) -> str:
    """Ten hexadecimal digits that change when any of the parts does."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def data_content(node: Mapping[str, Any], data: ShardData) -> dict[str, Any]:
    """The images by the hash of their manifest, wherever they lie, and their order and size."""
    kept = {name: value for name, value in node.items() if name not in _NOT_OF_DATA}
    return kept | {"images": data.manifest("train", "images").hash}


def trainer_content(node: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer options that determine the weights."""
    return {name: value for name, value in node.items() if name not in _NOT_OF_TRAINER}


def once(folder: Path, mark: str, make: Callable[[], None]) -> bool:
    """Make `folder` unless its `mark` exists; True if it was made. Waits for another job that makes it."""
    with _alone(folder):
        if distributed.shared((folder / mark).exists):
            return False
        make()
        distributed.barrier()
        return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One job at a time; its processes are one job, of which the first holds the lock."""
    lock = FileLock(folder.parent / f".{folder.name}.lock")

    def take() -> bool:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return lock.take()

    announced = False
    while not distributed.shared(take):
        if not announced and distributed.rank() == 0:
            print(f"another job is making {folder}; waiting for it.", file=sys.stderr, flush=True)
        announced = True
        time.sleep(_WAIT_SECONDS)
    try:
        yield
    finally:
        lock.release()
