"""Wiring of a training run: derives dependent options, builds the parts, starts the fit."""

import difflib
import shlex
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ldmlab import distributed
from ldmlab.app.choices import check_built, check_choices
from ldmlab.app.conditioning import check_states, class_bound, with_classes_of
from ldmlab.app.plans import PLANS, Plan, task_node
from ldmlab.app.run_records import comparison_fields
from ldmlab.checkpoints import fingerprint
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.instantiate import accepts, instantiate
from ldmlab.model_files import DESCRIPTION, read_description, read_model, write_description
from ldmlab.report.score_curves import read_curves
from ldmlab.training.engine import checked
from ldmlab.training.fit import fit, load_initial_weights
from ldmlab.training.random_state import seed_process
from ldmlab.training.resume import Record
from ldmlab.training.run_folder import FINISHED, RunFolder
from ldmlab.training.settings import TrainerSettings, trainer_node
from ldmlab.training.stage import Batches

Config = Mapping[str, Any]
_SHOWN = 6  # validation metrics in a line
NAMES = (
    *("stage", "data", "first_stage", "loss", "clip", "classifier", "backbone", "conditioner", "diffusion"),
    *("sampler", "task", "optimizer"),
    *("lr_schedule", "trainer", "callbacks", "logger", "paths", "seed", "run", "from_run", "init_from", "plugins"),
)


def train(config: Config, resume: str | None = None, chosen: Collection[str] = ()) -> None:
    """One training run from its resolved configuration in plain data.

    resume: the command that resumes it; chosen: the options that were typed, which take precedence.
    """
    check_names(config)
    settings: TrainerSettings = instantiate(trainer_node(config["trainer"]), where="trainer")
    check_accelerator(settings)
    name = config["stage"]["name"]
    if name not in PLANS:
        raise InputError(f"stage.name={name} is unknown; choose {', '.join(PLANS)}.")
    check_choices(config, chosen)
    run = open_run(config)
    plan: Plan | None = None
    try:
        data, config = read_data(config)
        seed_process(config["seed"], 0)  # the same first weights in every process
        plan = PLANS[name](config, data, stage_options(config, settings))
        check_built(config, plan, chosen)
        if name == "diffusion":
            known = plan.stage.diffusion.conditioners  # type: ignore[union-attr]
            data = replace(data, classes=class_bound(known))  # type: ignore[arg-type]
        if config["init_from"] is not None and not run.has_checkpoints():
            take_initial_weights(config, plan, data)
        _fit(run, {**config, **plan.used}, plan, settings, data, resume or resume_command(run))
        if not settings.fast_dev_run:
            run.finish(plan.stage.step)
            distributed.say(closing(run.path, config, nested=resume is not None))
    except BaseException:
        if plan is None or plan.stage.step == 0:
            run.discard()
        raise
    finally:
        run.close()


def read_data(config: Config) -> tuple[ShardData, Config]:
    """The data as the stage reads them, and the configuration with the options derived from them."""
    data: ShardData = instantiate(config["data"], where="data", seed=config["seed"])
    config = with_classes_of(config, data)
    if config["task"]:
        data = with_task(config, data)
    if config["stage"]["name"] == "diffusion":
        data = data.with_states(config["conditioner"])
    return data, config


def take_initial_weights(config: Config, plan: Plan, data: ShardData) -> None:
    """Weights to start from; the scale of the latents stays this run's, as model.yaml describes it."""
    source = config["init_from"]
    parts = initial_parts(source, plan)
    if "conditioner" in parts:
        check_towers(config, plan.stage.diffusion.conditioners, parts["conditioner"])  # type: ignore[arg-type, union-attr]
    load_initial_weights(plan.stage, parts, f"init_from={source}")
    if data.stored:  # a frozen conditioner with stored states, together with a trainable one
        check_states(plan.stage.diffusion.conditioners, data)  # type: ignore[arg-type, union-attr]


