"""Names of an official file's tensors: keys after the prefix of a network, and ours.

See `openaimodel.py`, `model.py` and `ldm/modules/encoders/modules.py` in CompVis/latent-diffusion, and the latter in
CompVis/stable-diffusion and Stability-AI/stablediffusion.
"""

from typing import Any

from torch import Tensor

from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.conditioners.layout_tokens import LayoutTokens
from ldmlab.conditioners.semantic_map import SpatialRescaler
from ldmlab.conditioners.text import OpenClipText, TransformerText
from ldmlab.errors import InputError
from ldmlab.interop import renaming
from ldmlab.interop.renaming import Names, Node, Part, State

UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
CONDITIONER = "cond_stage_model."
AVERAGED = "model_ema."
LOSS = "loss."  # discriminator and perceptual network of a first stage's training
CLASS_TABLE = "label_emb.weight"  # with num_classes: rows are the U-Net's vector conditioning, in a conditioner here
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine", "sqrt": "sqrt"}  # official => ours
BUFFERS = tuple(renaming.OPTIONS["compvis"]["buffers"])
_TABLES = ("position_ids", "attn_mask")  # counters and masks that libraries stored with a text encoder's weights


def unet_part(node: Node, linear_projection: bool = False) -> Part:
    """From a backbone node of model.yaml; linear_projection: as Stable Diffusion 2.x stores spatial transformers."""
    levels, blocks = len(node["channel_mult"]), node["num_res_blocks"] + 1

    def places(level: int, block: int = 0, *rest: int) -> dict[str, int]:
        """Official indices count blocks and downsamplers, after the first convolution; upsamplers lie in a block."""
        attends = 2 ** (levels - 1 - level) in node["attention_downsampling"]
        down, up = 1 + level * blocks, level * blocks
        last = {"down_end": down + blocks - 1, "up_end": up + blocks - 1, "behind": 1 + attends}
        return {"down": down + block, "up": up + block, "middle": 2 * level, **last}

    module = renaming.unfilled(node, "backbone")
    names = renaming.renamed(module.state_dict(), renaming.names_of("compvis", "unet"), places)
    axes = {name: 3 for name in names if name.endswith((".attention.qkv.weight", ".attention.out.weight"))}
    if not linear_projection:
        axes |= {name: 4 for name in names if name.endswith((".proj_in.weight", ".proj_out.weight"))}
    return Part("U-Net", module, names, axes)


def first_stage_part(node: Node) -> Part:
    """From a first_stage node of model.yaml; official decoder levels count from the finest, ours as they run."""
    module = renaming.unfilled(node, "first_stage")
    levels = len(node.get("channel_mult", ()))
    tensors, table = filter(renaming.named_as_theirs, module.state_dict()), renaming.names_of("compvis", "first_stage")
    names = renaming.renamed(tensors, table, lambda level, *rest: {"up": levels - 1 - level})
    return Part("first stage", module, names)


def conditioner_part(node: Node) -> Part:
    """From a conditioner node of model.yaml; its module may hold no tensors."""
    module = renaming.unfilled(node, "conditioner")
    return Part("conditioner", module, conditioner_names(module) if module.state_dict() else {})


def conditioner_names(conditioner: Any) -> Names:
    """Names of the tensors of a conditioner that has an official class; InputError for others."""
    tensors = conditioner.state_dict()
    if isinstance(conditioner, ClassEmbedder):
        return {"embedding.weight": (CLASS_TABLE if conditioner.slot == "vector" else "embedding.weight",)}
    if isinstance(conditioner, SpatialRescaler):
        return renaming.renamed(tensors, {"channels": "channel_mapper"})
    if isinstance(conditioner, (TransformerText, LayoutTokens)):
        table = renaming.names_of("compvis", "text")
        return renaming.renamed(tensors, table, lambda block: {"even": 2 * block, "odd": 2 * block + 1})
    if not isinstance(conditioner, OpenClipText):
        raise InputError(
            f"conditioner {type(conditioner).__name__} has no official counterpart with weights; "
            "export with --format ldmlab."
        )
    if conditioner.node["config"].get("quick_gelu"):  # Stable Diffusion 1.x, else 2.x
        return renaming.clip_names(tensors, "transformer.text_model.")
    return {f"tower.{ours}": (f"model.{name}",) for ours, name in conditioner.tower.clip_names().items()}


def of_part(state: State, prefix: str) -> dict[str, Tensor]:
    """The weights of one network, without prefix, from its own state dict (with or without prefix) or a full file.

    Of a state dict with prefixes, other networks and buffers that official files hold are left aside; any other tensor
    stays, under its name, and is then reported as unexpected.
    """
    others = ("model.", FIRST_STAGE, CONDITIONER, AVERAGED) if any(key.startswith(prefix) for key in state) else ()
    tensors = {
        key.removeprefix(prefix): tensor
        for key, tensor in state.items()
        if key.startswith(prefix) or not (others and (key.startswith(others) or key in BUFFERS))
    }
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(LOSS) and not is_table(key)}


def is_table(key: str) -> bool:
    """Whether a conditioner's tensor is no weight."""
    return key.rpartition(".")[2] in _TABLES
