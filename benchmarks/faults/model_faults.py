"""Faults in models: model.yaml, weights, checkpoints, pickles, run folders."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from faults import plant
from faults.base import COMMANDS
from faults.cases import Case

SAMPLE = COMMANDS["sample"]


def description(case: Case) -> None:
    """model.yaml of a model folder from a stranger."""
    case.copy("model")
    case.outcome.planted = plant.edit_yaml(case.work / "model" / "model.yaml", case.rng, case.canary)
    case.classify(case.run(SAMPLE, seconds=60.0), "sample")


def weights(case: Case) -> None:
    """A .safetensors file of a model folder damaged, exchanged or of other tensors."""
    case.copy("model", "first_stage")
    path = case.rng.choice(sorted((case.work / "model").glob("*.safetensors")))
    kind = case.rng.random()
    if kind < 0.45:
        what = plant.flip(path, case.rng)
    elif kind < 0.75:
        what = plant.any_bytes(path, case.rng)
    else:
        what = _other_tensors(case, path)
    case.outcome.planted = what
    case.classify(case.run(SAMPLE), "sample")


def _other_tensors(case: Case, path: Path) -> str:
    tensors = load_file(path)
    name = case.rng.choice(sorted(tensors))
    kind = case.rng.choice(("another", "missing", "more", "shape", "half", "nan", "renamed"))
    if kind == "another":
        tensors = {key: torch.randn_like(value) * 0.1 for key, value in tensors.items()}
    elif kind == "missing":
        del tensors[name]
    elif kind == "more":
        tensors["more.weight"] = torch.ones(2)
    elif kind == "shape":
        tensors[name] = torch.ones(3)
    elif kind == "half":
        tensors = {key: value.half() for key, value in tensors.items()}
    elif kind == "nan":
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    else:
        tensors[f"module.{name}"] = tensors.pop(name)
    save_file(tensors, path)
    return f"{path.name}: tensors {kind}"


def checkpoint(case: Case) -> None:
    """The newest checkpoint of a run that is to go on, damaged in bytes or in content."""
    case.copy("packed", "latents", "denoiser")
    run = case.work / "denoiser"
    _unfinished(run)
    path = sorted((run / "checkpoints").glob("step_*.ckpt"))[-1]
    if case.rng.random() < 0.6:
        case.outcome.planted = plant.any_bytes(path, case.rng)
    else:
        case.outcome.planted = _other_content(case, path)
    if case.rng.random() < 0.3 and path.exists():  # without it, the one before is the model
        case.classify(case.run(["sample", *["denoiser" if w == "model" else w for w in SAMPLE[1:]]]), "sample")
    else:
        case.classify(case.run(COMMANDS["denoiser"]), "denoiser")


def _unfinished(run: Path) -> None:
    """The run as a kill after its last checkpoint but one leaves it: the same command goes on from there."""
    (run / "finished.json").unlink(missing_ok=True)


def _other_content(case: Case, path: Path) -> str:
    content = torch.load(path, map_location="cpu", weights_only=True)
    kind = case.rng.choice(("missing", "value", "tensor", "nested", "code"))
    key = case.rng.choice(sorted(content))
    if kind == "missing":
        del content[key]
    elif kind == "value":
        content[key] = case.rng.choice([None, 3, "text", [], {}, torch.ones(2)])
    elif kind == "tensor":
        state = content["modules"][case.rng.choice(sorted(content["modules"]))]
        name = case.rng.choice(sorted(state))
        state[name] = case.rng.choice((state[name][..., :1], state[name].double(), state[name][None]))
        key = f"modules {name}"
    elif kind == "nested" and isinstance(content[key], dict) and content[key]:
        inner = case.rng.choice(sorted(content[key], key=str))
        del content[key][inner]
        key = f"{key}.{inner}"
    elif kind == "code":
        content[key] = plant.touching(case.canary)
    torch.save(content, path)
    return f"{path.name}: {key} {kind}"


def pickles(case: Case) -> None:
    """A file that runs code when it is unpickled, wherever a file is read."""
    case.copy("packed", "latents", "denoiser", "model")
    payload, rng = plant.touching(case.canary), case.rng
    path = case.work / "evil.ckpt"
    wrapped = rng.choice(
        [
            payload,
            {"state_dict": payload},
            {"state_dict": {"w": payload}},
            {"w": torch.ones(2), "x": payload},
            [payload],
        ]
    )
    how = rng.choice(("torch", "torch old", "pickle", "npy", "zip"))
    if how == "npy":
        np.save(case.work / "evil.npy", np.array([payload], dtype=object), allow_pickle=True)
        (case.work / "evil.npy").rename(path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(wrapped, protocol=rng.randrange(6)))
    else:
        torch.save(wrapped, path, _use_new_zipfile_serialization=how != "torch old")
    where = rng.choice(
        ("import", "import pt", "import diffusers", "resume", "sample", "safetensors", "sample ckpt", "npy shard")
    )
    case.outcome.planted = f"{how} read by {where}"
    argv = _placed(case, path, where)
    case.classify(case.run(argv), "sample", same=lambda: False)


def _placed(case: Case, path: Path, where: str) -> list[str]:
    """The pickle where a command reads it, and the command."""
    work = case.work
    if where.startswith("import"):
        target = path.rename(work / ("evil.pt" if where.endswith("pt") else "evil.ckpt"))
        if where.endswith("diffusers"):
            (work / "unet").mkdir()
            (work / "unet" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
            target.rename(work / "unet" / "diffusion_pytorch_model.bin")
            return ["import", "unet", "imported"]
        return ["import", target.name, "imported"]
    if where == "safetensors":
        path.rename(work / "model" / "denoiser.safetensors")
        return SAMPLE
    if where == "npy shard":
        shard = sorted((work / "latents" / "train").glob("*.tar"))[0]
        content = plant.members(shard)
        index = next(i for i, (item, _) in enumerate(content) if item.name.endswith(".npy"))
        content[index] = (content[index][0], path.read_bytes())
        plant.write_tar(shard, content)
        shutil.rmtree(work / "denoiser")
        return COMMANDS["denoiser"]
    newest = sorted((work / "denoiser" / "checkpoints").glob("step_*.ckpt"))
    for file in newest:
        shutil.copy(path, file)
    _unfinished(work / "denoiser")
    if where == "resume":
        return COMMANDS["denoiser"]
    model = "denoiser" if where == "sample" else f"denoiser/checkpoints/{newest[-1].name}"
    return ["sample", model, *SAMPLE[2:]]


def run_folder(case: Case) -> None:
    """Files of a run folder damaged, then the run goes on, or is sampled from."""
    case.copy("packed", "latents", "denoiser")
    run = case.work / "denoiser"
    _unfinished(run)
    resumed = case.rng.random() < 0.7
    if resumed and case.rng.random() < 0.5:
        for path in (run / "checkpoints").glob("*00000009*"):
            path.unlink()
    name = case.rng.choice(("provenance.json", "metrics.csv", "config.yaml", "model.yaml", "first_stage.safetensors"))
    path = run / name
    kind = case.rng.random()
    if name == "provenance.json" and kind < 0.5:
        what = plant.edit_json(path, lambda content: plant.wrong_value(content, case.rng))
    elif name == "model.yaml" and kind < 0.6:
        what = plant.edit_yaml(path, case.rng, case.canary)
    elif name == "config.yaml" and kind < 0.7:
        what = _config(case, path)
    elif name == "metrics.csv" and kind < 0.5:
        what = _metrics(case, path)
    else:
        what = plant.any_bytes(path, case.rng)
    case.outcome.planted = what
    if resumed:
        case.classify(case.run(COMMANDS["denoiser"], seconds=90.0), "denoiser")
    else:
        case.classify(case.run(["sample", "denoiser", *SAMPLE[2:]], seconds=60.0), "sample")


def _config(case: Case, path: Path) -> str:
    import yaml

    content = yaml.safe_load(path.read_text())
    if case.rng.random() < 0.5:
        what = plant.wrong_value(content, case.rng)
    else:
        node = case.rng.choice(plant.hostile_targets(case.canary, case.outside))
        key = case.rng.choice(sorted(content))
        content[key] = node
        what = f"{key} is {node['_target_']}"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return f"config.yaml: {what}"


def _metrics(case: Case, path: Path) -> str:
    text = path.read_text()
    kind = case.rng.choice(("no step", "latin", "empty", "half a row", "other columns", "binary"))
    made = {
        "no step": text.replace("step,", "stap,", 1),
        "empty": "",
        "half a row": text[: -len(text) // 4],
        "other columns": "a,b\n1,2\n",
    }
    path.write_bytes(made[kind].encode() if kind in made else text.encode() + b"\xe9\xff\0")
    return f"metrics.csv: {kind}"


KINDS = {
    "models: model.yaml": description,
    "models: safetensors": weights,
    "models: checkpoints": checkpoint,
    "models: pickles": pickles,
    "models: run folder": run_folder,
}
