"""diffusers' transformers, DiTTransformer2DModel and SD3Transformer2DModel (read from version 0.42), and ours."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.backbones.dit import DiT, DiTCache
from ldmlab.backbones.mmdit import MMDiT
from ldmlab.backbones.tokens import TIME_CHANNELS
from ldmlab.checkpoints import without_weights
from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError
from ldmlab.interop.diffusers.diffusers_config import named_class, resolved
from ldmlab.interop.renaming import OfficialModule, Part, State, StateDict, fill_parts, names_of, renamed, unfilled
from ldmlab.nn.blocks import timestep_embedding
from ldmlab.nn.positions import sine_cosine

DIT, SD3 = "DiTTransformer2DModel", "SD3Transformer2DModel"
OLD = "Transformer2DModel"  # DIT in published folders
TARGETS = {DIT: "ldmlab.backbones.dit.DiT", SD3: "ldmlab.backbones.mmdit.MMDiT"}
Config = Mapping[str, Any]
_TABLE = "pos_embed.pos_embed"  # of positions, computed here
_NEAR = 1e-2  # of a table in half precision
_SHIFT = 1  # of frequencies in DiTTransformer2DModel; the official DiT has 0
_COMMON = {"patch_size": "patch_size", "num_layers": "depth", "num_attention_heads": "heads"}


def kind_of(config: Config) -> str:
    """The class a configuration belongs to, also where the file does not name it."""
    if config.get("_class_name") == OLD and config.get("norm_type") == "ada_norm_zero":
        return DIT
    return named_class(config, "transformer") or (SD3 if "joint_attention_dim" in config else DIT)


def backbone_node(config: Config) -> dict[str, Any]:
    """Our backbone for a configuration of one of the classes."""
    kind = kind_of(config)
    options = resolved(config, kind, "transformer")
    width = options["num_attention_heads"] * options["attention_head_dim"]
    node = {
        **{"_target_": TARGETS[kind], "in_channels": options["in_channels"], "width": width},
        **{"out_channels": options["out_channels"] or options["in_channels"]},
        **{ours: options[theirs] for theirs, ours in _COMMON.items()},
    }
    if kind == DIT:
        eps = options["norm_eps"]
        return node | {"vector_width": width, "mlp_norm_eps": eps, "frequency_shift": _SHIFT}
    if options["caption_projection_dim"] != width:
        raise InputError(
            f"{kind} with caption_projection_dim={options['caption_projection_dim']} and a width of {width} is not "
            "supported; supported: the width."
        )
    return node | {
        **{"context_width": options["joint_attention_dim"], "vector_width": options["pooled_projection_dim"]},
        **{"qk_norm": options["qk_norm"] is not None, "dual_attention": options["dual_attention_layers"]},
        **{"position_grid": options["pos_embed_max_size"]},
        **{"position_base": options["sample_size"] // options["patch_size"]},
    }


def network_part(node: Config, kind: str) -> Part:
    """Our network without weights, and the names of its tensors there."""
    network = unfilled(node, "backbone")
    names = renamed(network.state_dict(), names_of("diffusers", "dit" if kind == DIT else "mmdit"))
    return Part(kind, network, names)


def parts_of(config: Config) -> dict[str, Part]:
    """Our network and, of DiT, the embedders that every block has there, without weights."""
    kind = kind_of(config)
    network = network_part(backbone_node(config), kind)
    if kind == SD3:
        return {"network": network}
    depth, width = len(cast(DiT, network.module).blocks), cast(DiT, network.module).width
    with without_weights():
        rows = resolved(config, kind, "transformer")["num_embeds_ada_norm"] + 1
        embedders = nn.ModuleDict({"blocks": nn.ModuleList(Embedder(width, rows) for _ in range(depth))})
    names = renamed(embedders.state_dict(), names_of("diffusers", "dit_embedders"))
    return {"network": network, "embedders": Part("embedders", embedders, names)}


def as_official(config: Config, state_dict: State) -> "OfficialSD3 | OfficialDiT":
    """The transformer of a configuration with these weights, called as in diffusers."""
    return (OfficialSD3 if kind_of(config) == SD3 else OfficialDiT)(_filled(config, state_dict)).eval()


def _filled(config: Config, state_dict: State) -> dict[str, Part]:
    """The parts with the tensors of a file, whose table of positions is compared with ours."""
    parts = parts_of(config)
    fill_parts(parts, {name: tensor for name, tensor in state_dict.items() if name != _TABLE})
    if (table := state_dict.get(_TABLE)) is not None:
        node = backbone_node(config)
        side, base = round(table.shape[1] ** 0.5), node.get("position_base")
        ours = sine_cosine(side, side, node["width"], scale=base / node["position_grid"] if base else 1.0)
        if not torch.allclose(table[0].float(), ours, atol=_NEAR):
            raise InputError(f"{_TABLE} holds other positions than {kind_of(config)} computes; use another file.")
    return parts


def read_transformer(config: Config, state_dict: State) -> tuple[dict[str, Any], StateDict, Tensor | None]:
    """Our backbone's node and weights, and the table of classes of a DiT, (classes + 1, D)."""
    parts, node = _filled(config, state_dict), backbone_node(config)
    network = parts["network"].module.state_dict()
    if "embedders" not in parts:
        return node, network, None
    copies = parts["embedders"].module.state_dict()
    for name, tensor in copies.items():
        if not torch.equal(tensor, copies["blocks.0." + name.split(".", 2)[2]]):
            raise InputError(
                f"{name} of {DIT}'s embedders differs from that of block 0, but ldmlab's DiT has one embedder for all; "
                "only networks trained with one can be imported."
            )
    return node, network, copies["blocks.0.classes.weight"]


