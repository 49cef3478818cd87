"""Options and tensors of the official networks, and ours, both ways.

See `openaimodel.py`, `model.py` and `ldm/modules/encoders/modules.py` in CompVis/latent-diffusion, and the latter in
CompVis/stable-diffusion and Stability-AI/stablediffusion.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.conditioners.layout_tokens import LayoutTokens
from ldmlab.conditioners.semantic_map import SpatialRescaler
from ldmlab.conditioners.text import OpenClipText, TransformerText
from ldmlab.errors import InputError
from ldmlab.interop import renaming
from ldmlab.interop.renaming import OPTIONS, Names, Node, Part, State

UNET = "model.diffusion_model."
FIRST_STAGE = "first_stage_model."
CONDITIONER = "cond_stage_model."
AVERAGED = "model_ema."
LOSS = "loss."  # discriminator and perceptual network of a first stage's training
CLASS_TABLE = "label_emb.weight"  # with num_classes: rows are the U-Net's vector conditioning, in a conditioner here
SCHEDULES = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine", "sqrt": "sqrt"}  # official => ours
BUFFERS = tuple(OPTIONS["compvis"]["buffers"])
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


_UNET = OPTIONS["compvis"]["unet"]
_UNET_OURS, _UNET_DEFAULTS, _UNET_ONLY = (_UNET[name] for name in ("ours", "defaults", "only"))
_UNET_KNOWN = {*_UNET_OURS, *_UNET_ONLY, *_UNET["without_effect"]}
_UNET_KNOWN |= {"num_heads_upsample", "use_spatial_transformer", "num_classes"}


def unet_arguments(params: Mapping[str, Any]) -> dict[str, Any]:
    """Our U-Net's arguments for the `params` of an official `unet_config`."""
    _check_unet(params)
    options = _UNET_DEFAULTS | dict(params)
    if not params.get("use_spatial_transformer"):
        options["context_dim"] = None
    if options["num_head_channels"] != -1:  # wins over num_heads in the official code
        options["num_heads"] = -1
    ours = {name: _plain(official, options[official]) for official, name in _UNET_OURS.items()}
    ours |= {name: None for name in ("heads", "head_channels") if ours[name] == -1}
    classes = params.get("num_classes")
    if classes is None:
        return ours
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
        raise InputError(f"unet_config.params.num_classes={classes} is not supported; supported: a number of classes.")
    # rows of the official class table are as wide as the time vector and added to it as they are
    return ours | {"vector_width": 4 * params["model_channels"], "project_vector": False}


def _check_unet(params: Mapping[str, Any]) -> None:
    missing = [name for name in _UNET_OURS if name not in _UNET_DEFAULTS.keys() | params.keys()]
    missing += ["context_dim"] if params.get("use_spatial_transformer") and not params.get("context_dim") else []
    if missing:
        raise InputError(f"unet_config.params has no {', '.join(missing)}; give the whole official configuration.")
    _check_known("unet_config.params", params, _UNET_ONLY, _UNET_KNOWN, "U-Net")
    if params.get("num_heads_upsample", -1) not in (-1, params.get("num_heads", -1)):
        raise InputError(
            "unet_config.params.num_heads_upsample differs from num_heads, but ldmlab's U-Net needs one value."
        )


def _check_known(where: str, options: Mapping[str, Any], only: Mapping[str, Any], known: set[str], what: str) -> None:
    for name, value in options.items():
        if name in only and value != only[name]:
            raise InputError(f"{where}.{name}={value} is not supported; supported: {only[name]}.")
        if name not in known:
            raise InputError(f"{where}.{name}={value} is no option of the official {what}; check the file.")


def _plain(name: str, value: Any) -> Any:
    """Lists as lists, and one number for what may be repeated."""
    if name in _UNET["one"] and value is not None:
        numbers = {value} if isinstance(value, int) else set(value)
        if len(numbers) != 1:
            raise InputError(
                f"unet_config.params.{name}={value} differs between levels, but ldmlab's U-Net needs one value."
            )
        return int(numbers.pop())
    return value if isinstance(value, bool | int | float) or value is None else list(value)


def unet_params_of(node: Mapping[str, Any], classes: int | None = None) -> dict[str, Any]:
    """The official `params` of a U-Net of ours, and of its class table: the inverse of `unet_arguments`."""
    if node.get("vector_width") and (classes is None or node.get("project_vector", True)):
        raise InputError(
            "the official U-Net of CompVis takes no vector conditioning but the rows of a class table, as they are "
            "(backbone.project_vector=false); export another format."
        )
    usual = {"coordinates": False, "asymmetric_downsampling": False, "norm_eps": 1e-5, "frequency_shift": 0}
    for option, value in {**usual, "numbers": 0}.items():
        if node.get(option, value) != value:
            raise InputError(
                f"backbone.{option}={node[option]} is no option of the official U-Net; use --format ldmlab."
            )
    given = {official: node[ours] for official, ours in _UNET_OURS.items() if node.get(ours) is not None}
    params = {official: _plain(official, value) for official, value in given.items()}
    params["image_size"] = 32  # read by nothing
    if node.get("context_width"):
        params |= {"use_spatial_transformer": True, "legacy": False}
    return params | ({} if classes is None else {"num_classes": classes})


