"""What a training step costs, from its configuration alone: no weights, no data, no network."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor, nn

from ldmlab.app.conditioning import build_conditioners
from ldmlab.app.plans import backbone_sizes, check_divides, latent_spec, task_node
from ldmlab.app.wiring import stage_options
from ldmlab.data.loaders import collate
from ldmlab.data.order import image_random
from ldmlab.diffusion.latent_space import LatentScale, LatentSpace
from ldmlab.errors import InputError, did_you_mean
from ldmlab.evaluation.step_cost import BACKWARD, IMAGES, StepCost
from ldmlab.instantiate import instantiate, trust_typed
from ldmlab.nn import attention
from ldmlab.nn.lpips import LPIPS
from ldmlab.plugins import allow
from ldmlab.training.settings import TrainerSettings, trainer_node
from ldmlab.training.stage import Stage

Config = Mapping[str, Any]
Parts = dict[str, nn.Module]


@dataclass(frozen=True)
class Estimate:
    """Of one process; memory in bytes."""

    parameters: dict[str, int]  # by module, trained and frozen
    fixed: dict[str, int]  # held all the time, by kind
    step: StepCost

    @property
    def flops(self) -> float:
        """Of training on one image: forward, backward, and what checkpointing computes again."""
        return self.step.flops / self.step.images

    def memory(self, micro_batch: int) -> dict[str, int]:
        """By kind, at the moment at which most is held."""
        return self.fixed | self.step.peak(micro_batch)


def estimate(config: Config, settings: TrainerSettings, step: int | None = None) -> Estimate:
    """Build the stage without weights; run the step after `step` (None: the last) on a batch without values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kind = config["stage"]["name"]
    if kind not in _STAGES:
        raise InputError(f"stage={kind} has no step of its own; plan one of {', '.join(_STAGES)}.")
    options = stage_options(config, settings)
    stage, parts, batch = _STAGES[kind](config, options)
    with FakeTensorMode(allow_non_fake_inputs=True), attention_of_a_gpu():
        filled(stage)
        return measured(stage, parts, batch, settings, step)


@contextmanager
def attention_of_a_gpu() -> Iterator[None]:
    """Inside, attention holds what a GPU's kernels hold: scores only where a GPU would form them."""
    choice = attention.by_products
    attention.by_products = lambda _, *sizes: choice("cuda", *sizes)
    try:
        yield
    finally:
        attention.by_products = choice


def filled(module: nn.Module) -> None:
    """Memory for the weights that were built without, convolutions as on a GPU: channels-last."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, old in table.items():
                if old is None or not old.is_meta:
                    continue
                if id(old) not in made:
                    layout = torch.channels_last if old.ndim == 4 else torch.contiguous_format
                    new = torch.empty(old.shape, dtype=old.dtype, memory_format=layout)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                table[name] = made[id(old)]  # type: ignore[assignment]


def measured(
    stage: Stage, parts: Parts, batch: dict[str, Any], settings: TrainerSettings, step: int | None = None
) -> Estimate:
    """The step of a stage in memory, as the Trainer makes it: gradients are held between micro-batches."""
    groups, held, batch = prepared(stage, batch, settings)
    stage.step = settings.max_steps if step is None else step
    cost = StepCost(parts, held, len(batch["position"]))
    with cost.counting():
        train_step(stage, batch, settings, lambda: cost.owned_by(BACKWARD))
    weights = {name: _bytes(part.parameters()) + _bytes(part.buffers()) for name, part in parts.items()}
    averaged = stage.saved().get(stage.averaged or "") if settings.averaging_decay is not None else None
    fixed = {f"weights of the {name}": size for name, size in weights.items() if size}
    fixed["gradients"] = sum(_bytes(own) for own in groups.values())
    fixed["optimizer"] = sum(round(_bytes(own) * _states(stage.factory(name))) for name, own in groups.items())
    if averaged is not None:
        fixed["averaged weights"] = _bytes(p for p in averaged.parameters() if p.requires_grad)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return Estimate({name: count for name, count in counts.items() if count}, fixed, cost)


def prepared(
    stage: Stage, batch: dict[str, Any], settings: TrainerSettings
) -> tuple[dict[str, list[nn.Parameter]], list[Tensor], dict[str, Any]]:
    """Optimizer groups with gradients, as between two micro-batches; all that is held by then; the batch in memory."""
    groups = stage._groups = stage.groups()
    for parameter in (parameter for own in groups.values() for parameter in own):
        parameter.grad = torch.zeros_like(parameter)
    stage.train()
    stage.step = settings.max_steps
    held = [*stage.parameters(), *stage.buffers(), *(p.grad for p in stage.parameters() if p.grad is not None)]
    copied = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
    return groups, held, copied


def train_step(
    stage: Stage, batch: dict[str, Any], settings: TrainerSettings, backward: Callable[[], Any] = nullcontext
) -> None:
    """Forward and backward pass of every group on one micro-batch, as `Stage.training_step` makes them."""
    for group in filter(stage.active, stage.groups()):
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16-mixed"), stage._only(group):
            total = stage.losses(group, batch).total
            with backward():
                (total / stage.accumulate).backward()


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _states(factory: Any) -> float:
    """Bytes of optimizer state for a byte of weights, by one step on a small matrix with values."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.enable_grad():
        weight = nn.Parameter(torch.ones(64, 64))
        optimizer = factory([weight])
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        states = [v for v in optimizer.state[weight].values() if isinstance(v, Tensor) and v.ndim]
        return _bytes(states) / _bytes([weight])


