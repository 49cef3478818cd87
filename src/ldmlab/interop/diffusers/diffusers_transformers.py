"""diffusers' transformers, DiTTransformer2DModel and SD3Transformer2DModel (read from version 0.42), and ours."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.backbones.dit import TIME_CHANNELS, DiT, DiTCache
from ldmlab.backbones.mmdit import MMDiT
from ldmlab.checkpoints import without_weights
from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError
from ldmlab.interop.diffusers.diffusers_config import named_class, resolved
from ldmlab.interop.renaming import Part, State, names_of, refuse_mismatch, renamed, unfilled
from ldmlab.nn.blocks import timestep_embedding

DIT, SD3 = "DiTTransformer2DModel", "SD3Transformer2DModel"
TARGETS = {DIT: "ldmlab.backbones.dit.DiT", SD3: "ldmlab.backbones.mmdit.MMDiT"}
Config = Mapping[str, Any]
_TABLE = "pos_embed.pos_embed"  # of positions, computed here
_SHIFT = 1  # of frequencies in DiTTransformer2DModel; the official DiT has 0
_COMMON = {"patch_size": "patch_size", "num_layers": "depth", "num_attention_heads": "heads"}


def kind_of(config: Config) -> str:
    """The class a configuration belongs to, also where the file does not name it."""
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


def as_official(config: Config, state_dict: State) -> nn.Module:
    """diffusers' class of the configuration with these weights, called as there; `.sample` or [0] is the output.

    DiTTransformer2DModel: `model(x, timestep=, class_labels=)`; SD3Transformer2DModel: `model(x,
    encoder_hidden_states=, pooled_projections=, timestep=)`. InputError: the weights are not the configuration's.
    """
    kind = kind_of(config)
    part = network_part(backbone_node(config), kind)
    if kind == SD3:
        weights = {name: tensor for name, tensor in state_dict.items() if name != _TABLE}
        return OfficialSD3(cast(MMDiT, part.filled(weights))).eval()
    depth, width = len(cast(DiT, part.module).blocks), cast(DiT, part.module).width
    with without_weights():
        rows = resolved(config, kind, "transformer")["num_embeds_ada_norm"] + 1
        embedders = nn.ModuleDict({"blocks": nn.ModuleList(Embedder(width, rows) for _ in range(depth))})
    copies = Part("embedders", embedders, renamed(embedders.state_dict(), names_of("diffusers", "dit_embedders")))
    theirs = {name: tensor for name, tensor in state_dict.items() if name in copies.expected}
    own = {name: tensor for name, tensor in state_dict.items() if name in part.expected or name not in theirs}
    refuse_mismatch({kind: part.mismatch(own), "embedders": copies.mismatch(theirs)})
    copies.filled(theirs)
    return OfficialDiT(cast(DiT, part.filled(own)), cast(nn.ModuleList, embedders["blocks"])).eval()


class Output(NamedTuple):
    """What diffusers' models return."""

    sample: Tensor


class OfficialSD3(nn.Module):
    """Our MMDiT behind the signature of SD3Transformer2DModel."""

    def __init__(self, network: MMDiT) -> None:
        super().__init__()
        self.network = network

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


class OfficialDiT(nn.Module):
    """Our DiT behind the signature of DiTTransformer2DModel, whose blocks have embedders of their own."""

    def __init__(self, network: DiT, embedders: nn.ModuleList) -> None:
        super().__init__()
        self.network, self.embedders = network, embedders
        network.time_expand = network.time_mix = nn.Identity()  # type: ignore[assignment]  # block 0's embedder has them

    def forward(
        self,
        hidden_states: Tensor,  # (B, C, h, w)
        timestep: Tensor,  # (B,), 0 .. 999
        class_labels: Tensor,  # (B,), the number of classes is none of them
        return_dict: bool = True,  # no effect: the output is a tuple with a name
    ) -> Output:
        conditions = [embedder(timestep, class_labels) for embedder in self.embedders]
        cache = DiTCache([None] * len(conditions), None, None)  # the conditions hold the class
        return Output(self.network.conditioned(hidden_states, [*conditions, conditions[0]], None, cache))
