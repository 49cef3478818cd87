"""Options of the official U-Net (`openaimodel.py` of CompVis/latent-diffusion) and ours, both ways."""

from collections.abc import Mapping
from typing import Any

from ldmlab.errors import InputError
from ldmlab.interop.renaming import OPTIONS

_TABLES = OPTIONS["compvis"]["unet"]
_OURS, _DEFAULTS, _ONLY = (_TABLES[name] for name in ("ours", "defaults", "only"))
_KNOWN = {*_OURS, *_ONLY, *_TABLES["without_effect"], "num_heads_upsample", "use_spatial_transformer", "num_classes"}


def arguments(params: Mapping[str, Any]) -> dict[str, Any]:
    """Our U-Net's arguments for the `params` of an official `unet_config`."""
    _check(params)
    options = _DEFAULTS | dict(params)
    if not params.get("use_spatial_transformer"):
        options["context_dim"] = None
    if options["num_head_channels"] != -1:  # wins over num_heads in the official code
        options["num_heads"] = -1
    ours = {name: _plain(official, options[official]) for official, name in _OURS.items()}
    ours |= {name: None for name in ("heads", "head_channels") if ours[name] == -1}
    classes = params.get("num_classes")
    if classes is None:
        return ours
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
        raise InputError(f"unet_config.params.num_classes={classes} is not supported; supported: a number of classes.")
    # rows of the official class table are as wide as the time vector and added to it as they are
    return ours | {"vector_width": 4 * params["model_channels"], "project_vector": False}


def _check(params: Mapping[str, Any]) -> None:
    missing = [name for name in _OURS if name not in _DEFAULTS.keys() | params.keys()]
    missing += ["context_dim"] if params.get("use_spatial_transformer") and not params.get("context_dim") else []
    if missing:
        raise InputError(f"unet_config.params has no {', '.join(missing)}; give the whole official configuration.")
    for name, value in params.items():
        if name in _ONLY and value != _ONLY[name]:
            raise InputError(f"unet_config.params.{name}={value} is not supported; supported: {_ONLY[name]}.")
        if name not in _KNOWN:
            raise InputError(f"unet_config.params.{name}={value} is no option of the official U-Net; check the file.")
    if params.get("num_heads_upsample", -1) not in (-1, params.get("num_heads", -1)):
        raise InputError(
            "unet_config.params.num_heads_upsample differs from num_heads, but ldmlab's U-Net needs one value."
        )


def _plain(name: str, value: Any) -> Any:
    """Lists as lists, and one number for what may be repeated."""
    if name in _TABLES["one"] and value is not None:
        numbers = {value} if isinstance(value, int) else set(value)
        if len(numbers) != 1:
            raise InputError(
                f"unet_config.params.{name}={value} differs between levels, but ldmlab's U-Net needs one value."
            )
        return int(numbers.pop())
    return value if isinstance(value, bool | int | float) or value is None else list(value)


def params_of(node: Mapping[str, Any], classes: int | None = None) -> dict[str, Any]:
    """The official `params` of a U-Net of ours, and of its class table: the inverse of `arguments`."""
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
    given = {official: node[ours] for official, ours in _OURS.items() if node.get(ours) is not None}
    params = {official: _plain(official, value) for official, value in given.items()}
    params["image_size"] = 32  # read by nothing
    if node.get("context_width"):
        params |= {"use_spatial_transformer": True, "legacy": False}
    return params | ({} if classes is None else {"num_classes": classes})