# ---- the stages, as `plans.py` builds them from data and weights


def _autoencoder(config: Config, options: dict[str, Any]) -> tuple[Stage, Parts, dict[str, Any]]:
    from ldmlab.training.autoencoder_module import AutoencoderStage

    size = config["data"]["image_size"]
    with torch.device("meta"):
        first_stage = instantiate(config["first_stage"], where="first_stage")
        lpips: dict[str, Any] = {"lpips": LPIPS(None)} if config["loss"].get("lpips_weight") else {}
        loss = instantiate(config["loss"], where="loss", **lpips)
    check_divides(size, first_stage.downsampling)
    stage = AutoencoderStage(first_stage=first_stage, loss=loss, **options)
    stage.codebook = None  # counts codes, which have no values
    parts: Parts = {"first stage": first_stage}
    if loss.adversary is not None:
        parts["discriminator"] = loss.adversary
    if getattr(loss, "lpips", None) is not None:
        parts["LPIPS"] = loss.lpips
    return stage, parts, _batch({"image": np.zeros((3, size, size), np.uint8)})


def _clip(config: Config, options: dict[str, Any]) -> tuple[Stage, Parts, dict[str, Any]]:
    from ldmlab.training.clip_module import ClipStage

    size = config["data"]["image_size"]
    with torch.device("meta"):
        model = instantiate(_untrained(config["clip"]), where="clip", image_size=size)
    batch = _batch({"image": np.zeros((3, size, size), np.uint8), "caption": "a caption"})
    return ClipStage(model=model, **options), {"CLIP": model.model}, batch


def _diffusion(config: Config, options: dict[str, Any]) -> tuple[Stage, Parts, dict[str, Any]]:
    from ldmlab.training.diffusion_module import DiffusionStage

    size = config["data"]["image_size"]
    task = instantiate(task_node(config, size), where="task") if config["task"] else None
    first_stage, sample = _latents(config, task)
    latent = latent_spec(first_stage, size)
    given = {name: _untrained(node) for name, node in config["conditioner"].items()}
    with torch.device("meta"):
        conditioners, _ = build_conditioners(given, latent)
        sizes = backbone_sizes(latent, conditioners, config["backbone"], config["diffusion"]["prediction"])
        node = {**config["backbone"], **sizes}
        backbone = instantiate(node, where="backbone")
    for conditioner in conditioners.values():
        if hasattr(getattr(conditioner, "tokenizer", None), "path"):  # of a vocabulary that may not be here
            conditioner.tokenizer = _NoVocabulary(conditioner.tokenizer.length)
    reads = frozenset().union(*(conditioner.reads for conditioner in conditioners.values()))
    sample |= _stored(reads, size) if task is None else task.give(_stored(task.stored, size), image_random(0, 0, ""))
    built = {"first_stage": first_stage, "latent_scale": LatentScale(), "backbone": backbone}
    model = instantiate(config["diffusion"], where="diffusion", conditioners=conditioners, task=task, **built)
    names = ("latent_scale", "panel_steps")
    stage = DiffusionStage(
        diffusion=model,
        sampler=None,  # type: ignore[arg-type]  # draws panels only
        grid=[],
        **{k: v for k, v in options.items() if k not in names},
    )
    parts = {"denoiser": backbone, "conditioners": model.conditioners, "frozen first stage": first_stage}
    return stage, parts, _batch(sample | (_stored(reads, size) | sample))


