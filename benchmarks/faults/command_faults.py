"""Options of a wrong type or value to the commands beside training, and a user's own yaml with a fault in it."""

from pathlib import Path
from typing import Any

from faults import plant
from faults.base import COMMANDS
from faults.cases import GOOD, Case, last_lines
from faults.disk_faults import NEEDS
from faults.option_faults import DENOISER

ROOT = Path(__file__).resolve().parents[2]
COUNT = ("0", "-1", "1.5", "x")
NUMBER = ("nan", "inf", "-1", "x")
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {  # of each command, with values of a wrong type or beyond any sense
    "evaluate": {
        "batch_size": (*COUNT, "null", "true"),
        "device": ("gpu", "tpu", "3", "cuda"),
        "precision": ("16", "bf16", "null", "true"),
        "seed": ("x", "1.5", "null", "-1"),
        "weights": ("x", "null", "3"),
        "protocol.reference": ("x", "null", "3"),
        "protocol.reference_limit": COUNT,
        "protocol.shown": ("-1", "1.5", "x", "null"),
        "protocol.metrics.kid.subset_size": ("0", "-1", "x", "1.5", "1000"),
        "protocol.metrics.kid.at_most": (*COUNT, "null"),
        "features": ("nothing", "3", "null"),
        "features.run": ("nowhere", "null", "denoiser", "packed", "3"),
        "model": ("nowhere", "null", "[a]", "packed", "images", "''"),
        "images": ("3", "[a]", "[[1,2,3]]", "[[a,nowhere.png]]", "null"),
        "out": ("''", "3"),
        "data": ("nothing", "3"),
        "keep_reference": ("3", "x", "null"),
        "wandb": ("x", "3"),
        "plugins": ("3", "[nothing_there]", "[3]", "nothing_there"),
        "guiders": ("nothing", "[classifier]"),
    },
    "encode": {
        "batch_size": (*COUNT, "null"),
        "dtype": ("float8", "x", "null", "16"),
        "mirror": ("x", "3"),
        "carry_images": ("x", "3"),
        "device": ("tpu", "3", "cuda"),
        "weights": ("x", "null"),
        "max_bad": ("2", "-1", "nan", "x", "null"),
        "seed": ("x", "-1", "1.5", "null"),
        "splits": ("[]", "[nothing]", "3", "x", "null"),
        "from_run": ("nowhere", "null", "packed", "''", "3", "[a]"),
        "out": ("null", "''", "packed"),
        "data.image_size": ("0", "-16", "17.5", "17", "x", "100000000"),
        "data.workers": ("-1", "1.5", "x", "null"),
        "data": ("nothing", "3", "null"),
    },
    "sample": {
        "--steps": (*COUNT, "100000", "nan"),
        "--guidance-scale": ("nan", "x", "inf"),
        "--eta": ("-1", "nan", "x", "5"),
        "--seed": ("x", "-1", "1.5", "1e30"),
        "--size": ("0", "x", "17", "-16", "16x", "16x0", "1000000", "16x16x16"),
        "--sampler": ("x", "3", "os.system", "nothing.There"),
        "--spacing": ("x", "3"),
        "--temperature": NUMBER,
        "--count": COUNT,
        "--batch-size": COUNT,
        "--weights": ("x",),
        "--device": ("tpu", "cuda", "3"),
        "--precision": ("16", "x"),
        "--first-index": ("-1", "x", "1.5"),
        "--tile": ("-1", "x", "1.5"),
        "--window": ("-1", "x", "1.5", "7"),
        "--strength": NUMBER,
        "--repeats": COUNT,
        "--classifier": ("nowhere", "packed", "model"),
        "--guider": ("nothing", "3", "os.system"),
        "--task": ("x",),
        "--from": ("nowhere.png", "packed", "model/model.yaml"),
        "--mask": ("nowhere.png", "alpha"),
        "--prompts": ("nowhere.txt", "model", "model/model.yaml"),
        "--sweep": ("x", "nothing=1,2", "eta", "steps=x"),
        "--plugins": ("nothing_there", "os,,", "3"),
        "--stepz": ("4",),
        "1": ("nowhere", "packed", "images", "model/model.yaml", ""),  # a positional word
        "2": ("x", "99", "-3", "1.5", "", "nan"),
    },
    "export": {
        "--format": ("x", "3", "onnx"),
        "--weights": ("x", "both"),
        "--plugins": ("nothing_there",),
        "1": ("nowhere", "packed", "denoiser/config.yaml", ""),
        "2": ("", "denoiser", "denoiser/config.yaml"),
    },
    "pack": {
        "--size": (*COUNT, "100000000"),
        "--val": ("2", "-1", "nan", "x", "1"),
        "--val-least": ("-1", "x", "1.5"),
        "--shard-size": COUNT,
        "--workers": ("-1", "x", "1.5"),
        "--max-bad": ("2", "-1", "nan", "x"),
        "--quality": ("0", "101", "x"),
        "--crop": ("x",),
        "--format": ("x", "gif"),
        "--background": ("x", "1,2", "300,0,0", "#12"),
        "--layout": ("x", "captions", "tars"),
        "--class-field": ("nothing",),
        "--caption-field": ("nothing",),
        "--file-field": ("nothing", "caption"),
        "--group": ("nothing",),
        "--group-strip": ("[", "(", "*"),
        "--stratify": ("nothing",),
        "--seed": ("x", "1.5"),
        "--min-side": ("-1", "x", "1000000"),
        "--list": ("nowhere.txt", "images"),
        "--annotations": ("nowhere.json", "images/metadata.jsonl"),
        "--masks": ("nowhere",),
        "--split": ("", "a/b", "..", "val"),
        "1": ("nowhere", "", "images/000.png"),
        "2": ("", "images", "images/000.png"),
    },
}
MAKES = {"evaluate": "evaluated", "encode": "latents", "sample": "samples", "export": "model", "pack": "packed"}


