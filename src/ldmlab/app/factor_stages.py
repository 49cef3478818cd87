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
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ldmlab import distributed
from ldmlab.app.compose import compose, plain
from ldmlab.app.conditioning import build_conditioners, context_widths
from ldmlab.app.encode_splits import encode_splits
from ldmlab.app.plans import latent_spec, sized_backbone
from ldmlab.app.wiring import train
from ldmlab.build import LoadedFirstStage, load_first_stage
from ldmlab.contracts import LatentSpec
from ldmlab.data.shard_data import ShardData
from ldmlab.disks import FileLock
from ldmlab.errors import InputError
from ldmlab.evaluation.flops import DenoiserCost, denoiser_cost
from ldmlab.instantiate import accepts, instantiate
from ldmlab.training.run_folder import FINISHED
from ldmlab.training.settings import images_a_step

Config = Mapping[str, Any]
OWN = ("optimizer", "lr_schedule", "trainer", "stage")  # of each stage before the denoiser
_WAIT_SECONDS = 5.0
_NOT_OF_DATA = (  # how images are read, not which
    *("train", "val", "latents", "states", "workers", "cache", "cache_limit_gib", "sha256", "object_background"),
    *("shard_cache", "shard_cache_gib"),
)
_NOT_OF_TRAINER = (
    *("log_every", "validate_every", "checkpoint_every", "checkpoint_every_minutes", "keep", "accelerator", "devices"),
    *("compile", "timeout_minutes", "gradient_alarm"),
)


class Factor:
    """The stages of one factor, each as an ordinary run with its own options."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.options = config["stage"]
        self.shared = Path(self.options["shared"])
        self.data: ShardData = instantiate(config["data"], where="data", seed=config["seed"])
        self.content = data_content(config["data"], self.data)
        self.identity = not instantiate(config["first_stage"], where="first_stage").state_dict()
        self.first_stage = Path(config["from_run"]) if config["from_run"] else None  # these are None for f = 1
        self.latents: Path | None = None
        self.clip: Path | None = None  # None: the features that are compared need none
        self.denoiser, self.trained = Path(), False  # by this call

    def train(self) -> "Factor":
        """All parts in order, new or reused."""
        self.cost  # noqa: B018 - what cannot be built is refused before hours of training
        if not self.identity and self.first_stage is None:
            self.first_stage = self._shared_run("first_stage", ("first_stage", "loss"), "autoencoder")
        features = self.options["evaluation"]["features"]
        needed = accepts(features, "clip", where="stage.evaluation.features") and features.get("run") is None
        self.clip = self._shared_run("clip", ("clip",), "clip") if needed else None
        self.latents = None if self.identity else self._encode()
        self._train_denoiser()
        return self

    @cached_property
    def latent(self) -> LatentSpec:
        """Of the first stage as configured, or of the run that from_run names."""
        module: Any = instantiate(self.config["first_stage"], where="first_stage")
        return latent_spec(self.loaded.module if self.first_stage else module, self.data.image_size)

    @property
    def loaded(self) -> LoadedFirstStage:
        """The trained first stage; not of f = 1."""
        assert self.first_stage is not None
        return load_first_stage(self.first_stage)

    @cached_property
    def cost(self) -> DenoiserCost:
        conditioners, backbone = build_conditioners(self.config["conditioner"], self.latent)[0], self.config["backbone"]
        sized = sized_backbone(backbone, self.latent, conditioners)
        return denoiser_cost(sized, self.latent, context_widths(conditioners, self.latent))

    @property
    def images_per_step(self) -> int:
        return images_a_step(self.config["trainer"], distributed.world_size())

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
        train({**self.config, **changed, "run": run}, resume=shlex.join(["ldmlab", "train", *sys.argv[1:]]))

    def _encode(self) -> Path:
        """Latents of both splits, by the first stage's weights and the images."""
        encoding = {name: self.options["encode"][name] for name in ("mirror", "dtype")}
        images = [self.data.manifest(split, "images").hash for split in ("train", "val")]
        key = content_key(self.loaded.fingerprint, images, self.data.image_size, encoding)
        folder = self.shared / f"latents-{key}"
        content = {
            **plain(compose("encode", ["from_run=given", "out=given"])),  # options that the sweep leaves as they are
            **self.options["encode"],
            **{"data": self.config["data"], "from_run": str(self.first_stage), "out": str(folder)},
            **{"splits": ["train", "val"], "device": self.device, "seed": self.config["seed"]},
        }

        def encode() -> None:
            encode_splits(content)
            if distributed.rank() == 0:
                (folder / FINISHED).write_text("{}\n")

        once(folder, FINISHED, encode)
        return folder

    def _train_denoiser(self) -> None:
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
        key = content_key(content, self.content, self.latents and self.latents.name, distributed.world_size())
        label = f"{self.config['run']['name']}-f{self.latent.downsampling}-seed{self.config['seed']}-{key}"
        self.denoiser = Path(self.config["paths"]["runs"]) / label
        data = {**self.config["data"], "latents": self.latents and str(self.latents)}
        changed = {"stage": stage, "trainer": trainer, "data": data, "from_run": None}
        self.trained = once(self.denoiser, FINISHED, lambda: self._run(self.denoiser, changed))

    @property
    def device(self) -> str:
        """For encoding and scoring."""
        return {"cpu": "cpu", "gpu": "cuda"}.get(self.config["trainer"]["accelerator"], "auto")


def content_key(*parts: Any) -> str:
    """Ten hexadecimal digits that change when any of the parts does."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def data_content(node: Mapping[str, Any], data: ShardData) -> dict[str, Any]:
    """The images by the hash of their manifest, wherever they lie, and their order and size."""
    kept = {name: value for name, value in node.items() if name not in _NOT_OF_DATA}
    return kept | {"images": data.manifest("train", "images").hash}


def trainer_content(node: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in node.items() if name not in _NOT_OF_TRAINER}
    return kept if kept.get("global_batch") else {name: kept[name] for name in kept if name != "global_batch"}


def once(folder: Path, mark: str, make: Callable[[], None]) -> bool:
    """Make `folder` unless its `mark` exists; True if it was made. Waits for another job that makes it."""
    lock, announced = FileLock(folder.parent / f".{folder.name}.lock"), False

    def take() -> bool:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return lock.take()

    while not distributed.shared(take):  # a job's processes are one: the first holds the lock
        if not announced:
            distributed.say(f"another job is making {folder}; waiting for it.")
        announced = True
        time.sleep(_WAIT_SECONDS)
    try:
        if distributed.shared((folder / mark).exists):
            return False
        make()
        distributed.barrier()
        return True
    finally:
        lock.release()
