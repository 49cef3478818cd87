"""Options of a wrong type or value, and options changed when a run goes on."""

from pathlib import Path

from faults.base import COMMANDS, digest, said, tree_hash
from faults.cases import Case, last_lines
from faults.commands import Result

DENOISER = COMMANDS["denoiser"]

TYPED = {  # option => values of a wrong type or beyond any sense
    "seed": ("null", "1.5", "x", "-1", "[1]", "1e3", "true"),
    "trainer.max_steps": ("null", "4.5", "0", "-3", "many", "1e0", "[3]", "{}"),
    "trainer.micro_batch": ("0", "-1", "2.5", "null", "x"),
    "trainer.global_batch": ("0", "-1", "2.5", "x", "7"),
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
        case.classify(result, "denoiser")
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


KINDS = {"options: wrong types": wrong_options, "options: changed on resume": changed_options}
