"""Faults of jobs: kills at any moment, full disks, wrong options, changed options on resume, launch environments."""

import csv
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from faults.base import COMMANDS, MADE, digest, said, tree_hash
from faults.cases import Case, last_lines
from faults.commands import Result

DENOISER, FIRST_STAGE = COMMANDS["denoiser"], COMMANDS["first_stage"]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


# ---- kills ----


def kill_and_resume(case: Case) -> None:
    """A training job killed once or twice at random moments, then run to its end: bit for bit the one without kills."""
    name = case.rng.choice(("denoiser", "first_stage"))
    case.copy(*(("packed", "latents") if name == "denoiser" else ("packed",)))
    workers = case.rng.choice((0, 0, 2))
    argv = [word.replace("data.workers=0", f"data.workers={workers}") for word in COMMANDS[name]]
    run, told = case.work / MADE[name], []
    usual = case.base.results[name].seconds
    for _ in range(case.rng.choice((1, 1, 2))):
        number = case.rng.choice(SIGNALS)
        moment, what = _moment(case.rng, run, usual)
        told.append(f"{signal.Signals(number).name} {what}")
        result = case.run(argv, kill=_killer(number, moment))
        if result.code is not None and result.code > 0 and result.code < 128 and not result.sentence:
            case.set("traceback", f"killed by {number}: {last_lines(result)}")
    case.outcome.planted = f"{name}, {workers} workers, {', '.join(told)}"
    result = case.run(argv)
    if case.outcome.how != "harmless":
        return
    if result.code != 0:
        case.set("silent", f"does not go on: {result.sentence or last_lines(result)}")
    elif digest(name, case.work) != case.base.digests[name]:
        case.set("silent", "the last checkpoint differs from that of the run without kills")
    elif _rows(run) != _rows(case.base.root / MADE[name]):
        case.set("silent", "metrics.csv has other rows than that of the run without kills")
    elif left := [path.name for path in run.rglob("*.part")]:
        case.set("silent", f"{left[0]} is left")


def _moment(rng: random.Random, run: Path, usual: float) -> tuple[Callable[[], bool], str]:
    """When to kill: a time after the start, a row of metrics, a checkpoint being written."""
    kind = rng.choice(("time", "rows", "part", "checkpoint"))
    if kind == "time":
        delay = rng.uniform(0, 1.2 * usual)
        end = time.monotonic() + delay
        return (lambda: time.monotonic() > end), f"after {delay:.2f} s"
    if kind == "rows":
        rows = rng.randrange(1, 10)
        return (lambda: _lines(run / "metrics.csv") > rows), f"after row {rows}"
    if kind == "part":
        return (lambda: any((run / "checkpoints").glob(".*.part"))), "while a checkpoint is written"
    step = rng.choice((3, 6))
    return (lambda: (run / "checkpoints" / f"step_{step:08d}.ckpt").exists()), f"after the checkpoint of step {step}"


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0


def _killer(number: int, moment: Callable[[], bool]) -> Callable[[int], None]:
    def kill(pid: int) -> None:
        while not moment():
            os.kill(pid, 0)
            time.sleep(0.001)
        os.kill(pid, number)

    return kill


def _rows(run: Path) -> list[dict[str, str]]:
    """metrics.csv without times."""
    with open(run / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        {key: value for key, value in row.items() if not key.startswith(("speed/", "time", "memory"))} for row in rows
    ]


# ---- disks ----


def full_disk(case: Case) -> None:
    """No file may be larger than a limit; with room again, the same command ends as if nothing had been."""
    name = case.rng.choice(("pack", "first_stage", "encode", "denoiser", "export", "sample"))
    needs = {"pack": ["images"], "first_stage": ["packed"], "encode": ["packed", "first_stage"]}
    needs |= {"denoiser": ["packed", "latents"], "export": ["denoiser"], "sample": ["model"]}
    case.copy(*needs[name])
    size = int(2 ** case.rng.uniform(12, 22))  # what is printed goes to files too
    case.outcome.planted = f"{name} with files of at most {size} bytes"
    result = case.run(COMMANDS[name], file_bytes=size)
    if case.outcome.how != "harmless":
        return
    if result.code != 0 and not result.sentence:
        case.set("traceback", last_lines(result))
        return
    again = case.run(COMMANDS[name])
    if result.code == 0:
        case.judge(again if name in ("denoiser", "first_stage") else result, name)
    elif again.code != 0:
        case.set("silent", f"cannot be run again: {again.sentence or last_lines(again)}")
    elif case.outcome.how == "harmless" and digest(name, case.work) != case.base.digests[name]:
        case.set("silent", "run again, it ends with another result")
    else:
        case.set("named", result.sentence)


