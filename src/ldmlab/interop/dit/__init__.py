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
from ldmlab.interop.renaming import (
    Names,
    Node,
    OfficialModule,
    Part,
    State,
    fill_parts,
    names_of,
    refuse_unknown,
    renamed,
    unfilled,
)
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
    refuse_unknown(config, ARGUMENTS)
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
    network, table = unfilled(node, "backbone"), unfilled(labels, "conditioner")
    names = renamed(table.state_dict(), names_of("dit", "classes"))
    return {"network": Part("network", network, network_names(network)), "labels": Part("label table", table, names)}


def filled_parts(
    config: Node, state_dict: State, options: Mapping[str, Any], more: Mapping[str, Part] | None = None
) -> dict[str, Part]:
    """The parts of `config` and `more`, with the file's tensors."""
    parts = {**parts_of(*nodes(config, options)), **(more or {})}
    fill_parts(parts, {name: tensor for name, tensor in state_dict.items() if name not in CONSTANTS})
    return parts


def network_names(network: nn.Module) -> Names:
    """The official names of the tensors of a `DiT` of ours."""
    gated = any(isinstance(module, SwiGLU) for module in network.modules())
    return renamed(network.state_dict(), names_of("dit", "network", "swiglu" if gated else "mlp"))


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