def foreign_state(node: Config, state: State, rows: Tensor | None) -> StateDict:
    """Tensors of the class in diffusers for our weights: `rows` and the time embedding in every block of a DiT."""
    kind = next(kind for kind, target in TARGETS.items() if target == node["_target_"])
    foreign = network_part(node, kind).to_foreign(state)
    if kind == SD3:
        side, base = node.get("position_grid", 192), node.get("position_base", 64)
        return foreign | {_TABLE: sine_cosine(side, side, node["width"], scale=base / side)[None]}
    assert rows is not None
    own = {f"{name}.{leaf}": state[f"time_{name}.{leaf}"] for name in ("expand", "mix") for leaf in ("weight", "bias")}
    ours = {
        f"blocks.{i}.{name}": t for i in range(node["depth"]) for name, t in {**own, "classes.weight": rows}.items()
    }
    names = renamed(ours, names_of("diffusers", "dit_embedders"))
    return foreign | {names[name][0]: tensor for name, tensor in ours.items()}


_PLAIN: dict[str, Any] = {  # options of ours that the classes have one value of, and that value
    **{"rms_norm": False, "swiglu": False, "rotary_positions": False, "shift": True, "unused_half": False},
    **{"project_vector": False, "mlp_ratio": 4.0, "numbers": 0},
}


def configuration(node: Config, sample_size: int, rows: Tensor | None) -> tuple[str, Config]:
    """diffusers' class and options for the node of a transformer of ours; InputError for what it cannot hold."""
    kind = next(kind for kind, target in TARGETS.items() if target == node["_target_"])
    fixed = _PLAIN | ({"qk_norm": False, "context_width": None, "frequency_shift": _SHIFT} if kind == DIT else {})
    for name, value in fixed.items():
        if node.get(name, 0 if name == "frequency_shift" else value) != value:
            raise InputError(
                f"backbone.{name}={node.get(name, 0)}: {kind} has {name}={value} alone; train with that, or use "
                "--format ldmlab."
            )
    config = {
        **{theirs: node.get(ours, 2) for theirs, ours in _COMMON.items()},
        **{"in_channels": node["in_channels"], "out_channels": node["out_channels"]},
        "attention_head_dim": node["width"] // node["heads"],
    }
    if kind == DIT:
        if rows is None:
            raise InputError(f"backbone=DiT: {kind} requires a class_label conditioner alone; use --format ldmlab.")
        eps = node.get("mlp_norm_eps", 1e-6)
        return kind, config | {"num_embeds_ada_norm": len(rows) - 1, "norm_eps": eps, "sample_size": sample_size}
    pooled = node.get("pooled_width") or node.get("vector_width")
    if not pooled:
        raise InputError(f"backbone.vector_width=null: {kind} requires pooled text; use --format ldmlab.")
    return kind, config | {
        **{"joint_attention_dim": node["context_width"], "pooled_projection_dim": pooled},
        **{"caption_projection_dim": node["width"], "qk_norm": "rms_norm" if node.get("qk_norm", True) else None},
        "dual_attention_layers": tuple(node.get("dual_attention", ())),
        "pos_embed_max_size": node.get("position_grid", 192),
        "sample_size": node.get("position_base", 64) * config["patch_size"],
    }


class Output(NamedTuple):
    """What diffusers' models return."""

    sample: Tensor


class OfficialSD3(OfficialModule):
    """Our MMDiT behind the signature of SD3Transformer2DModel."""

    network: MMDiT

    def forward(
        self,
        hidden_states: Tensor,  # (B, C, h, w)
        encoder_hidden_states: Tensor,  # (B, L, joint_attention_dim)
        pooled_projections: Tensor,  # (B, pooled_projection_dim)
        timestep: Tensor,  # (B,), 0 .. 1000
        return_dict: bool = True,  # no effect: the output is a tuple with a name
    ) -> Output:
        conditioning = Conditioning(tokens=encoder_hidden_states, vector=pooled_projections)
        return Output(self.network(hidden_states, timestep, conditioning))


class Embedder(nn.Module):
    """Time and class to the condition of one block."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.expand, self.mix = nn.Linear(TIME_CHANNELS, width), nn.Linear(width, width)
        self.classes = nn.Embedding(rows, width)

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        times = timestep_embedding(t, TIME_CHANNELS, shift=_SHIFT).to(self.expand.weight.dtype)
        return F.silu(self.mix(F.silu(self.expand(times))) + self.classes(labels))


class OfficialDiT(OfficialModule):
    """Our DiT behind the signature of DiTTransformer2DModel, whose blocks have embedders of their own."""

    network: DiT
    embedders: nn.ModuleDict

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__(parts)
        self.network.time_expand = self.network.time_mix = nn.Identity()  # type: ignore[assignment]  # block 0's has them

    def forward(
        self,
        hidden_states: Tensor,  # (B, C, h, w)
        timestep: Tensor,  # (B,), 0 .. 999
        class_labels: Tensor,  # (B,), the number of classes is none of them
        return_dict: bool = True,  # no effect: the output is a tuple with a name
    ) -> Output:
        blocks = cast(nn.ModuleList, self.embedders["blocks"])
        conditions = [embedder(timestep, class_labels) for embedder in blocks]
        cache = DiTCache([None] * len(conditions), None, None)  # the conditions hold the class
        return Output(self.network.conditioned(hidden_states, [*conditions, conditions[0]], None, cache))
