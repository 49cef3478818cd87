"""Wiring of a training run: derives dependent options, builds the parts, starts the fit."""

import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from ldmlab import distributed
from ldmlab.app.compose import typed
from ldmlab.app.conditioning import check_states, class_bound, encoders_of, with_classes_of
from ldmlab.app.conf_files import check_built, check_choices, check_names
from ldmlab.app.plans import PLANS, Plan, task_node
from ldmlab.app.run_end import ended_early, finished
from ldmlab.app.run_records import comparison_fields
from ldmlab.app.teacher import taught
from ldmlab.checkpoints import fingerprint, save_tensors
from ldmlab.data.data_sheet import data_record
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError, one_of
from ldmlab.files import write_json
from ldmlab.instantiate import accepts, instantiate, instantiate_with
from ldmlab.model_files import DATA, DESCRIPTION, read_description, read_model, write_description
from ldmlab.stored_names import ENCODER_PREFIX
from ldmlab.training.callbacks.throughput import StepFlops
from ldmlab.training.data_module import Batches
from ldmlab.training.engine import checked
from ldmlab.training.fit import fit, load_initial_weights
from ldmlab.training.random_state import seed_process
from ldmlab.training.resume import Record
from ldmlab.training.run_folder import FINISHED, RunFolder
from ldmlab.training.settings import TrainerSettings, trainer_node

Config = Mapping[str, Any]
_COUNT = (sys.executable, "-W", "ignore", "-m", "ldmlab.app.estimate")


def train(config: Config, resume: str | None = None, chosen: Collection[str] = ()) -> Path:
    """The folder of a training run, from its configuration, the command that resumes it and the typed options."""
    check_names(config)
    settings: TrainerSettings = instantiate(trainer_node(config["trainer"]), where="trainer")
    settings.check_device()
    name = config["stage"]["name"]
    one_of("stage.name", name, PLANS)
    check_choices(config, chosen)
    config = taught(config, chosen)
    distributed.join(settings.timeout_minutes)
    folder, runs = config["run"]["dir"], config["paths"]["runs"]  # run.dir: exactly there, where a run is resumed
    run = RunFolder.create(runs, config["run"]["name"]) if folder is None else RunFolder.at(folder)
    plan: Plan | None = None
    try:
        data, config = read_data(config)
        seed_process(config["seed"], 0)  # the same first weights in every process
        plan = PLANS[name](config, data, stage_options(config, settings))
        check_built(config, plan, chosen)
        if name == "diffusion":
            known = plan.stage.diffusion.conditioners  # type: ignore[union-attr]
            data = replace(data, classes=class_bound(known))  # type: ignore[arg-type]
        on_gpu = settings.accelerator != "cpu" and torch.cuda.is_available()
        data = data.with_tokenizers(plan.stage.tokenizers(), pinned=on_gpu)
        if config["init_from"] is not None and not run.has_checkpoints():
            take_initial_weights(config, plan, data)
        command = resume or f"{shlex.join(['ldmlab', 'train', *_typed()])} {typed('run.dir', run.path)}"
        _fit(run, {**config, **plan.used}, plan, settings, data, command)
        if plan.stage.step < settings.max_steps and not settings.fast_dev_run:  # by a callback, or trainer.max_time
            distributed.say(ended_early(run.path, plan.stage, settings.max_steps, command))
        elif not settings.fast_dev_run:
            run.finish(plan.stage.step)
            distributed.say(finished(run.path, config, plan.stage, nested=resume is not None))
        return run.path
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
        data = data.with_states([*config["conditioner"], *(ENCODER_PREFIX + name for name in encoders_of(config))])
    return data, config


def with_task(config: Config, data: ShardData) -> ShardData:
    """The data as the task sees them; other stages have no task."""
    if config["stage"]["name"] != "diffusion":
        raise InputError(f"task: stage={config['stage']['name']} takes no task; use task=none.")
    return data.with_task(instantiate(task_node(config, data.image_size), where="task"))


def take_initial_weights(config: Config, plan: Plan, data: ShardData) -> None:
    """Weights to start from: the scale of the latents stays this run's, conditioners of another kind stay random."""
    source = config["init_from"]
    files = read_model(source)
    parts = {name: part for name, part in files.parts.items() if name != "latent_scale"}
    theirs, own = (spec.get("latent_scale") for spec in (files.spec, plan.spec))
    if theirs and own and theirs != own:
        stds = f"{theirs['std']}, this run's are by {own['std']}"
        distributed.say(f"init_from={source}: its latents were divided by {stds}")
    kinds = [[node["_target_"] for node in spec.get("conditioners", {}).values()] for spec in (files.spec, plan.spec)]
    if "conditioner" in parts and kinds[0] != kinds[1]:
        del parts["conditioner"]
        distributed.say(f"init_from={source}: its conditioners are of another kind; they start from random weights")
    if "conditioner" in parts:
        check_towers(config, plan.stage.diffusion.conditioners, parts["conditioner"])  # type: ignore[arg-type, union-attr]
    loss = plan.stage.saved().get("loss")
    if loss is not None and "loss" in parts and parts["loss"].keys() != loss.state_dict().keys():
        del parts["loss"]
        distributed.say(f"init_from={source}: its loss is of another kind; adversary and log-variance start afresh")
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