def _classifier(config: Config, options: dict[str, Any]) -> tuple[Stage, Parts, dict[str, Any]]:
    from ldmlab.training.classifier_module import ClassifierStage

    first_stage, sample = _latents(config, None)
    channels = latent_spec(first_stage, config["data"]["image_size"]).channels
    with torch.device("meta"):
        classifier = instantiate({**config["classifier"], "latent_channels": channels}, where="classifier")
    stage = ClassifierStage(
        space=LatentSpace(first_stage, LatentScale()),
        schedule=instantiate(config["diffusion"]["schedule"], where="diffusion.schedule"),
        classifier=classifier,
        **{name: value for name, value in options.items() if name != "latent_scale"},
    )
    return stage, {"classifier": classifier, "frozen first stage": first_stage}, _batch({**sample, "class_id": 0})


_STAGES = {"autoencoder": _autoencoder, "classifier": _classifier, "clip": _clip, "diffusion": _diffusion}


def _latents(config: Config, task: Any) -> tuple[Any, dict[str, Any]]:
    """The first stage, and what a sample holds of an image: its moments, or the image where it is encoded on the fly.

    Pixels and tasks that cut or change images are trained on images, as is whatever names from_run.
    """
    size = config["data"]["image_size"]
    with torch.device("meta"):
        first_stage = instantiate(config["first_stage"], where="first_stage").eval()
        check_divides(size, first_stage.downsampling)
        if config["from_run"] or not first_stage.state_dict() or (task is not None and "image" in task.needs):
            return first_stage, {"image": np.zeros((3, size, size), np.uint8)}
        with torch.no_grad():
            moments = first_stage.encode(torch.zeros(1, 3, size, size)).moments()
    return first_stage, {"moments": np.zeros(moments.shape[1:], np.float16)}


def _stored(names: frozenset[str], size: int) -> dict[str, Any]:
    """Fields of a sample that conditioners read, or that a task starts from."""
    boxes = [{"class_id": 0, "box": [0.1, 0.1, 0.9, 0.9]}] * 3
    image = np.zeros((3, 2 * size, 2 * size), np.uint8)
    maps = {"mask": image[:1], "segmentation": image[0], "image": image, "boxes": boxes}
    fields = {"caption": "a caption", "class_id": 0, "reference": image[:, :size, :size], "boxes": boxes, **maps}
    return {name: value for name, value in fields.items() if name in {*names, "image"}}


def _untrained(node: Config) -> dict[str, Any]:
    """The node of a published CLIP model by its architecture, without its weights; others as they are."""
    if not isinstance(node.get("name"), str) or "pretrained" not in node:
        return dict(node)
    known = open_clip.get_model_config(node["name"])
    if known is None:
        raise InputError(
            f"{node['name']} is no model of open_clip; {did_you_mean(node['name'], open_clip.list_models())}"
        )
    pixels = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    return {**node, "name": None, "pretrained": None, "config": known | pixels}


class _NoVocabulary:
    """Stands for a tokenizer whose vocabulary is not needed: captions of full length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, captions: list[str]) -> Tensor:
        return torch.zeros(len(captions), self.length, dtype=torch.int64)

    def lost(self, caption: str) -> str:
        """None of it."""
        return ""


def _batch(sample: dict[str, Any]) -> dict[str, Any]:
    rows = [{**sample, "key": str(number), "position": number, "skipped": []} for number in range(IMAGES)]
    return collate(rows, rows[0])


def main() -> None:
    """FLOPs of training on an image, for a configuration and a step on stdin: a process of its own beside a run."""
    given = json.load(sys.stdin)
    allow(given["config"].get("plugins"))
    trust_typed(given["config"])
    config = given["config"]
    config["from_run"] = config["from_run"] or config["data"]["latents"] is None  # images are encoded as they come
    settings = instantiate(trainer_node(config["trainer"]), where="trainer")
    print(estimate(config, settings, given["step"]).flops)


if __name__ == "__main__":
    main()
