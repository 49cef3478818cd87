"""What our conditioners are called in an official configuration, alone and together."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.conditioners.layout import LayoutTokens
from ldmlab.conditioners.low_resolution import LowResolution
from ldmlab.conditioners.mask import Mask
from ldmlab.conditioners.masked_latent import MaskedLatent
from ldmlab.conditioners.semantic import SpatialRescaler
from ldmlab.conditioners.text import OpenClipText
from ldmlab.conditioners.transformer_text import TransformerText
from ldmlab.errors import InputError
from ldmlab.interop.compvis.conditioner_config import arguments, official_config
from ldmlab.interop.compvis.config import LDM_HOLE, LDM_MASK, SD_HOLE, SD_MASK

_USUAL_RATE = 0.1  # of Stability's ClassEmbedder
_READS = {  # class of ours => conditioning_key, cond_stage_key
    ClassEmbedder: ("crossattn", "class_label"),
    TransformerText: ("crossattn", "caption"),
    OpenClipText: ("crossattn", "txt"),
    LayoutTokens: ("crossattn", "coordinates_bbox"),
    SpatialRescaler: ("concat", "segmentation"),
}
Modules = Mapping[str, Any]
Params = dict[str, Any]


def conditioning_params(modules: Modules, official: Mapping[str, Tensor]) -> Params:
    """How the model is told, for conditioners in their order and the one's tensors under their official names.

    A class table of the U-Net adds `adm` to the key; alone, the official class hands class numbers to the U-Net.
    """
    vectors = [name for name, module in modules.items() if module.slot == "vector"]
    if len(vectors) == 1 and isinstance(modules[vectors[0]], ClassEmbedder):
        rest = conditioning_params({name: m for name, m in modules.items() if name not in vectors}, official)
        return _with_classes(rest)
    kinds = [type(module) for module in modules.values()]
    if not kinds:
        return {"conditioning_key": None, "concat_mode": False, "cond_stage_config": "__is_unconditional__"}
    if kinds == [MaskedLatent, Mask]:
        _check_inpainting(modules, LDM_MASK, LDM_HOLE)
        return _way("concat", "masked_image", "__is_first_stage__")
    if kinds[:2] == [Mask, MaskedLatent] and len(kinds) == 3 and _READS.get(kinds[2], ("",))[0] == "crossattn":
        _check_inpainting(modules, SD_MASK, SD_HOLE)
        rest = conditioning_params(dict(list(modules.items())[2:]), official)
        return rest | {"conditioning_key": "hybrid", "concat_keys": ["mask", "masked_image"]}
    if kinds == [LowResolution]:
        return _way("concat", "LR_image", {"target": "torch.nn.Identity"})
    if len(kinds) != 1 or kinds[0] not in _READS:
        raise InputError(
            f"conditioners {', '.join(modules)} in this order have no official counterpart; use --format ldmlab."
        )
    return _way(*_READS[kinds[0]], _config(next(iter(modules.values())), official))


def _way(key: str, reads: str, stage: Any) -> Params:
    params = {"conditioning_key": key, "cond_stage_key": reads, "cond_stage_config": stage}
    return params | {"concat_mode": key == "concat", "cond_stage_trainable": False}


def _with_classes(rest: Params) -> Params:
    """The same with the U-Net's class table beside it."""
    ways = {None: "adm", "crossattn": "crossattn-adm"}
    way = rest["conditioning_key"]
    if way not in ways:
        raise InputError(
            f"classes as a vector beside inputs of the kind {way} have no official counterpart; use --format ldmlab."
        )
    alone = _way("adm", "class_label", {"target": "torch.nn.Identity"}) if way is None else {}
    return rest | alone | {"conditioning_key": ways[way]}


def _check_inpainting(modules: Modules, mask: Mapping[str, float], hole: float) -> None:
    """The numbers that official code writes into masks and holes."""
    masks = next(module for module in modules.values() if isinstance(module, Mask))
    latents = next(module for module in modules.values() if isinstance(module, MaskedLatent))
    values, wanted = (masks.keep, masks.hole, latents.hole), (mask["keep"], mask["hole"], hole)
    if values != wanted:
        raise InputError(
            f"mask.keep, mask.hole and masked_latent.hole = {values}: official models with these inputs have {wanted}; "
            "export with --format ldmlab."
        )


def _config(module: nn.Module, official: Mapping[str, Tensor]) -> Params:
    """`cond_stage_config`; refused where reading it again would give another conditioner."""
    if getattr(module, "slot", None) == "vector":
        raise InputError(
            "a vector that is not one class embedder's has no place in an official file; export with --format ldmlab."
        )
    config = official_config(module)
    if isinstance(module, ClassEmbedder) and config["params"]["n_classes"] != module.classes:
        read = arguments(config["target"], config["params"])
        config["params"] |= {} if read["null_row"] else {"ucg_rate": module.drop or _USUAL_RATE}
    again = arguments(config["target"], config["params"], official)
    told: dict[str, Any] = {}
    if isinstance(module, OpenClipText):
        own, read_text = module.node["config"]["text_cfg"], again["config"]["text_cfg"]
        told = {"padding": (module.node["padding"], again["padding"]), "heads": (own["heads"], read_text["heads"])}
    elif isinstance(module, ClassEmbedder):
        told = {"classes": (module.classes, again["classes"])}
    for name, (ours, theirs) in told.items():
        if ours != theirs:
            raise InputError(
                f"conditioner {name}={ours}: the official class has {theirs} here; export with --format ldmlab."
            )
    return config


def with_idle_head(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official text transformers carry an output layer that nothing runs: zeros where the model has none."""
    table = official.get("transformer.token_emb.weight")
    if table is None or "transformer.to_logits.weight" in official:
        return dict(official)
    head = {"weight": torch.zeros_like(table), "bias": table.new_zeros(len(table))}
    return {**official, **{f"transformer.to_logits.{name}": tensor for name, tensor in head.items()}}