RESOLUTION = 256  # of the official files: the image size at which `attn_resolutions` are counted
_CLASSES = {"AutoencoderKL": "kl.KLAutoencoder", "VQModel": "vq.VQModel", "VQModelInterface": "vq.VQModel"}
_STAGE = OPTIONS["compvis"]["first_stage"]
_STAGE_OURS, _STAGE_ONLY = _STAGE["ours"], _STAGE["only"]
_STAGE_KNOWN = {*_STAGE_OURS, *_STAGE_ONLY, "attn_resolutions", "resolution", "attn_type", "double_z"}


def first_stage_arguments(target: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """An official configuration's `target` and `params` as `_target_` and arguments of our class."""
    name = target.rpartition(".")[2]
    if name not in _CLASSES:
        raise InputError(f"first stage target={target} is not supported; supported: {', '.join(_CLASSES)}.")
    vq = name != "AutoencoderKL"
    _check_first_stage(params, vq=vq)
    network = {"dropout": 0.0, **params["ddconfig"]}
    attends = network.get("attn_type", "vanilla") != "none"
    sizes = [network["resolution"] // 2**level for level in range(len(network["ch_mult"]))]
    return {
        "_target_": f"ldmlab.first_stages.{_CLASSES[name]}",
        **{ours: network[official] for official, ours in _STAGE_OURS.items()},
        "channel_mult": list(network["ch_mult"]),
        "attention_downsampling": [
            2**level for level, size in enumerate(sizes) if attends and size in network["attn_resolutions"]
        ],
        "mid_attention": attends,
        "latent_channels": params["embed_dim"],
        **({"codebook_size": params["n_embed"]} if vq else {}),
    }


def target_of(params: Mapping[str, Any]) -> str:
    """The official class that `params` belong to: with a codebook it is the VQ model."""
    return "ldm.models.autoencoder." + ("VQModelInterface" if "n_embed" in params else "AutoencoderKL")


def _check_first_stage(params: Mapping[str, Any], *, vq: bool) -> None:
    network = params.get("ddconfig", {})
    missing = [name for name in ("embed_dim", "ddconfig", *(("n_embed",) if vq else ())) if name not in params]
    needed = {*_STAGE_OURS, "attn_resolutions", "resolution"} - {"dropout"}
    missing += [f"ddconfig.{name}" for name in sorted(needed - network.keys()) if "ddconfig" in params]
    if missing:
        raise InputError(f"first_stage_config.params has no {', '.join(missing)}; give the whole configuration.")
    for name in params.keys() - {*_STAGE["without_effect"]} - {"embed_dim", "ddconfig", "n_embed"}:
        raise InputError(f"first_stage_config.params.{name} is no option of the official first stages; check the file.")
    _check_known("ddconfig", network, _STAGE_ONLY, _STAGE_KNOWN, "first stages")
    if network.get("double_z", not vq) == vq:
        raise InputError(f"ddconfig.double_z={network['double_z']} fits no first stage; true is for KL, false for VQ.")
    if network.get("attn_type", "vanilla") not in ("vanilla", "vanilla-xformers", "none"):
        raise InputError(f"ddconfig.attn_type={network['attn_type']} is not supported; supported: vanilla and none.")


def first_stage_params_of(node: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The official target and `params` of a first stage of ours: the inverse of `first_stage_arguments`."""
    renaming.refuse_cosine(node)
    kind = str(node["_target_"]).rpartition(".")[2]
    plain = node.get("norm_groups", 32) == 32 and node.get("latent_projection", True)
    plain = plain and all(factor == int(factor) for factor in node["channel_mult"])
    if kind not in ("KLAutoencoder", "VQModel") or not plain:
        options = {name: node[name] for name in ("norm_groups", "latent_projection", "channel_mult") if name in node}
        raise InputError(f"first_stage={kind} ({options}) has no official counterpart.")
    width = node["latent_channels"]
    full = {"channels": 128, "num_res_blocks": 2, "dropout": 0.0, **node}
    full["bottleneck_channels"] = node.get("bottleneck_channels") or width
    network = {
        "double_z": kind == "KLAutoencoder",
        "resolution": RESOLUTION,
        "in_channels": 3,
        "out_ch": 3,
        **{official: full[ours] for official, ours in _STAGE_OURS.items()},
        "ch_mult": [int(factor) for factor in node["channel_mult"]],  # theirs multiply whole numbers
        "attn_resolutions": [RESOLUTION // factor for factor in node.get("attention_downsampling", ())],
    }
    if not node.get("mid_attention", True):
        if network["attn_resolutions"]:
            raise InputError("first_stage.mid_attention=false with attention in levels has no official counterpart.")
        network["attn_type"] = "none"
    params = {"embed_dim": width, "ddconfig": network, "lossconfig": {"target": "torch.nn.Identity"}}
    params |= {"n_embed": node["codebook_size"]} if kind == "VQModel" else {}
    return target_of(params), params