def wrong_options(case: Case) -> None:
    """One sentence that names the option or its value, and nothing is left; or the same as without it."""
    name = case.rng.choice(sorted(OPTIONS))
    case.copy(*NEEDS[name])
    option = case.rng.choice(sorted(OPTIONS[name]))
    value = case.rng.choice(OPTIONS[name][option])
    argv, word = list(COMMANDS[name]), f"{option}={value}"
    if option.isdigit():
        argv[int(option)] = value
        word = value
    else:
        argv = [known for known in argv if not known.startswith(f"{option}=")] + [word]
    case.outcome.planted = f"{name}: {' '.join(argv[1:4]) if option.isdigit() else word}"
    result = case.run(argv)
    made = case.work / MAKES[name]
    if case.outcome.how not in GOOD:
        return
    if result.code == 0 or not result.sentence:
        case.classify(result, name)
    elif not any(text and text in result.sentence for text in (option.lstrip("-"), word, value)) and value:
        case.set("silent", f"the sentence does not name {option}: {result.sentence}")
    elif made.exists() and MAKES[name] not in NEEDS[name]:
        case.set("silent", f"refused, but {made.name} is left: {result.sentence}")
    else:
        case.set("named", result.sentence)


# ---- a user's own yaml and package ----

PACKAGE = """import torch
from ldmlab.backbones.unet import UNet
from ldmlab.training.optim import AdamW

class Net(UNet):
    pass

class Raises(UNet):
    def __init__(self, *args, **kwargs):
        raise ValueError("the widths of this net must be even")

class Empty:
    pass

class Other(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()

def function(**options):
    return None

value = 3
"""
GROUPS = {  # file => the shipped one that it is like, its class
    "backbone": ("backbone/unet_demo.yaml", "own_lab.Net"),
    "optimizer": ("optimizer/adamw.yaml", "ldmlab.training.optim.AdamW"),
    "lr_schedule": ("lr_schedule/cosine.yaml", "ldmlab.training.optim.Cosine"),
    "callbacks": ("callbacks/default.yaml", ""),
    "conditioner": ("conditioner/class_label.yaml", "ldmlab.conditioners.class_label.ClassEmbedder"),
}
TARGETS = (
    *("own_lab.Nett", "own_lab", "own_labb.Net", "own_lab.value", "own_lab.function", "own_lab.Empty", "own_lab.Other"),
    *(
        "own_lab.Raises",
        "own_lab.broken.Net",
        "own_lab.needs.Net",
        "own_lab.torch.nn.Linear",
        "Net",
        ".",
        "",
        "own_lab.",
    ),
    *(3, None, ["own_lab.Net"], {"a": "own_lab.Net"}, "own lab.Net", "own_lab.Net()", "own_lab:Net", "../own_lab.Net"),
)
TEXTS = {  # appended to a file, or put over it
    "an unknown name": "nothing_like_it: 3\n",
    "an interpolation to nothing": "more: ${nothing.there}\n",
    "a variable that is not set": "more: ${oc.env:NOT_SET_ANYWHERE}\n",
    "an unknown resolver": "more: ${nothing:3}\n",
    "an open brace": "more: ${\n",
    "a tab": "\tmore: 3\n",
    "an open bracket": "more: [1, 2\n",
    "a tag": "more: !!python/name:os.system\n",
    "a missing value": "more: ???\n",
    "_partial_": "_partial_: x\n",
    "_args_": "_args_: 3\n",
    "_convert_": "_convert_: x\n",
    "_recursive_": "_recursive_: 5\n",
    "a list": "- 1\n- 2\n",
    "a number for a name": "3: 4\n",
    "an anchor": "more: *nothing\n",
}


