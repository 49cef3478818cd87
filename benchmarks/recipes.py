"""Recipes of training beside each other: equal FLOPs, own solver and grid, the best of four rates of other seeds.

    python benchmarks/recipes.py --train TRAIN --pairs PAIRS --concepts CONCEPTS --latents LATENTS [--out runs/recipes]
    python benchmarks/recipes.py ... --arms paper,flow --seeds 0,1,2           some; goes on where it stopped
    python benchmarks/recipes.py --report --out runs/recipes                   table and recipes.png of what is there

TRAIN, PAIRS, CONCEPTS are image shards with the fields caption, style and category; LATENTS those of TRAIN with the
states of their captions and the patches of encoder=clip. An arm is a file of conf/experiment/recipes/, or another
reading of an arm's runs: other weights or guidance. Every score is a line of OUT/results.jsonl. docs/recipes.md
explains what is compared.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch

Choice = Mapping[str, Any]
RATES = (1e-3, 2.5e-3, 6e-3, 1.5e-2)
PLAIN: Choice = {"guidance_scale": 1.0}
_SCALES = (1.5, 2.5)
_INTERVAL = (0.1, 0.8)


@dataclass(frozen=True)
class Arm:
    """A recipe: an experiment trained at several rates, or other readings of the runs of the arm `of`."""

    title: str
    experiment: str = ""
    of: str = ""
    choices: Sequence[Choice] = tuple({"rate": rate} for rate in RATES)
    shares: Sequence[float] = (1.0,)  # of the training, after which it is scored


ARMS: Mapping[str, Arm] = {
    "paper": Arm("the paper's: U-Net, noise predicted, l2, DDIM", "post_hoc", shares=(0.25, 0.5, 1.0)),
    "flow": Arm("flow, logit-normal times", "flow"),
    "v_min_snr": Arm("v, Min-SNR-5", "v_min_snr"),
    "edm": Arm("EDM", "edm"),
    "dit": Arm("DiT", "dit"),
    "muon": Arm("Muon", "muon"),
    "aligned": Arm("aligned with CLIP", "aligned"),
    "post_hoc": Arm(
        "length of the average chosen", of="paper", choices=[{"weights": w} for w in (0.05, 0.1, 0.15, 0.2)]
    ),
    "guidance": Arm("guided everywhere", of="paper", choices=[{"guidance_scale": s} for s in _SCALES]),
    "interval": Arm(
        "guided between 0.1 and 0.8",
        of="paper",
        choices=[{"guidance_scale": s, "guidance_interval": _INTERVAL} for s in _SCALES],
    ),
    "stacked": Arm("stacked: DiT, flow, Muon", "stacked", shares=(0.25, 0.5, 1.0)),
}


@dataclass
class Comparison:
    """All arms in one process. `lines`: what OUT/results.jsonl holds."""

    out: Path
    data: Mapping[str, str]  # train | pairs | concepts | latents => folder
    steps: int  # of the paper's recipe
    samples: int  # of each of the two sets of captions
    evaluations: int  # of the network for a sample
    clip: str
    tuning: Sequence[int]  # seeds
    overrides: Sequence[str] = ()  # of every training
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lines = read_lines(self.out)

    @cached_property
    def judges(self) -> Any:
        from _recipe_judges import Judges

        held_out = {name: self.data[name] for name in ("pairs", "concepts")}
        made = Judges(self.out / "judges", self.data["train"], held_out, self.clip, self.samples)
        if not find(self.lines, "held-out images"):
            self._note({"arm": "held-out images", "choice": {}, "seed": 0, "share": 1.0, "scores": made.floor()})
        return made

    def _note(self, line: dict[str, Any]) -> None:
        self.lines.append(json.loads(json.dumps(line)))  # as it is read again: without tuples
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def config(self, arm: Arm, *words: str) -> dict[str, Any]:
        """Of a training of an arm."""
        from ldmlab.app.compose import compose, plain

        given = [f"data.train={self.data['train']}", f"data.val={self.data['concepts']}"]
        given += [f"data.latents={self.data['latents']}", f"trainer.max_steps={self.steps}"]
        given += ["+trainer.limit_val_batches=1", *self.overrides]  # nothing is decided by the validation loss
        return dict(plain(compose("train", [f"experiment=recipes/{arm.experiment}", *given, *words])))

    def cost(self, name: str) -> dict[str, int]:
        """FLOPs of a step, update included, parameters, and the steps within the FLOPs of the paper's recipe."""
        known = self.out / "costs.json"
        costs = json.loads(known.read_text()) if known.exists() else {}
        for one in ("paper", name):
            if one not in costs:
                costs[one] = step_cost(self.config(ARMS[one]))
                known.parent.mkdir(parents=True, exist_ok=True)
                known.write_text(json.dumps(costs, indent=1))
        parts = 4  # equal ones, at whose ends checkpoints are scored
        steps = self.steps * costs["paper"]["flops"] // costs[name]["flops"] // parts * parts
        return {**costs[name], "steps": steps}

    def run_of(self, name: str, rate: float, seed: int) -> Path:
        """The finished run of an arm that is trained."""
        from ldmlab.app.wiring import train

        folder = self.out / "runs" / f"{name}-{rate:g}-seed{seed}"
        if not (folder / "time.json").exists():
            steps, points = self.cost(name)["steps"], len(ARMS[name].shares)
            every = steps if points == 1 else steps // 4
            words = [f"trainer.max_steps={steps}", f"trainer.checkpoint_every={every}", "trainer.keep=5"]
            config = self.config(ARMS[name], *words, f"optimizer.learning_rate={rate}", f"seed={seed}")
            began = Clock()
            train({**config, "run": {**config["run"], "dir": str(folder)}})
            (folder / "time.json").write_text(json.dumps(began.record()))
        return folder

    def scores(self, name: str, choice: Choice, seed: int, share: float = 1.0) -> dict[str, Any]:
        """The line of an arm, a choice, a seed and a share of its training; trained and scored unless it is there."""
        if found := find(self.lines, name, choice, seed, share):
            return found[0]
        arm, base = ARMS[name], ARMS[name].of or name
        rate = choice["rate"] if not arm.of else self.best(base)["rate"]
        run, cost = self.run_of(base, rate, seed), self.cost(base)
        step = round(share * cost["steps"])
        settings = {**PLAIN, **{k: v for k, v in choice.items() if k not in ("rate", "weights")}}
        images = self._samples(run, step, choice.get("weights", "averaged"), settings, seed)
        record = {"arm": name, "choice": dict(choice), "seed": seed, "share": share, "rate": rate}
        record |= {"steps": step, "flops": step * cost["flops"], "parameters": cost["parameters"]}
        record |= json.loads((run / "time.json").read_text()) | {"scores": self.judges.scores(images)}
        self._note(record)
        if len(arm.shares) == 1 and not any(other.of == base for other in ARMS.values()):
            shutil.rmtree(run)
        return record

    def _samples(self, run: Path, step: int, weights: Any, settings: Choice, seed: int) -> torch.Tensor:
        from _recipe_judges import samples_of

        from ldmlab.build import load

        model = load(run / "checkpoints" / f"step_{step:08d}.ckpt", weights=weights).in_precision("bfloat16")
        twice = model.diffusion.path.solver.sampler == "heun"  # evaluations a step, but for the last one
        count = (self.evaluations + 1) // 2 if twice else self.evaluations
        return samples_of(model, self.judges.captions, {"steps": count, "seed": seed, **settings})

    def best(self, name: str) -> Choice:
        """The choice with the smallest mean of log distance over the tuning seeds."""
        tried = [
            (mean_log([self.scores(name, c, s) for s in self.tuning]), i) for i, c in enumerate(ARMS[name].choices)
        ]
        return ARMS[name].choices[min(tried)[1]]

    def finals(self, name: str, seed: int) -> None:
        """Scores of a seed that decided nothing, at every share of the training."""
        for share in ARMS[name].shares:
            self.scores(name, self.best(name), seed, share)