def read_only(case: Case) -> None:
    """A place where nothing can be made: a file in the way, a path too long, a device."""
    name = case.rng.choice(("pack", "encode", "export", "first_stage"))
    case.copy("images", "packed", "first_stage", "denoiser")
    (case.work / "a file").write_text("x")
    target = case.rng.choice(("a file/out", "a file", "x" * 300, "/proc/out", "/dev/null", "/dev/full/out"))
    option = {"first_stage": "run.dir", "encode": "out"}.get(name)
    argv = list(COMMANDS[name])
    if option:
        argv = [word for word in argv if not word.startswith(f"{option}=")] + [f"{option}='{target}'"]
    else:
        argv[2] = target
    case.outcome.planted = f"{name} to {target[:20]!r}"
    case.judge(case.run(argv), name, same=lambda: False)


# ---- options ----

TYPED = {  # option => values of a wrong type or beyond any sense
    "seed": ("null", "1.5", "x", "-1", "[1]", "1e3", "true"),
    "trainer.max_steps": ("null", "4.5", "0", "-3", "many", "1e0", "[3]", "{}"),
    "trainer.micro_batch": ("0", "-1", "2.5", "null", "x"),
    "trainer.checkpoint_every": ("0", "-1", "1.5", "x", "null"),
    "trainer.log_every": ("0", "x", "0.5"),
    "trainer.validate_every": ("x", "-2", "1.5"),
    "trainer.precision": ("16", "float32", "null", "3", "true"),
    "trainer.gradient_clip": ("nan", "-1", "x", "inf", "[1]"),
    "trainer.averaging_decay": ("2", "-0.1", "nan", "x"),
    "trainer.accelerator": ("gpu", "tpu", "x", "3"),
    "optimizer.learning_rate": ("nan", "inf", "-1", "x", "null", "[1]", "'1e-4'"),
    "optimizer.betas": ("[2,3]", "0.9", "[0.9]", "[0.9,nan]", "x", "null"),
    "optimizer.weight_decay": ("nan", "-1", "x"),
    "data.workers": ("null", "-1", "1.5", "x"),
    "data.image_size": ("0", "-16", "17.5", "x", "null", "100000000"),
    "data.mix": ("0", "-1", "x"),
    "data.fields": ("caption", "3", "[nothing_there]", "[3]", "null"),
    "data.train": ("nowhere", "a=b", "null", "3", "''", "packed/train/manifest.json", "s3:/bucket/train"),
    "backbone.model_channels": ("0", "-32", "33", "x", "null", "3.5", "100000000"),
    "backbone.channel_mult": ("[]", "3", "[0]", "[x]", "null"),
    "backbone.heads": ("0", "3", "x", "-4"),
    "diffusion.schedule.steps": ("0", "-1", "1.5", "x"),
    "diffusion.schedule.start": ("nan", "-1", "2", "x"),
    "stage.latent_scale": ("0", "nan", "x", "-1", "[1]"),
    "stage.panel_steps": ("0", "x", "7", "-1"),
    "conditioner.class_label.drop": ("2", "-1", "nan", "x"),
    "conditioner.class_label.classes": ("0", "1", "x", "2.5"),
    "run.name": ("1e3", "null", "[a]", "a/b", "../x"),
    "sampler": ("3", "nothing", "[ddim]"),
    "backbone": ("nothing", "3", "null"),
    "logger": ("nothing", "3"),
}
WORDS = (
    "train=3",
    "+trainer.max_steps=3",
    "trainer.max_step=3",
    "~seed",
    "seed",
    "seed=",
    "=3",
    "a=b=c",
    "data.train=a,b",
    "{",
    "-x",
)


