"""The official EDM networks (NVlabs/edm, training/networks.py): preconditionings over `SongUNet` and `DhariwalUNet`."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldmlab.backbones.edm_unet import EdmUNet
from ldmlab.contracts import Conditioning
from ldmlab.errors import InputError, one_of
from ldmlab.interop import renaming
from ldmlab.interop.edm2 import block_names
from ldmlab.interop.renaming import Node, OfficialModule, Part, State, StateDict, numbers_of, shape_of

PRECONDS = {  # class => its network unless another is named
    **{"EDMPrecond": "DhariwalUNet", "iDDPMPrecond": "DhariwalUNet"},
    **{"VPPrecond": "SongUNet", "VEPrecond": "SongUNet"},
}
_OPTIONS = {"num_blocks": "num_res_blocks", "encoder_type": "encoder", "decoder_type": "decoder", "dropout": "dropout"}
_DEFAULTS = {  # of options that depend on the network
    "SongUNet": {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]},
    "DhariwalUNet": {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3},
}
_ARGUMENTS = {  # of the classes and their networks
    *_OPTIONS,
    *("precond", "model_type", "img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max"),
    *("sigma_data", "beta_d", "beta_min", "M", "epsilon_t", "C_1", "C_2", "model_channels", "channel_mult"),
    *("channel_mult_emb", "channel_mult_noise", "attn_resolutions", "augment_dim", "label_dropout"),
    *("embedding_type", "resample_filter"),
}
_HEAD = 64  # channels of a head of DhariwalUNet
_FILTER = "resample_filter"
_LEVELS = "u"  # the buffer of iDDPMPrecond
_CLIP = 0.001  # C_1 of our cosine schedule: no beta is above 1 - C_1


def as_official(config: Node, state_dict: State) -> "OfficialPrecond":
    """The official `EDMPrecond`, `VPPrecond`, `VEPrecond` or `iDDPMPrecond` with these weights.

    config: the arguments of the class, and its name as `precond` (EDMPrecond). `use_fp16` and `label_dropout` have no
    effect: it runs in float32 with the labels it is given. InputError: weights of another configuration.
    """
    renaming.refuse_unknown(config, _ARGUMENTS)
    parts = {"network": network_part(config)}
    renaming.fill_parts(parts, without_constants(config, state_dict))
    return OfficialPrecond(config, parts).eval()


def precond_of(config: Node) -> str:
    """The class."""
    one_of("precond", name := config.get("precond", "EDMPrecond"), tuple(PRECONDS))
    return name


def with_defaults(config: Node) -> dict[str, Any]:
    """The arguments, and those left out that shape the network."""
    one_of("model_type", kind := config.get("model_type", PRECONDS[precond_of(config)]), tuple(_DEFAULTS))
    general = {"label_dim": 0, "augment_dim": 0, "channel_mult_emb": 4, "channel_mult_noise": 1, _FILTER: [1, 1]}
    return {**general, "attn_resolutions": [32, 16, 8], "model_type": kind, **_DEFAULTS[kind], **config}


def backbone_node(config: Node) -> dict[str, Any]:
    """Our backbone for the arguments of a class."""
    config = with_defaults(config)
    song, width, mults = config["model_type"] == "SongUNet", config["model_channels"], config["channel_mult"]
    attending = [
        2**level  # where levels are narrower than a head there is no attention, without a word
        for level, mult in enumerate(mults)
        if config["img_resolution"] >> level in config["attn_resolutions"] and (song or width * mult >= _HEAD)
    ]
    channels = config["img_channels"]
    return {
        "_target_": "ldmlab.backbones.edm_unet.EdmUNet",
        **{"in_channels": channels, "out_channels": channels * (2 if precond_of(config) == "iDDPMPrecond" else 1)},
        **{"form": "song" if song else "adm", "model_channels": width, "channel_mult": list(mults)},
        **{"attention_downsampling": attending, "middle_attention": song or width * mults[-1] >= _HEAD},
        **{"head_channels": None if song else _HEAD, "emb_channels": width * config["channel_mult_emb"]},
        "noise_channels": width * (config["channel_mult_noise"] if song else 1),
        **{"vector_width": config["label_dim"] or None, "augment_width": config["augment_dim"]},
        **{"fourier": config.get("embedding_type") == "fourier", _FILTER: list(config[_FILTER])},
        **{ours: config[theirs] for theirs, ours in _OPTIONS.items() if theirs in config},
    }


def diffusion_nodes(config: Node) -> dict[str, Any]:
    """Our path and prediction for the arguments of a class."""

    def node(name: str, /, **options: Any) -> dict[str, Any]:
        return {"_target_": f"ldmlab.diffusion.{name}", **options}

    kind, steps, least = precond_of(config), config.get("M", 1000), config.get("beta_min", 0.1)
    noise = node("parameterization.EpsPrediction")
    if kind == "EDMPrecond":
        path = node("paths.EdmPath")
        prediction = node("parameterization.EdmPrediction", sigma_data=config.get("sigma_data", 0.5))
    elif kind == "VEPrecond":
        path = node("paths.VarianceExplodingPath", **{k: config[k] for k in ("sigma_min", "sigma_max") if k in config})
        prediction = node("parameterization.ScorePrediction", times_sigma=True)
    elif kind == "VPPrecond":
        betas = {"beta_min": least, "beta_max": least + config.get("beta_d", 19.9)}
        path, prediction = node("paths.VariancePreservingPath", noise_time=steps - 1.0, **betas), noise
    else:
        if config.get("C_1", _CLIP) != _CLIP:
            raise InputError(f"iDDPMPrecond with C_1={config['C_1']} is not supported; supported: {_CLIP}.")
        path = node("schedule.Schedule", name="cosine", steps=steps, cosine_offset=config.get("C_2", 0.008))
        learned = {"prediction": node("parameterization.LearnedVariance", mean=noise)}
        return {"schedule": path, **learned, "loss": node("diffusion_loss.VariationalLoss")}
    return {"schedule": path, "prediction": prediction}


def network_part(config: Node) -> Part:
    """Our network for the arguments of a class, without weights, and the official names of its tensors."""
    config, network = with_defaults(config), renaming.unfilled(backbone_node(config), "backbone")
    sides = [config["img_resolution"] >> level for level in range(len(config["channel_mult"]))]
    blocks = list(block_names(config["img_resolution"], len(sides), config["num_blocks"]))
    first, *encoder = [name for name in blocks if name.startswith("enc")]
    shown = sides[::-1] if config.get("decoder_type") == "skip" else sides[:1]
    song = config["model_type"] == "SongUNet"
    lists = {
        **{"enc": encoder, "dec": [name for name in blocks if name.startswith("dec")]},
        "input": [f"enc.{side}x{side}_aux_{config.get('encoder_type')}" for side in sides[1:]],
        "out": [f"dec.{side}x{side}_aux" if song else "out" for side in shown],
    }
    table = renaming.names_of("edm", "network") | {"conv_in": f"model.{first}"}
    names = renaming.renamed(network.state_dict(), table, renaming.numbered(**lists))
    return Part("network", network, names, {name: 4 for name in names if name.endswith(("qkv.weight", ".out.weight"))})


def without_constants(config: Node, state: State) -> StateDict:
    """The tensors but those that follow from the configuration, as they must: resampling filters, noise levels."""
    row = torch.tensor(with_defaults(config)[_FILTER], dtype=torch.float32)
    known = torch.outer(row, row) / row.sum() ** 2
    kept = {name: tensor for name, tensor in state.items() if not name.endswith(_FILTER)}
    for name in state.keys() - kept.keys():
        if not _equal(state[name][0, 0], known, 1e-6, 0.0):
            raise InputError(f"{name} of the file is not {_FILTER}={row.tolist()}; give the configuration's.")
    levels = kept.pop(_LEVELS, None) if precond_of(config) == "iDDPMPrecond" else None
    if levels is not None and not _equal(levels, noise_levels(config), 0.0, 1e-3):  # float32's cost at the least noise
        raise InputError(f"{_LEVELS} of the file are not the noise levels of M, C_1 and C_2; give its own.")
    return kept


def _equal(tensor: Tensor, known: Tensor, atol: float, rtol: float) -> bool:
    return tensor.shape == known.shape and torch.allclose(tensor.float(), known, atol=atol, rtol=rtol)


def noise_levels(config: Node) -> Tensor:
    """sigma of `iDDPMPrecond`, (M + 1,), the last 0, rounded as it is there (EDM, table 1)."""
    steps = config.get("M", 1000)
    angles = 0.5 * math.pi * torch.arange(steps + 1) / steps / (config.get("C_2", 0.008) + 1)
    alpha_bar = angles.sin() ** 2
    ratios = (alpha_bar[:-1] / alpha_bar[1:]).clip(min=config.get("C_1", _CLIP))
    levels = [torch.zeros(())]
    for ratio in ratios.flip(0):
        levels.append(((levels[-1] ** 2 + 1) / ratio - 1).sqrt())
    return torch.stack(levels[::-1])


def config_of(state: State, given: Node) -> dict[str, Any]:
    """The arguments of a class."""
    sides = sorted(set(numbers_of(state, r"model\.enc\.(\d+)x")), reverse=True)
    if not sides:
        shape_of(state, "model.enc")
    first, song = sides[0], "model.out_norm.weight" not in state
    widths = [shape_of(state, f"model.enc.{side}x{side}_block0.conv0.weight")[0] for side in sides]
    base, channels = shape_of(state, f"model.enc.{first}x{first}_conv.weight")[:2]
    embedding, noise = shape_of(state, "model.map_layer0.weight")
    width = base if song else noise  # ADM's first convolution is as wide as the first level
    rows = shape_of(state, f"model.dec.{first}x{first}_aux_conv.weight" if song else "model.out_conv.weight")[0]
    joined = [kind for kind in ("residual", "skip") if any(name.endswith(f"_aux_{kind}.weight") for name in state)]
    filters = [tensor[0, 0].float().sum(0) for name, tensor in state.items() if name.endswith("resample_filter")]
    return {
        **{"precond": "iDDPMPrecond" if rows == 2 * channels else "EDMPrecond"},
        **{"model_type": "SongUNet" if song else "DhariwalUNet", "img_resolution": first, "img_channels": channels},
        **{"model_channels": width, "channel_mult": [each // width for each in widths]},
        **{"channel_mult_emb": embedding // width, "channel_mult_noise": noise // width if song else 1},
        "num_blocks": 1 + max(numbers_of(state, rf"model\.enc\.{first}x{first}_block(\d+)\.")),
        "attn_resolutions": [s for s in sides if f"model.enc.{s}x{s}_block0.qkv.weight" in state],
        "label_dim": state["model.map_label.weight"].shape[1] if "model.map_label.weight" in state else 0,
        "augment_dim": state["model.map_augment.weight"].shape[1] if "model.map_augment.weight" in state else 0,
        "embedding_type": "fourier" if "model.map_noise.freqs" in state else "positional",
        **{"encoder_type": joined[0] if joined else "standard"},
        **({"M": len(state[_LEVELS]) - 1} if _LEVELS in state else {}),
        "decoder_type": "skip" if len(numbers_of(state, r"model\.dec\.(\d+)x\d+_aux_norm\.w")) > 1 else "standard",
        **({"resample_filter": (filters[0] / filters[0][0]).tolist()} if filters else {}),
    }


class OfficialPrecond(OfficialModule):
    """Our network behind the official signature: clean estimate of x = clean + sigma noise."""

    network: EdmUNet

    def __init__(self, config: Node, parts: Mapping[str, Part]) -> None:
        super().__init__(parts)
        self.config, self.precond = with_defaults(config), precond_of(config)
        self.levels = noise_levels(config) if self.precond == "iDDPMPrecond" else None

    def forward(
        self,
        x: Tensor,  # (B, C, h, w)
        sigma: Tensor,  # (B,), or one for all
        class_labels: Tensor | None = None,  # (B, classes), one-hot; None: no class
        force_fp32: bool = True,  # it always is
        augment_labels: Tensor | None = None,  # (B, augment_dim); None: not augmented
    ) -> Tensor:
        """c_skip x + c_out F(c_in x, c_noise) (Karras et al. 2022, equation 7 and table 1), float32."""
        x, sigma = x.float(), torch.as_tensor(sigma).float().reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in = self.scales(sigma)
        time = self.c_noise(sigma.flatten()).expand(len(x))
        return c_skip * x + c_out * self.raw(c_in * x, time, class_labels, augment_labels)[:, : x.shape[1]]

    def scales(self, sigma: Tensor) -> tuple[Tensor | float, Tensor, Tensor | float]:
        """c_skip, c_out and c_in."""
        if self.precond == "VEPrecond":
            return 1.0, sigma, 1.0
        if self.precond != "EDMPrecond":
            return 1.0, -sigma, 1 / (sigma**2 + 1).sqrt()
        data = self.config.get("sigma_data", 0.5)
        total = sigma**2 + data**2
        return data**2 / total, sigma * data / total.sqrt(), 1 / total.sqrt()

    def c_noise(self, sigma: Tensor) -> Tensor:
        """What the network receives, (B,), rounded as it is there."""
        steps = self.config.get("M", 1000)
        if self.precond == "EDMPrecond":
            return sigma.log() / 4
        if self.precond == "VEPrecond":
            return (0.5 * sigma).log()
        if self.precond == "VPPrecond":
            width, least = self.config.get("beta_d", 19.9), self.config.get("beta_min", 0.1)
            return (steps - 1) * (((least**2 + 2 * width * (1 + sigma**2).log()).sqrt() - least) / width)
        assert self.levels is not None
        nearest = torch.cdist(sigma[None, :, None], self.levels.to(sigma)[None, :, None]).argmin(2)[0]
        return (steps - 1 - nearest).to(sigma)

    def raw(
        self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """The official `SongUNet` or `DhariwalUNet`: F, before preconditioning."""
        parts = []
        for width, labels, scale in (
            (self.config["label_dim"], class_labels, math.sqrt(self.config["label_dim"])),
            (self.config["augment_dim"], augment_labels, 1.0),
        ):
            if width:
                labels = x.new_zeros(1, width) if labels is None else labels.to(x).reshape(-1, width)
                parts.append((scale * labels).expand(len(x), -1))
        return self.network(x, c_noise, Conditioning(vector=torch.cat(parts, dim=1) if parts else None))
