"""The official DiT (facebookresearch/DiT, models.py): its arguments and tensors here, and its calls over our modules.

SiT, LightningDiT and REPA name their tensors in the same way; `sit.py`, `lightningdit.py` and `repa.py` add what they
change.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.backbones.dit import DiT
from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.contracts import Conditioning
from ldmlab.interop import renaming
from ldmlab.interop.renaming import Names, Node, OfficialModule, Part, State, numbers_of, shape_of
from ldmlab.nn.blocks import SwiGLU

ARGUMENTS: dict[str, Any] = {  # of the official class => default; the side of latents is not fixed here
    **{"input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28, "num_heads": 16},
    **{"mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 1000, "learn_sigma": True},
}
_GUIDED = 3  # channels that the official programs guide, however many there are
CONSTANTS = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")  # computed here


def as_official(config: Node, state_dict: State) -> "OfficialTransformer":
    """The official `DiT(**config)` with these weights, called as theirs: `model(x, t, y)`, `forward_with_cfg`.

    t counts the steps 0 .. T - 1. With `learn_sigma` the output has 2 C channels. InputError: an argument is unknown,
    or the weights are not those of the configuration.
    """
    renaming.refuse_unknown(config, ARGUMENTS)
    return OfficialTransformer(filled_parts(config, state_dict, options(config))).eval()


def options(config: Node) -> dict[str, Any]:
    """What DiT changes of our network: the second half of the output is the variance."""
    arguments = {**ARGUMENTS, **config}
    return {"out_channels": (1 + bool(arguments["learn_sigma"])) * arguments["in_channels"]}


def nodes(config: Node, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nodes of model.yaml for the official arguments: the backbone, and the conditioner with the table of classes."""
    of = {**ARGUMENTS, **config}
    width, drop = of["hidden_size"], of["class_dropout_prob"]
    node = {
        "_target_": "ldmlab.backbones.dit.DiT",
        **{"in_channels": of["in_channels"], "out_channels": of["in_channels"], "width": width, "vector_width": width},
        **{"depth": of["depth"], "heads": of["num_heads"], "patch_size": of["patch_size"]},
        **{"mlp_ratio": of["mlp_ratio"], **options},
    }
    labels = {
        "_target_": "ldmlab.conditioners.class_label.ClassEmbedder",
        **{"classes": of["num_classes"], "width": width, "slot": "vector", "drop": drop, "null_row": drop > 0},
    }
    return node, labels


def parts_of(node: Node, labels: Node) -> dict[str, Part]:
    """The network and the table of classes, without weights, and the official names of their tensors."""
    network, table = renaming.unfilled(node, "backbone"), renaming.unfilled(labels, "conditioner")
    names = renaming.renamed(table.state_dict(), renaming.names_of("dit", "classes"))
    return {"network": Part("network", network, network_names(network)), "labels": Part("label table", table, names)}


def filled_parts(
    config: Node, state_dict: State, options: Mapping[str, Any], more: Mapping[str, Part] | None = None
) -> dict[str, Part]:
    """The parts of `config` and `more`, with the file's tensors."""
    parts = {**parts_of(*nodes(config, options)), **(more or {})}
    renaming.fill_parts(parts, {name: tensor for name, tensor in state_dict.items() if name not in CONSTANTS})
    return parts


def network_names(network: nn.Module) -> Names:
    """The official names of the tensors of a `DiT` of ours."""
    gated = any(isinstance(module, SwiGLU) for module in network.modules())
    return renaming.renamed(network.state_dict(), renaming.names_of("dit", "network", "swiglu" if gated else "mlp"))


class OfficialTransformer(OfficialModule):
    """Our modules behind the official signatures: class numbers y (B,), where `num_classes` is no class."""

    network: DiT
    labels: ClassEmbedder

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, C, h, w), t (B,) as the program counts it => (B, C or 2 C, h, w)."""
        return self.network(x, t, Conditioning(vector=self.labels.embedding(y)))

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        cfg_interval: bool | None = None,  # LightningDiT's: no guidance where
        cfg_interval_start: float | None = None,  # t is below this
        channels: int | None = _GUIDED,  # that are guided, the first ones; None: all of x
    ) -> Tensor:
        """The first half of x with the conditions in the first half of y and none in the second, guided.

        out_none + s (out_y - out_none) for the first `channels` channels, twice.
        """
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        count = x.shape[1] if channels is None else channels
        with_class, without = out[:, :count].chunk(2)
        off = cfg_interval and bool(t[0] < (cfg_interval_start or 0.0))
        guided = with_class if off else without + cfg_scale * (with_class - without)
        return torch.cat([torch.cat([guided, guided]), out[:, count:]], dim=1)


# ---- arguments from names and shapes of tensors

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}  # of the published widths


def transformer_config(state: State, given: Node) -> dict[str, Any]:
    """Those of `DiT` and `SiT`; `num_heads` only where the width is a published one. `given`: those a user gave."""
    width, channels, patch, _ = shape_of(state, "x_embedder.proj.weight")
    rows, places = shape_of(state, "final_layer.linear.weight")[0], shape_of(state, "pos_embed")[1]
    null_row = given.get("class_dropout_prob", 0.1) > 0
    return {
        **{"input_size": round(places**0.5) * patch, "patch_size": patch, "in_channels": channels},
        **{"hidden_size": width, "depth": 1 + max(numbers_of(state, r"blocks\.(\d+)\."), default=0)},
        **({"num_heads": _HEADS[width]} if width in _HEADS else {}),
        "num_classes": shape_of(state, "y_embedder.embedding_table.weight")[0] - null_row,
        "learn_sigma": rows == 2 * channels * patch**2,
        "mlp_ratio": _mlp_ratio(state, width),
    }


def repa_config(state: State, given: Node) -> dict[str, Any]:
    """Those of REPA's `SiT`; the projectors' block does not follow from shapes."""
    config = transformer_config(state, given)
    del config["learn_sigma"]
    projectors = 1 + max(numbers_of(state, r"projectors\.(\d+)\."), default=-1)
    return config | {
        "encoder_depth": min(8, config["depth"]),
        "z_dims": [shape_of(state, f"projectors.{i}.4.weight")[0] for i in range(projectors)],
        **({"projector_dim": shape_of(state, "projectors.0.0.weight")[0]} if projectors else {}),
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
    }


def lightningdit_config(state: State, given: Node) -> dict[str, Any]:
    """Those of `LightningDiT`."""
    config = transformer_config(state, given)
    return config | {
        **{"use_swiglu": "blocks.0.mlp.w12.weight" in state, "use_rmsnorm": "blocks.0.norm1.weight" in state},
        **{"use_qknorm": "blocks.0.attn.q_norm.weight" in state, "use_rope": "feat_rope.freqs_cos" in state},
        "wo_shift": shape_of(state, "blocks.0.adaLN_modulation.1.weight")[0] == 4 * config["hidden_size"],
    }


def _mlp_ratio(state: State, width: int) -> float:
    """A ratio that gives the MLP's width; gated MLPs are 2 / 3 as wide. Published ones have 4."""
    gated = "blocks.0.mlp.w12.weight" in state
    hidden = shape_of(state, f"blocks.0.mlp.{'w12' if gated else 'fc1'}.weight")[0]
    if hidden == (2 * int(2 / 3 * 4 * width) if gated else 4 * width):
        return 4.0
    return ((-(-3 * hidden // 4) if gated else hidden) + 0.5) / width  # its product with the width is rounded down