def wrong_options(case: Case) -> None:
    """A training command with an option of a wrong type or value: one sentence that names it, and no run folder."""
    case.copy("packed", "latents")
    if case.rng.random() < 0.85:
        option = case.rng.choice(sorted(TYPED))
        value = case.rng.choice(TYPED[option])
        word = f"{option}={value}"
    else:
        option, word = "", case.rng.choice(WORDS)
    case.outcome.planted = word
    argv = [*(known for known in DENOISER if not known.startswith(f"{option}=")), word]
    result = case.run(argv)
    if case.outcome.how != "harmless":
        return
    if result.code == 0:
        if word in HARMLESS:
            return
        case.judge(result, "denoiser")
    elif not result.sentence:
        case.set("traceback", last_lines(result))
    elif option and option not in result.sentence and word not in result.sentence and value not in result.sentence:
        case.set("silent", f"the sentence does not name {option}: {result.sentence}")
    elif (case.work / "denoiser").exists():
        case.set("silent", f"refused, but a run folder is left: {result.sentence}")
    else:
        case.set("named", result.sentence)


HARMLESS = {"trainer.validate_every=-2", "run.name=a/b", "run.name=../x", "run.name=[a]", "run.name=1e3", "seed=true"}

CHANGED = {  # what is changed when the command of a run that stopped at step 6, or is finished, is given again
    "optimizer.learning_rate": ("1e-2", "1e-5"),
    "optimizer.betas": ("[0.5,0.9]",),
    "optimizer.weight_decay": ("0.5",),
    "lr_schedule.warmup_steps": ("1", "900"),
    "seed": ("1",),
    "trainer.micro_batch": ("3", "4", "12"),
    "trainer.gradient_clip": ("0.001",),
    "trainer.averaging_decay": ("0.5",),
    "trainer.max_steps": ("12", "8"),
    "trainer.checkpoint_every": ("2",),
    "trainer.precision": ("bf16-mixed",),
    "diffusion": ("cosine", "v_prediction"),
    "diffusion.loss": ("l1",),
    "diffusion.schedule.end": ("0.02",),
    "stage.latent_scale": ("0.18215", "measured"),
    "backbone.model_channels": ("64",),
    "backbone.channel_mult": ("[1,1]",),
    "backbone.dropout": ("0.5",),
    "backbone.scale_shift": ("true",),
    "conditioner.class_label.drop": ("0.9",),
    "conditioner.class_label.width": ("32",),
    "conditioner": ("none",),
    "data.mix": ("1",),
    "data.balance": ("class_id",),
    "data.flip": ("true",),
    "data.latents": ("null",),
    "init_from": ("model",),
    "first_stage": ("vq_f4",),
}


def changed_options(case: Case) -> None:
    """A run goes on with another option: applied and said, or refused with the folder byte for byte as it was."""
    case.copy("packed", "latents", "denoiser", "model")
    run = case.work / "denoiser"
    if case.rng.random() < 0.6:
        _back_to_step_6(run)
    option = case.rng.choice(sorted(CHANGED))
    word = f"{option}={case.rng.choice(CHANGED[option])}"
    finished = (run / "finished.json").exists()
    case.outcome.planted = f"{word}, {'finished' if finished else 'stopped at step 6'}"
    before = tree_hash(run)
    argv = [*(known for known in DENOISER if not known.startswith(f"{option}=")), word]
    result = case.run(argv)
    if case.outcome.how != "harmless":
        return
    if result.code != 0:
        _refused(case, result, option, before, tree_hash(run))
        return
    words = (option, option.rpartition(".")[2])
    new = said(result, case.base.results["denoiser"])
    named = any(word in result.text for word in words if word not in case.base.results["denoiser"].text) or bool(new)
    if not named and (digest("denoiser", case.work) != case.base.digests["denoiser"] or not _same_model(before, run)):
        case.set("silent", f"{word} changed the run or its description without a word")
    elif named:
        case.set("said", (new or [word])[0])


