"""The official EDM2 network (NVlabs/edm2, training/networks_edm2.py: `Precond` over `UNet`) and its tensors' names."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ldmlab.backbones.edm2_unet import EDM2UNet
from ldmlab.checkpoints import without_weights
from ldmlab.contracts import Conditioning
from ldmlab.diffusion.weighting import LearnedLogVariance
from ldmlab.interop import renaming
from ldmlab.interop.renaming import Node, OfficialModule, Part, State, StateDict, numbers_of, shape_of

_TARGET = "ldmlab.backbones.edm2_unet.EDM2UNet"
_OPTIONS = {  # theirs => ours
    **{"model_channels": "model_channels", "num_blocks": "num_res_blocks", "channels_per_head": "head_channels"},
    **{"label_balance": "vector_balance", "concat_balance": "concat_balance", "res_balance": "residual_balance"},
    **{"attn_balance": "attention_balance", "resample_filter": "resample_filter", "dropout": "dropout"},
    **{"clip_act": "clip", "channel_mult": "channel_mult"},
}
_ARGUMENTS = {  # of `Precond` and its `UNet`
    *_OPTIONS,
    *("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_data", "logvar_channels"),
    *("channel_mult_noise", "channel_mult_emb", "attn_resolutions"),
}
HEAD = "logvar_"  # how the names of the log-variance's tensors begin: it serves training alone


def as_official(config: Node, state_dict: State) -> "OfficialPrecond":
    """The official `Precond(**config)` with these weights: `model(x, sigma, class_labels, return_logvar=False)`.

    `use_fp16` has no effect: it runs in float32. InputError: the weights are not those of the configuration.
    """
    renaming.refuse_unknown(config, _ARGUMENTS)
    with without_weights():
        head = LearnedLogVariance(channels=config.get("logvar_channels", 128))
    names = {"frequencies": "fourier.freqs", "phases": "fourier.phases", "linear.weight": "linear.weight"}
    of_head = Part("head", head, {ours: (HEAD + name,) for ours, name in names.items()})
    parts = {"network": network_part(config), "head": of_head}
    renaming.fill_parts(parts, {name: vector(tensor) for name, tensor in state_dict.items()})
    return OfficialPrecond(parts, config.get("sigma_data", 0.5), config.get("label_dim", 0)).eval()


def vector(tensor: Tensor) -> Tensor:
    """A gain, which is a scalar there, as one element."""
    return tensor.reshape(1) if tensor.ndim == 0 else tensor


def backbone_node(config: Node) -> dict[str, Any]:
    """Our backbone for the arguments of `Precond`."""
    node = {ours: config[theirs] for theirs, ours in _OPTIONS.items() if theirs in config}
    width, mults = config.get("model_channels", 192), config.get("channel_mult", [1, 2, 3, 4])
    of_head = config.get("channels_per_head", 64)
    resolutions = [config["img_resolution"] >> level for level in range(len(mults))]
    attending = [
        2**level  # where levels are narrower than a head there is no attention, without a word
        for level, (resolution, mult) in enumerate(zip(resolutions, mults, strict=True))
        if resolution in config.get("attn_resolutions", [16, 8]) and width * mult >= of_head
    ]
    noise = config.get("channel_mult_noise")
    if noise is not None or mults[0] != 1:  # theirs follows the first level where it is not given
        node["noise_channels"] = width * (mults[0] if noise is None else noise)
    if config.get("channel_mult_emb") is not None:
        node["emb_channels"] = width * config["channel_mult_emb"]
    lowest = width * mults[-1 if config.get("num_blocks", 3) else 0]  # only blocks change the width
    return {
        "_target_": _TARGET,
        **{"in_channels": config["img_channels"], "out_channels": config["img_channels"], "model_channels": width},
        **{"vector_width": config.get("label_dim") or None, "attention_downsampling": attending},
        **{"middle_attention": lowest >= of_head, "num_res_blocks": 3},
        **node,
    }


def network_part(config: Node) -> Part:
    """Our network for the arguments of `Precond`, without weights, and the official names of its tensors."""
    network = renaming.unfilled(backbone_node(config), "backbone")
    mults = config.get("channel_mult", [1, 2, 3, 4])
    blocks = list(block_names(config["img_resolution"], len(mults), config.get("num_blocks", 3)))
    lists = {side: [name for name in blocks if name.startswith(side)] for side in ("enc", "dec")}
    table = renaming.names_of("edm2", "network") | {f"{side}oder.#": f"unet.{{{side}}}" for side in lists}
    names = renaming.renamed(network.state_dict(), table, renaming.numbered(**lists))
    matrices = {name: 4 for name in names if name.endswith((".qkv.weight", ".out.weight"))}
    return Part("network", network, names, matrices)


def block_names(resolution: int, levels: int, per_level: int) -> Iterator[str]:
    """Official names of the blocks in the order they run."""
    sides = [f"{resolution >> level}x{resolution >> level}" for level in range(levels)]
    for level, side in enumerate(sides):
        yield f"enc.{side}_{'down' if level else 'conv'}"
        yield from (f"enc.{side}_block{i}" for i in range(per_level))
    for level, side in reversed(list(enumerate(sides))):
        yield from (f"dec.{side}_{name}" for name in (("up",) if level < levels - 1 else ("in0", "in1")))
        yield from (f"dec.{side}_block{i}" for i in range(per_level + 1))


def config_of(state: State, given: Node) -> dict[str, Any]:
    """The arguments of `Precond`, its balances and the width of heads at their defaults."""
    sides = sorted(set(numbers_of(state, r"unet\.enc\.(\d+)x")), reverse=True)
    if not sides:
        shape_of(state, "unet.enc")
    first, *_ = sides
    widths = [shape_of(state, f"unet.enc.{side}x{side}_block0.conv_res0.weight")[0] for side in sides]
    embedding, noise = shape_of(state, "unet.emb_noise.weight")
    return {
        "img_resolution": first,
        "img_channels": shape_of(state, f"unet.enc.{first}x{first}_conv.weight")[1] - 1,
        **{"model_channels": widths[0], "channel_mult": [width // widths[0] for width in widths]},
        **{"channel_mult_noise": noise // widths[0], "channel_mult_emb": embedding // widths[0]},
        "num_blocks": 1 + max(numbers_of(state, rf"unet\.enc\.{first}x{first}_block(\d+)\.")),
        "attn_resolutions": [s for s in sides if f"unet.enc.{s}x{s}_block0.attn_qkv.weight" in state],
        "label_dim": shape_of(state, "unet.emb_label.weight")[1],
        "logvar_channels": shape_of(state, "logvar_linear.weight")[1],
    }


class OfficialPrecond(OfficialModule):
    """Our network behind the official signature: clean estimate of x at noise level sigma."""

    network: EDM2UNet
    head: LearnedLogVariance

    def __init__(self, parts: Mapping[str, Part], sigma_data: float, classes: int) -> None:
        super().__init__(parts)
        self.sigma_data, self.label_dim = sigma_data, classes

    def forward(
        self,
        x: Tensor,  # (B, C, h, w) = clean + sigma noise
        sigma: Tensor,  # (B,), or one for all
        class_labels: Tensor | None = None,  # (B, classes), one-hot; None: no class
        force_fp32: bool = True,  # it always is
        return_logvar: bool = False,  # log-variance of the loss, (B, 1, 1, 1), as well
    ) -> Tensor | tuple[Tensor, Tensor]:
        """c_skip x + c_out F(c_in x, log(sigma) / 4) (EDM, equation 7), float32."""
        x, sigma, data = x.float(), sigma.float().reshape(-1, 1, 1, 1), self.sigma_data
        if self.training:
            self.network.force_normal(again=True)  # as every official pass does
            if return_logvar:
                self.head.linear.force_normal(again=True)
        total = (sigma**2 + data**2).sqrt()
        time = (sigma.flatten().log() / 4).expand(len(x))
        out = data**2 / total**2 * x + sigma * data / total * self.raw(x / total, time, class_labels)
        return (out, self.head.log_variance(time).reshape(-1, 1, 1, 1)) if return_logvar else out

    def raw(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The official `UNet`: F, before preconditioning."""
        vector = None
        if self.label_dim:
            labels = x.new_zeros(1, self.label_dim) if class_labels is None else class_labels.float()
            vector = labels.reshape(-1, self.label_dim) * math.sqrt(self.label_dim)
        return self.network(x, c_noise, Conditioning(vector=vector))

    def _named(self, tensors: Callable[[nn.Module], State]) -> StateDict:
        named = super()._named(tensors)
        return {name: tensor[0] if name.endswith("gain") else tensor for name, tensor in named.items()}