class Clock:
    """Wall time beside processor time, and how many processes wanted a processor."""

    def __init__(self) -> None:
        self.wall, self.processor, self.load = time.monotonic(), time.process_time(), os.getloadavg()[0]

    def record(self) -> dict[str, float]:
        """Since it was made."""
        load = (self.load + os.getloadavg()[0]) / 2
        seconds, processor = time.monotonic() - self.wall, time.process_time() - self.processor
        return {"seconds": round(seconds, 2), "processor_seconds": round(processor, 2), "load": round(load, 2)}


def step_cost(config: dict[str, Any]) -> dict[str, int]:
    """FLOPs of one training step, counted on a batch: forward, backward, update; and the denoiser's parameters."""
    from ldmlab.app.plans import PLANS
    from ldmlab.app.wiring import read_data, stage_options
    from ldmlab.evaluation.flops import flops_of
    from ldmlab.instantiate import instantiate
    from ldmlab.training.settings import trainer_node

    settings = instantiate(trainer_node(config["trainer"]), where="trainer")
    data, config = read_data(config)
    stage: Any = PLANS["diffusion"](config, data, stage_options(config, settings)).stage
    stage.configure_optimizers()
    batch = next(iter(data.train_loader(settings.micro_batch, kind="latents")))
    optimizers = list(stage.optimizers_by_group().values())
    with torch.autocast("cpu", torch.bfloat16):  # in which attention is two products, which are counted
        passes = flops_of(lambda: sum(stage.losses(group, batch).total for group in stage.groups()).backward())
    updates = flops_of(lambda: [optimizer.step() for optimizer in optimizers])
    sizes = sum(p.numel() for p in stage.diffusion.backbone.parameters())
    return {"flops": passes + updates, "parameters": sizes}