def _fit(run: RunFolder, config: Config, plan: Plan, settings: TrainerSettings, data: ShardData, command: str) -> None:
    rank, world = distributed.rank(), distributed.world_size()
    callbacks = checked("callbacks", _callbacks(config, plan, data))
    loggers = [(f"logger.{name}", node) for name, node in _by_name(config, "logger") if node]
    record, notes = data_record(data, plan.reads)  # a fault is refused now, not at the first validation
    for note in notes:
        distributed.say(note)
    batches = Batches(
        lambda position: data.train_loader(
            settings.micro_batch, settings.accumulate, world, rank, position, plan.reads, batches.by_shard
        ),
        lambda: data.eval_loader("val", settings.micro_batch, world, rank, kind=plan.reads),
        data.manifest("train", plan.reads).hash,
    )
    fit(
        plan.stage,
        batches,
        run=run,
        settings=settings,
        callbacks=callbacks,
        loggers=checked("logger", [(where, instantiate(node, where=where)) for where, node in loggers]),
        resume_command=command,
        record=Record(
            config, plan.spec, {n: fingerprint(m.state_dict()) for n, m in plan.frozen.items()} | plan.hashes
        ),
        fields=comparison_fields(plan.spec),
        begin=lambda: _write_start(run, config, plan, record),
    )


def _typed() -> list[str]:
    """The command's own words, without a run folder."""
    return [word for word in sys.argv[1:] if not word.startswith("run.dir=")]


def _by_name(config: Config, group: str) -> Iterable[tuple[str, Any]]:
    """The entries of a group that holds several parts."""
    parts = config[group] or {}
    if not isinstance(parts, Mapping) or "_target_" in parts:
        raise InputError(
            f"{group}: a file of conf/{group}/ holds parts by name, as in `mine: {{_target_: PKG.CLASS}}`."
        )
    return parts.items()


def _callbacks(config: Config, plan: Plan, data: ShardData) -> list[tuple[str, Any]]:
    """The callbacks; one that scores images gets its scorer."""
    from ldmlab.app.evaluate import scores_callback  # with the scores and their networks

    made = []
    for name, node in _by_name(config, "callbacks"):
        where = f"callbacks.{name}"
        if node:
            if accepts(node, "scorer", where=where):
                made.append((where, scores_callback(node, plan, data)))
                continue
            made.append((where, instantiate_with(node, where=where, flops=StepFlops(_COUNT, config))))
    return made


def stage_options(config: Config, settings: TrainerSettings) -> dict[str, Any]:
    """The arguments that every stage takes, and those of conf/stage."""
    images = settings.micro_batch * settings.accumulate * distributed.world_size()
    return {
        "seed": config["seed"],
        "optimizer": instantiate_with(config["optimizer"], where="optimizer", global_batch=images),
        "lr_schedule": _lr_schedule(config["lr_schedule"], settings.max_steps),
        "max_steps": settings.max_steps,
        "accumulate": settings.accumulate,
        "gradient_clip": settings.gradient_clip,
        "skip_nonfinite": settings.skip_nonfinite,
        "averaging_decay": settings.averaging_decay,
        "averaging_warmup": settings.averaging_warmup,
        "averaging_start": settings.averaging_start,
        **{name: value for name, value in config["stage"].items() if name != "name"},
    }


def _lr_schedule(node: Config, max_steps: int) -> Callable[[int], float]:
    """The factor of the learning rate by step; torch's schedulers are no such function."""
    schedule: Callable[[int], float] = instantiate_with(node, where="lr_schedule", max_steps=max_steps)
    try:
        float(schedule(0))
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"lr_schedule._target_={node['_target_']} gives no factor of the learning rate for a step ({error}); "
            "write a class whose __call__(step) returns one."
        ) from error
    return schedule


def _write_start(run: RunFolder, config: Config, plan: Plan, origin: Mapping[str, Any]) -> None:
    """Initial content of the run folder: configuration, description, frozen weights, origin of the data."""
    run.write_config(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    if distributed.rank() == 0:
        (run.path / FINISHED).unlink(missing_ok=True)
        for name, module in plan.frozen.items():
            if module.state_dict() and not (run.path / f"{name}.safetensors").exists():
                save_tensors(run.path / f"{name}.safetensors", module.state_dict())
        if (run.path / DESCRIPTION).exists():
            try:
                read_description(run.path)
            except InputError as error:  # the checkpoints are enough
                distributed.say(f"{error} It is written anew.")
                (run.path / DESCRIPTION).unlink()
        write_description(run.path, plan.spec)
        write_json(run.path / DATA, origin)
    distributed.barrier()
