"""stage=all: one job of the downsampling comparison, every stage of a factor and its scores.

Scored are the reconstructions, the denoiser over its training, and its last checkpoint over sampler steps.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ldmlab import distributed
from ldmlab.app.compose import compose, plain
from ldmlab.app.conf_files import check_names
from ldmlab.app.dashboard_page import send_scores
from ldmlab.app.evaluate import evaluate
from ldmlab.app.factor_stages import Config, Factor, content_key, once
from ldmlab.build import load
from ldmlab.errors import InputError
from ldmlab.evaluation.flops import decoder_flops
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.real_images import conditions
from ldmlab.evaluation.sources import Kept, requests
from ldmlab.files import write_text
from ldmlab.inference.model import generate
from ldmlab.instantiate import instantiate
from ldmlab.report.metrics_json import read_evaluation
from ldmlab.report.tradeoff_jobs import FORMAT_VERSION, RECORD, trained_seconds


def train_all_stages(config: Config) -> Factor:
    """One job of the comparison: train or reuse every part, then score it."""
    check_names(config)
    for name, value in (("run.dir", config["run"]["dir"]), ("init_from", config["init_from"])):
        if value is not None:
            raise InputError(f"{name}={value}: stage=all names its folders by their content; leave {name} out.")
    if config["data"]["latents"] is not None:
        raise InputError("data.latents: stage=all encodes by itself; leave it out, or use stage=diffusion.")
    distributed.join(config["trainer"].get("timeout_minutes"))
    factor = Factor(config).train()
    FactorScores(factor).keep()
    return factor


class FactorScores:
    """One factor's evaluations, each in a folder named by a hash of all its settings."""

    kept: Kept | None = None  # samples that several evaluations share

    def __init__(self, factor: Factor) -> None:
        self.factor = factor
        self.options = factor.options["evaluation"]
        self.features = dict(self.options["features"])
        if factor.clip is not None:
            self.features["run"] = str(factor.clip)

    def keep(self) -> None:
        """Compute missing scores; tradeoff.json in the denoiser's folder is what `ldmlab report` reads."""
        record, first_stage = self.record() | {"points": self.points(), "reconstruction": None}, self.factor.first_stage
        if first_stage is not None:
            lost = self.evaluated(first_stage, self.options["reconstruction"], "tradeoff")
            record["reconstruction"] = dict(lost["scores"])
        record["seconds_per_image"] = self.seconds_per_image()
        path, text = self.factor.denoiser / RECORD, json.dumps(record, indent=1, ensure_ascii=False)
        if distributed.rank() == 0 and not (path.exists() and path.read_text(encoding="utf-8") == text):
            write_text(path, text)
            send_scores(self.factor.denoiser)  # new ones go to the run at W&B too
        distributed.barrier()

    def record(self) -> dict[str, Any]:
        factor, cost, first_stage = self.factor, self.factor.cost, self.factor.first_stage
        log = first_stage and first_stage / "metrics.csv"
        node = factor.config["first_stage"] if factor.identity else factor.loaded.spec
        latent = factor.latent
        return {
            "format_version": FORMAT_VERSION,
            "downsampling": latent.downsampling,
            "latent": [latent.channels, latent.height, latent.width],
            "seed": factor.config["seed"],
            "max_steps": factor.max_steps,
            "budget": "steps" if factor.options["compute_budget"] is None else "compute",
            "images_per_step": factor.images_per_step,
            "processes": distributed.world_size(),
            **asdict(cost),
            "decoder": 0 if factor.identity else decoder_flops(node, latent),
            "first_stage": str(first_stage or "identity"),
            "first_stage_seconds": trained_seconds(log, None) if log and log.exists() else None,
            "latents": str(self.factor.latents or "images"),
            "protocol": {name: value for name, value in self.options["protocol"].items() if name != "steps"},
        }

    def points(self) -> list[dict[str, Any]]:
        """Scores after equal parts of the training, and of the last checkpoint with other numbers of sampler steps."""
        last, usual = self.factor.max_steps, self.options["protocol"]["steps"]
        every = -(-last // self.options["points"])
        points = [(step, usual) for step in sorted({*range(every, last, every), last})]
        points += [(last, steps) for steps in self.options["speed_steps"] if steps != usual]
        return [self._point(step, steps) for step, steps in points]

    def _point(self, step: int, sampler_steps: int) -> dict[str, Any]:
        checkpoint = self.factor.denoiser / "checkpoints" / f"step_{step:08d}.ckpt"
        if distributed.rank() == 0 and not checkpoint.exists():
            raise InputError(f"{checkpoint} is gone, so this point cannot be scored; delete the run to train it again.")
        protocol = {**self.options["protocol"], "steps": sampler_steps}
        found = self.evaluated(checkpoint, protocol, f"step_{step:08d}-{sampler_steps}")
        return {
            "step": step,
            "sampler_steps": sampler_steps,
            "seconds": trained_seconds(self.factor.denoiser / "metrics.csv", step),
            "flops": self.factor.cost.training * self.factor.images_per_step * step,
            "scores": found["scores"],
            "scored_by": {"features": found["features"], "reference": found["reference"]["manifest_hash"]},
        }

    def evaluated(self, model: Path, protocol: Mapping[str, Any], name: str) -> dict[str, Any]:
        """metrics.json of one evaluation, computed unless it exists."""
        run = model.parents[1] if model.suffix == ".ckpt" else model
        identity = (protocol, self.features, self.options["precision"], self.factor.content)
        out = run / "evaluation" / f"{name}-{content_key(*identity)}"
        content = {
            **plain(compose("evaluate", ["model=given"])),  # options that the sweep leaves as they are
            **{"model": str(model), "weights": "averaged", "out": str(out), "protocol": protocol},
            **{"features": self.features, "guiders": {}, "data": self.factor.config["data"], "images": []},
            **{"batch_size": self.options["batch_size"], "device": self.factor.device},
            **{"precision": self.options["precision"], "seed": 0, "wandb": False},
        }
        once(out, "metrics.json", lambda: evaluate(content, self.kept))
        return read_evaluation(out)

    def seconds_per_image(self) -> dict[str, float]:
        """Seconds for an image on one device by number of sampler steps, decoding included; kept once measured."""
        path = self.factor.denoiser / "sampling_seconds.json"
        known: dict[str, float] = {}
        if path.exists() and not self.factor.trained:
            known = json.loads(path.read_text())
        every = sorted({*self.options["speed_steps"], self.options["protocol"]["steps"]})
        if distributed.rank() == 0 and any(str(steps) not in known for steps in every):
            known = self._timed(every)
            path.write_text(json.dumps(known))
        return dict(distributed.from_first(known))

    def _timed(self, every: list[int]) -> dict[str, float]:
        protocol: Protocol = instantiate(self.options["protocol"], where="protocol")
        model = load(self.factor.denoiser, device=self.factor.device)
        model.in_precision(self.options["precision"])
        data = self.factor.data.with_task(model.diffusion.task)
        count = self.options["batch_size"]
        known = conditions(data, protocol.reference, sorted(model.reads), count)
        inputs = requests(replace(protocol, samples=count), model.reads, known)
        taken = {}
        for steps in (every[0], *every):  # the first time warms up
            began = time.perf_counter()
            list(generate(model, inputs, replace(protocol.settings(), steps=steps), batch_size=count))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken[str(steps)] = (time.perf_counter() - began) / count
        return taken