def check_towers(config: Config, modules: Mapping[str, Any], given: Mapping[str, torch.Tensor]) -> None:
    """Refuse init_from whose weights of a tower are not those of the run that from_run names."""
    for name, module in modules.items():
        run = config["conditioner"][name].get("from_run")
        own = {f"{name}.tower.{key}": tensor for key, tensor in module.tower.state_dict().items()} if run else {}
        if any(key in given and not torch.equal(given[key].cpu(), tensor) for key, tensor in own.items()):
            raise InputError(
                f"conditioner.{name}.from_run={run}: its weights are not those that init_from={config['init_from']} "
                f"holds for conditioner.{name}; give the run that one was trained with, or leave init_from out."
            )


def check_accelerator(settings: TrainerSettings) -> None:
    """Refuse a requested GPU that is not available, before anything is written."""
    if settings.accelerator == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise InputError(
            "trainer.accelerator=gpu: torch finds no GPU here; use trainer.accelerator=cpu or auto, or check the "
            "driver with nvidia-smi."
        )


def initial_parts(source: str, plan: Plan) -> dict[str, Any]:
    """Weights to start from; conditioners of another kind start from random weights."""
    files = read_model(source)
    kinds = [[node["_target_"] for node in spec.get("conditioners", {}).values()] for spec in (files.spec, plan.spec)]
    parts = {name: part for name, part in files.parts.items() if name != "latent_scale"}
    scales = [spec.get("latent_scale") for spec in (files.spec, plan.spec)]
    if scales[0] and scales[1] and scales[0] != scales[1]:
        std, own = (scale["std"] for scale in scales if scale)
        distributed.say(f"init_from={source}: its latents were divided by {std}, this run's are by {own}")
    if kinds[0] != kinds[1] and parts.pop("conditioner", None) is not None:
        distributed.say(f"init_from={source}: its conditioners are of another kind; they start from random weights")
    return parts


def with_task(config: Config, data: ShardData) -> ShardData:
    """The data as the task sees them; other stages have no task."""
    if config["stage"]["name"] != "diffusion":
        raise InputError(f"task: stage={config['stage']['name']} takes no task; use task=none.")
    return data.with_task(instantiate(task_node(config, data.image_size), where="task"))


def _fit(run: RunFolder, config: Config, plan: Plan, settings: TrainerSettings, data: ShardData, resume: str) -> None:
    rank, world = distributed.rank(), distributed.world_size()
    callbacks = checked("callbacks", _callbacks(config, plan, data))
    data.manifest("val", plan.reads)  # refused now, not at the first validation
    fit(
        plan.stage,
        Batches(
            lambda position: data.train_loader(
                settings.micro_batch, settings.accumulate, world, rank, position, plan.reads
            ),
            lambda: data.eval_loader("val", settings.micro_batch, world, rank, kind=plan.reads),
            data.manifest("train", plan.reads).hash,
        ),
        run=run,
        settings=settings,
        callbacks=callbacks,
        loggers=checked("logger", _named(config, "logger")),
        resume_command=resume,
        record=Record(config, plan.spec, {name: fingerprint(m.state_dict()) for name, m in plan.frozen.items()}),
        fields=comparison_fields(plan.spec),
        begin=lambda: _write_start(run, config, plan),
    )


def _named(config: Config, group: str) -> list[tuple[str, Any]]:
    """The parts of a group of entries, with their full names."""
    named = [(f"{group}.{name}", node) for name, node in config[group].items() if node]
    return [(where, instantiate(node, where=where)) for where, node in named]


def _callbacks(config: Config, plan: Plan, data: ShardData) -> list[tuple[str, Any]]:
    """The callbacks; one that scores images gets its scorer."""
    from ldmlab.app.evaluation_parts import scores_callback

    made = []
    for name, node in config["callbacks"].items():
        where = f"callbacks.{name}"
        if node and accepts(node, "scorer", where=where):
            made.append((where, scores_callback(node, plan, data)))
        elif node:
            made.append((where, instantiate(node, where=where)))
    return made


