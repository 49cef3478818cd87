"""stage=all: one job of the downsampling comparison, every stage of a factor and its scores.

Scored are the reconstructions, the denoiser over its training, and its last checkpoint over sampler steps.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ldmlab import distributed
from ldmlab.app.compose import compose, plain
from ldmlab.app.factor_stages import Config, Factor, Parts, content_key, once
from ldmlab.app.wiring import check_names
from ldmlab.errors import InputError
from ldmlab.evaluation.flops import decoder_flops
from ldmlab.files import write_text
from ldmlab.report.metrics_json import read_evaluation
from ldmlab.report.tradeoff_jobs import FORMAT_VERSION, RECORD, trained_seconds


def train_all_stages(config: Config) -> Parts:
    """One job of the comparison: train or reuse every part, then score it."""
    check_names(config)
    for name, value in (("run.dir", config["run"]["dir"]), ("init_from", config["init_from"])):
        if value is not None:
            raise InputError(f"{name}={value}: stage=all names its folders by their content; leave {name} out.")
    if config["data"]["latents"] is not None:
        raise InputError("data.latents: stage=all encodes by itself; leave it out, or use stage=diffusion.")
    distributed.join()
    factor = Factor(config)
    parts = factor.train()
    score_factor(factor, parts)
    return parts


def score_factor(factor: Factor, parts: Parts) -> dict[str, Any]:
    """Compute missing scores; tradeoff.json in the denoiser's folder is what `ldmlab report` reads."""
    scores = FactorScores(factor, parts)
    record = scores.record()
    record["points"] = scores.points()
    record["reconstruction"] = scores.reconstruction()
    record["seconds_per_image"] = scores.seconds_per_image()
    if distributed.rank() == 0:
        text = json.dumps(record, indent=1, ensure_ascii=False)
        _keep(parts.denoiser, text)
    distributed.barrier()
    return record


def _keep(run: Path, text: str) -> None:
    """Write the record; new scores are sent to the run at W&B too."""
    from ldmlab.app.wandb_runs import send_scores

    if not (run / RECORD).exists() or (run / RECORD).read_text(encoding="utf-8") != text:
        write_text(run / RECORD, text)
        send_scores(run)


class FactorScores:
    """One factor's evaluations, each in a folder named by a hash of all its settings."""

    def __init__(self, factor: Factor, parts: Parts) -> None:
        self.factor, self.parts = factor, parts
        self.options = factor.options["evaluation"]
        self.features = dict(self.options["features"])
        if parts.clip is not None:
            self.features["run"] = str(parts.clip)

    def record(self) -> dict[str, Any]:
        """Description and cost of the factor."""
        factor, cost = self.factor, self.factor.cost
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
            "first_stage": str(self.parts.first_stage or "identity"),
            "first_stage_seconds": _last_seconds(self.parts.first_stage),
            "latents": str(self.parts.latents or "images"),
            "protocol": {name: value for name, value in self.options["protocol"].items() if name != "steps"},
        }

    # ---- the denoiser

    def points(self) -> list[dict[str, Any]]:
        """Scores after equal parts of the training, and of the last checkpoint with other numbers of sampler steps."""
        usual = self.options["protocol"]["steps"]
        points = [(step, usual) for step in self.steps()]
        points += [(self.factor.max_steps, steps) for steps in self.options["speed_steps"] if steps != usual]
        return [self._point(step, steps) for step, steps in points]

    def steps(self) -> list[int]:
        """Steps at the ends of equal parts of the training, where there are checkpoints."""
        last, points = self.factor.max_steps, self.options["points"]
        every = -(-last // points)
        return sorted({*range(every, last, every), last})

    def _point(self, step: int, sampler_steps: int) -> dict[str, Any]:
        checkpoint = self.parts.denoiser / "checkpoints" / f"step_{step:08d}.ckpt"
        if distributed.rank() == 0 and not checkpoint.exists():
            raise InputError(f"{checkpoint} is gone, so this point cannot be scored; delete the run to train it again.")
        protocol = {**self.options["protocol"], "steps": sampler_steps}
        found = self._evaluated(checkpoint, protocol, f"step_{step:08d}-{sampler_steps}")
        return {
            "step": step,
            "sampler_steps": sampler_steps,
            "seconds": trained_seconds(self.parts.denoiser / "metrics.csv", step),
            "flops": self.factor.cost.training * self.factor.images_per_step * step,
            "scores": found["scores"],
            "scored_by": {"features": found["features"], "reference": found["reference"]["manifest_hash"]},
        }

    def _evaluated(self, model: Path, protocol: Mapping[str, Any], name: str) -> dict[str, Any]:
        """metrics.json of one evaluation, computed unless it exists."""
        from ldmlab.app.evaluate import evaluate

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
        once(out, "metrics.json", lambda: evaluate(content))
        return read_evaluation(out)

    # ---- the first stage, and time

    def reconstruction(self) -> dict[str, Any] | None:
        """Scores of the first stage; f = 1 has none."""
        if self.parts.first_stage is None:
            return None
        return dict(self._evaluated(self.parts.first_stage, self.options["reconstruction"], "tradeoff")["scores"])

    def seconds_per_image(self) -> dict[str, float]:
        """Seconds for an image on one device by number of sampler steps, decoding included; kept once measured."""
        path = self.parts.denoiser / "sampling_seconds.json"
        known: dict[str, float] = {}
        if path.exists() and not self.parts.trained:
            known = json.loads(path.read_text())
        every = sorted({*self.options["speed_steps"], self.options["protocol"]["steps"]})
        if distributed.rank() == 0 and any(str(steps) not in known for steps in every):
            known = self._timed(every)
            path.write_text(json.dumps(known))
        return dict(distributed.from_first(known))

    def _timed(self, every: list[int]) -> dict[str, float]:
        from dataclasses import replace

        import torch

        from ldmlab.build import load
        from ldmlab.evaluation.protocol import Protocol
        from ldmlab.evaluation.real_images import conditions
        from ldmlab.evaluation.sources import requests
        from ldmlab.inference.model import generate
        from ldmlab.instantiate import instantiate

        protocol: Protocol = instantiate(self.options["protocol"], where="protocol")
        model = load(self.parts.denoiser, device=self.factor.device)
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


def _last_seconds(run: Path | None) -> float | None:
    """Duration of a run; None for one without metrics.csv."""
    if run is None or not os.path.exists(run / "metrics.csv"):
        return None
    return trained_seconds(run / "metrics.csv", None)