def own_yaml(case: Case) -> None:
    """A group file of a user's own, found by --config-dir, with a fault in it: one sentence, and no run folder."""
    case.copy("packed", "latents")
    group = case.rng.choice(sorted(GROUPS))
    path = _own_group(case, group)
    words = [word for word in DENOISER if not word.startswith(f"{group}=")]
    argv = [*words[:1], "--config-dir", "own", *words[1:], f"{group}=mine"]
    case.outcome.planted = f"{group}: {_fault(case, path)}"
    result = case.run(argv)
    if case.outcome.how not in GOOD:
        return
    case.classify(result, "denoiser")
    if result.code and (case.work / "denoiser").exists():
        case.set("silent", f"refused, but a run folder is left: {result.sentence or last_lines(result)}")


def _own_group(case: Case, group: str) -> Path:
    package, path = case.work / "own_lab", case.work / "own" / group / "mine.yaml"
    package.mkdir()
    (package / "__init__.py").write_text(PACKAGE)
    (package / "broken.py").write_text("class Net(:\n")
    (package / "needs.py").write_text("import a_package_that_is_not_here\n")
    path.parent.mkdir(parents=True)
    shipped, target = GROUPS[group]
    text = (ROOT / "conf" / shipped).read_text()
    path.write_text(text.replace("_target_: ldmlab.backbones.unet.UNet", f"_target_: {target}"))
    return path


def _fault(case: Case, path: Path) -> str:
    import yaml

    rng, kind = case.rng, case.rng.random()
    if kind < 0.3:
        name = rng.choice(sorted(TEXTS))
        path.write_text(path.read_text() * (name != "a list") + TEXTS[name])
        return name
    if kind < 0.4:
        what = plant.json_text(path, rng) if rng.random() < 0.5 else plant.any_bytes(path, rng)
        return f"the file: {what}"
    if kind < 0.5:
        names = rng.choice(
            (["nothing_there"], ["mine"], "x", [3], [{"override /nothing": "x"}], [{"/data": "nothing"}], None)
        )
        header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("# @package"))
        content = yaml.safe_load(path.read_text()) | {"defaults": names}
        path.write_text(header + yaml.safe_dump(content, sort_keys=False))
        return f"defaults are {names}"
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("# @package"))
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    nodes = [node for node in [content, *content.values()] if isinstance(node, dict) and "_target_" in node] or [
        content
    ]
    node = rng.choice(nodes)
    if kind < 0.75:
        node["_target_"] = rng.choice(TARGETS)
        what = f"_target_ is {node['_target_']!r}"
    elif kind < 0.8:
        what = "_target_ is missing" if node.pop("_target_", None) else "nothing"
    else:
        what = plant.wrong_type(node, rng)
    path.write_text(header + yaml.safe_dump(content, sort_keys=False))
    return what


KINDS = {"options: other commands": wrong_options, "options: yaml of one's own": own_yaml}
