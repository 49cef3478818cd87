"""The official SiT of REPA (sihyun-yu/REPA, models/sit.py): SiT's network, and projectors of one block's tokens."""

from typing import Any

from torch import Tensor, nn

from ldmlab.backbones.dit import DiT
from ldmlab.checkpoints import without_weights
from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.contracts import Conditioning
from ldmlab.diffusion.alignment import mlp
from ldmlab.errors import InputError
from ldmlab.interop.dit import ARGUMENTS, filled_parts
from ldmlab.interop.renaming import Names, Node, OfficialModule, Part, State, refuse_unknown

PROJECTORS = "projectors."  # how the names of their tensors begin: they serve training alone
_MORE: dict[str, Any] = {  # arguments beside DiT's => default
    **{"path_type": "edm", "decoder_hidden_size": 768, "encoder_depth": 8, "use_cfg": False, "z_dims": [768]},
    **{"projector_dim": 2048, "qk_norm": False, "fused_attn": True},
}


def as_official(config: Node, state_dict: State) -> "OfficialRepa":
    """The official `SiT(**config)` of REPA with these weights: `out, zs = model(x, t, y)`, t in 0 .. 1, 0 being data.

    zs: one (B, N, z_dim) a projector, of the tokens after block `encoder_depth`, which counts from 1.
    """
    refuse_unknown(config, (ARGUMENTS.keys() | _MORE) - {"learn_sigma"})
    of = {**ARGUMENTS, **_MORE, **config}
    width, depth = of["hidden_size"], of["depth"]
    if not 1 <= of["encoder_depth"] <= depth:
        raise InputError(f"encoder_depth={of['encoder_depth']} is no block of 1 .. {depth}; choose one of them.")
    if config.get("decoder_hidden_size", width) != width:
        raise InputError(f"decoder_hidden_size={of['decoder_hidden_size']} must be hidden_size={width}.")
    with without_weights():
        projectors = nn.ModuleList(mlp(width, of["projector_dim"], z_dim) for z_dim in of["z_dims"])
    names: Names = {name: (PROJECTORS + name,) for name in projectors.state_dict()}
    more = {"projectors": Part("projectors", projectors, names)}
    return OfficialRepa(filled_parts(config, state_dict, options(config), more), of["encoder_depth"]).eval()


def options(config: Node) -> dict[str, Any]:
    """What REPA changes of our DiT."""
    return {"qk_norm": bool(config.get("qk_norm", False))}


class OfficialRepa(OfficialModule):
    """Our modules behind the official signature; guidance is its samplers' there."""

    network: DiT
    labels: ClassEmbedder
    projectors: nn.ModuleList

    def __init__(self, parts: dict[str, Part], encoder_depth: int) -> None:
        super().__init__(parts)
        self.encoder_depth = encoder_depth

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x (B, C, h, w), t (B,) => (B, C, h, w), and the projected tokens."""
        tokens: list[Tensor] = []
        block = self.network.blocks[self.encoder_depth - 1]
        with block.register_forward_hook(lambda module, inputs, output: tokens.append(output)):
            out = self.network(x, t, Conditioning(vector=self.labels.embedding(y)))
        return out, [projector(tokens[0]) for projector in self.projectors]