def read_lines(out: Path) -> list[dict[str, Any]]:
    """OUT/results.jsonl without a line that was cut by a kill."""
    path, found = out / "results.jsonl", []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            print(f"{path}: a line that was cut is left out", file=sys.stderr)
    return found


def find(
    lines: Sequence[dict[str, Any]], arm: str, choice: Choice | None = None, seed: int | None = None, share: float = 1.0
) -> list[dict[str, Any]]:
    """Lines of an arm; None: any choice or seed."""
    wanted = None if choice is None else json.loads(json.dumps(choice))
    return [
        line
        for line in lines
        if line["arm"] == arm
        and (wanted is None or line["choice"] == wanted)
        and (seed is None or line["seed"] == seed)
        and line["share"] == share
    ]


def mean_log(lines: Sequence[dict[str, Any]]) -> float:
    """Mean over lines of the log of the geometric mean of both encoders' distances."""
    return sum(math.log(line["scores"]["distance"]) for line in lines) / len(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "pairs", "concepts", "latents"):
        parser.add_argument(f"--{name}", metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--arms", default=",".join(ARMS), help="of: %(default)s")
    parser.add_argument("--seeds", default="0,1,2,3,4,5,6,7", help="that are compared (%(default)s)")
    parser.add_argument("--tuning-seeds", default="100,101", help="that choose rates and readings (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of the paper's recipe; others take its FLOPs (200)")
    parser.add_argument("--samples", type=int, default=128, help="of each set of held-out captions (128)")
    parser.add_argument("--evaluations", type=int, default=20, help="of the network for a sample (20)")
    parser.add_argument("--clip", default="emoji/clip", help="that judges; the run that reads captions (emoji/clip)")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="options of every training")
    parser.add_argument("--report", action="store_true", help="only print the table and draw the figure")
    args = parser.parse_args()
    if unknown := set(args.arms.split(",")) - set(ARMS):
        parser.error(f"--arms {','.join(sorted(unknown))}: choose of {', '.join(ARMS)}")
    missing = [name for name in ("train", "pairs", "concepts", "latents") if not getattr(args, name)]
    if missing and not args.report:
        parser.error(f"--{missing[0]} is missing; --report alone needs no data")
    return args


def main() -> None:
    """Tune all arms, then the seeds one after the other, so that those of any moment are pairs; then the report."""
    args = arguments()
    if not args.report:
        data = {name: getattr(args, name) for name in ("train", "pairs", "concepts", "latents")}
        tuning = [int(seed) for seed in args.tuning_seeds.split(",")]
        sizes = (args.steps, args.samples, args.evaluations, args.clip)
        comparison = Comparison(args.out, data, *sizes, tuning, args.set)
        arms = args.arms.split(",")
        for name in arms:
            print(f"{name}: {comparison.cost(ARMS[name].of or name)}, best {comparison.best(name)}", flush=True)
        for seed in map(int, args.seeds.split(",")):
            for name in arms:
                comparison.finals(name, seed)
    from _recipe_table import report

    report(args.out, read_lines(args.out))


if __name__ == "__main__":
    main()
