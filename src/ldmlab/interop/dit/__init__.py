"""The official DiT (facebookresearch/DiT, models.py): its arguments and tensors here, and its calls over our modules.

SiT, LightningDiT and REPA name their tensors in the same way; `sit.py` and `lightningdit.py` add what they change.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.backbones.dit import DiT
from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.contracts import Conditioning
from ldmlab.interop.renaming import Names, Node, Part, State, names_of, refuse_mismatch, renamed, unfilled
from ldmlab.nn.blocks import SwiGLU

_GUIDED = 3  # channels that the official programs guide, however many there are
_CONSTANTS = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")  # computed here


def as_official(config: Node, state_dict: State) -> "OfficialTransformer":
    """The official `DiT(**config)` with these weights, called as theirs: `model(x, t, y)`, `forward_with_cfg`.

    With `learn_sigma` the output has 2 C channels. InputError: the weights are not those of the configuration.
    """
    return official(config, state_dict, {}, doubled=2 if config.get("learn_sigma", True) else 1)


def official(config: Node, state_dict: State, options: Mapping[str, Any], doubled: int = 1) -> "OfficialTransformer":
    """A transformer of the family; `options`: more arguments of our DiT, `doubled`: output channels for each of x."""
    parts = parts_of(*nodes(config, options, doubled))
    fill_parts(parts, state_dict)
    return OfficialTransformer(parts["network"].module, parts["label table"].module).eval()  # type: ignore[arg-type]


def nodes(config: Node, options: Mapping[str, Any], doubled: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nodes of model.yaml for the official arguments: the backbone, and the conditioner with the table of classes."""
    width, channels = config.get("hidden_size", 1152), config.get("in_channels", 4)
    node = {
        "_target_": "ldmlab.backbones.dit.DiT",
        **{"in_channels": channels, "out_channels": doubled * channels, "width": width, "vector_width": width},
        **{"depth": config.get("depth", 28), "heads": config.get("num_heads", 16)},
        **{"patch_size": config.get("patch_size", 2), "mlp_ratio": config.get("mlp_ratio", 4.0)},
        **options,
    }
    drop, classes = config.get("class_dropout_prob", 0.1), config.get("num_classes", 1000)
    labels = {
        "_target_": "ldmlab.conditioners.class_label.ClassEmbedder",
        **{"classes": classes, "width": width, "slot": "vector", "drop": drop, "null_row": drop > 0},
    }
    return node, labels


def parts_of(node: Node, labels: Node) -> dict[str, Part]:
    """The network and the table of classes, without weights, and the official names of their tensors."""
    network, table = unfilled(node, "backbone"), unfilled(labels, "conditioner")
    names = renamed(table.state_dict(), names_of("dit", "classes"))
    return {
        "network": Part("network", network, network_names(network)),
        "label table": Part("label table", table, names),
    }


def fill_parts(parts: Mapping[str, Part], state_dict: State) -> None:
    """The file's tensors into the parts, the first of which counts what belongs to none; one InputError for all."""
    weights = {name: tensor for name, tensor in state_dict.items() if name not in _CONSTANTS}
    mine = {title: {k: weights[k] for k in part.expected if k in weights} for title, part in parts.items()}
    stray = {k: tensor for k, tensor in weights.items() if not any(k in found for found in mine.values())}
    mine[next(iter(parts))] |= stray
    refuse_mismatch({title: part.mismatch(mine[title]) for title, part in parts.items()})
    for title, part in parts.items():
        part.filled(mine[title])


def network_names(network: nn.Module) -> Names:
    """The official names of the tensors of a `DiT` of ours."""
    gated = any(isinstance(module, SwiGLU) for module in network.modules())
    return renamed(network.state_dict(), names_of("dit", "network", "swiglu" if gated else "mlp"))


class OfficialTransformer(nn.Module):
    """Our modules behind the official signatures: class numbers y (B,), where `num_classes` is no class."""

    def __init__(self, network: DiT, labels: ClassEmbedder) -> None:
        super().__init__()
        self.network, self.labels = network, labels

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, C, h, w), t (B,) as the program counts it => (B, C or 2 C, h, w)."""
        return self.network(x, t, Conditioning(vector=self.labels.embedding(y)))

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        cfg_interval: bool = False,  # LightningDiT's: no guidance where
        cfg_interval_start: float = 0.0,  # t is below this
        channels: int | None = _GUIDED,  # that are guided, the first ones; None: all of x
    ) -> Tensor:
        """The first half of x with the conditions in the first half of y and none in the second, guided.

        out_none + s (out_y - out_none) for the first `channels` channels, twice.
        """
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        count = x.shape[1] if channels is None else channels
        with_class, without = out[:, :count].chunk(2)
        off = cfg_interval and bool(t[0] < cfg_interval_start)
        guided = with_class if off else without + cfg_scale * (with_class - without)
        return torch.cat([torch.cat([guided, guided]), out[:, count:]], dim=1)