def check_names(config: Config) -> None:
    """Refuse unused names, which are typos, also in an experiment file."""
    for name in config.keys() - NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        raise InputError(
            f"{name}: nothing reads this option; {f'did you mean {near[0]}?' if near else 'leave it out.'}"
        )


def stage_options(config: Config, settings: TrainerSettings) -> dict[str, Any]:
    """The arguments that every stage takes, and those of conf/stage."""
    images = settings.micro_batch * settings.accumulate * distributed.world_size()
    return {
        "seed": config["seed"],
        "optimizer": _derived_where_taken(config, "optimizer", "global_batch", images),
        "lr_schedule": _derived_where_taken(config, "lr_schedule", "max_steps", settings.max_steps),
        "max_steps": settings.max_steps,
        "accumulate": settings.accumulate,
        "gradient_clip": settings.gradient_clip,
        "averaging_decay": settings.averaging_decay,
        **{name: value for name, value in config["stage"].items() if name != "name"},
    }


def _derived_where_taken(config: Config, group: str, name: str, value: int) -> Any:
    """The part of a group; a class from outside need not take derived arguments."""
    derived: dict[str, Any] = {name: value} if accepts(config[group], name, where=group) else {}
    return instantiate(config[group], where=group, **derived)


def closing(run: Path, config: Config, *, nested: bool) -> str:
    """Where a finished run lies, its last validation metrics, and the next command unless it is part of another one."""
    try:
        curves = read_curves(run / "metrics.csv")
    except InputError:  # the table is damaged or gone; the checkpoints are there
        curves = {}
    points = {name.removeprefix("val/"): curve[-1] for name, curve in curves.items() if name.startswith("val/")}
    last = max((step for step, _ in points.values()), default=0)
    shown = [f"{name} {value:.4g}" for name, (step, value) in points.items() if step == last and "/" not in name]
    lines = [f"finished: {run}" + (f"; validation at step {last:.0f}: {', '.join(shown[:_SHOWN])}" if shown else "")]
    train, val = (shlex.quote(f"data.{split}={config['data'].get(split)}") for split in ("train", "val"))
    place = shlex.quote(str(run))
    following = {
        "autoencoder": f"ldmlab encode data=shards {train} {val} from_run={place} out={place}-latents",
        "clip": f"ldmlab train conditioner=text conditioner.text.from_run={place} data.latents=LATENTS",
        "classifier": f"ldmlab sample MODEL 0 --classifier {place}",
        "diffusion": f"ldmlab evaluate model={place}",
    }
    return "\n".join(lines if nested else [*lines, f"next: {following[config['stage']['name']]}"])


def open_run(config: Config) -> RunFolder:
    """The run's folder: new under paths.runs, or exactly run.dir, where an existing run is resumed."""
    run = config["run"]
    if run["dir"] is not None:
        return RunFolder.at(run["dir"])
    return RunFolder.create(config["paths"]["runs"], run["name"])


def resume_command(run: RunFolder) -> str:
    """The command that resumes this run."""
    given = [word for word in sys.argv[1:] if not word.startswith("run.dir=")]
    return " ".join(["python", "train.py", *map(shlex.quote, given), f"run.dir={shlex.quote(str(run.path))}"])


def _set_aside_damaged(path: Path) -> None:
    """A description that cannot be read is replaced: the checkpoints are enough."""
    if path.exists():
        try:
            read_description(path.parent)
        except InputError as error:
            distributed.say(f"{error} It is written anew.")
            path.unlink()


def _write_start(run: RunFolder, config: Config, plan: Plan) -> None:
    """Initial content of the run folder: configuration, description, frozen weights."""
    run.write_config(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    if distributed.rank() == 0:
        (run.path / FINISHED).unlink(missing_ok=True)
        plan.write_frozen(run.path)
        _set_aside_damaged(run.path / DESCRIPTION)
        write_description(run.path, plan.spec)
    distributed.barrier()