def _same_model(before: dict[str, str], run: Path) -> bool:
    return before.get("model.yaml") == tree_hash(run).get("model.yaml")


def _back_to_step_6(run: Path) -> None:
    """As a kill right after the checkpoint of step 6 leaves the folder."""
    (run / "finished.json").unlink(missing_ok=True)
    for path in (run / "checkpoints").glob("*00000009*"):
        path.unlink()


def _refused(case: Case, result: Result, option: str, before: dict[str, str], after: dict[str, str]) -> None:
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if not result.sentence:
        case.set("traceback", last_lines(result))
    elif changed:
        case.set("silent", f"refused, but {changed[0]} of the run was changed: {result.sentence}")
    else:
        case.set("named", result.sentence)


ENVIRONMENTS = [
    {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NAME": "bash"},
    {
        "SLURM_NTASKS": "4",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "interactive",
        "SLURM_PROCID": "0",
        "SLURM_NODEID": "0",
    },
    {"RANK": "0"},
    {"RANK": "0", "WORLD_SIZE": "2"},
    {"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
    {"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "5", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"},
    {"WORLD_SIZE": "two"},
    {"LDMLAB_PLUGINS": "no_such_package"},
    {"LDMLAB_PLUGINS": "os,,"},
    {"CUDA_VISIBLE_DEVICES": "9"},
    {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "LANG": "C"},
    {"COLUMNS": "3", "TERM": "dumb", "NO_COLOR": "1"},
    {"WANDB_MODE": "nonsense"},
    {"HOME": "/nowhere"},
    {"OMP_NUM_THREADS": "x"},
    {"MASTER_PORT": "99999999", "MASTER_ADDR": "nowhere.invalid"},
]


def environments(case: Case) -> None:
    """Variables of launchers, shells and services that are half there or wrong."""
    case.copy("packed", "latents")
    if case.rng.random() < 0.2:
        place = case.folder / "work" / ("t" * case.rng.choice((100, 150, 200)))
        place.mkdir()
        environment, workers = {"TMPDIR": str(place)}, 2
    else:
        environment, workers = case.rng.choice(ENVIRONMENTS), case.rng.choice((0, 0, 2))
    case.outcome.planted = f"{environment}, {workers} workers"
    argv = [word.replace("data.workers=0", f"data.workers={workers}") for word in DENOISER]
    case.judge(case.run(argv, environment=environment, seconds=100.0), "denoiser")


def two_commands(case: Case) -> None:
    """A second command into the folder of a first one that is still at work, or that was killed."""
    name = case.rng.choice(("pack", "encode", "export", "denoiser"))
    needs = {"pack": ["images"], "encode": ["packed", "first_stage"], "export": ["denoiser"]}
    case.copy(*needs.get(name, ["packed", "latents"]))
    if name == "denoiser":
        shutil.rmtree(case.work / "denoiser", ignore_errors=True)
    delay = case.rng.uniform(0, case.base.results[name].seconds)
    case.outcome.planted = f"{name}, the second {delay:.2f} s after the first"

    def beside(pid: int) -> None:
        time.sleep(delay)
        other = case.run(COMMANDS[name])
        how = "traceback" if other.traceback or (other.code and not other.sentence) else "named"
        (case.folder / "run_second").write_text(f"{how}\n{last_lines(other)}")

    first = case.run(COMMANDS[name], kill=beside)
    note = case.folder / "run_second"
    for _ in range(600):  # the second may wait for the first
        if note.exists():
            break
        time.sleep(0.1)
    if note.exists() and note.read_text().startswith("traceback"):
        case.set("traceback", f"the second: {note.read_text()[10:]}")
    case.judge(first, name)


KINDS = {
    "kill and resume, bit for bit": kill_and_resume,
    "disk full": full_disk,
    "disk: no place": read_only,
    "options: wrong types": wrong_options,
    "options: changed on resume": changed_options,
    "jobs: environments": environments,
    "jobs: two commands": two_commands,
}
