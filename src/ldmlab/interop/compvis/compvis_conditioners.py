"""Configurations of the official conditioners (`cond_stage_config`) and our nodes, both ways."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.conditioners.layout_tokens import LayoutTokens
from ldmlab.conditioners.semantic_map import SpatialRescaler
from ldmlab.conditioners.text import OpenClipText, TransformerText
from ldmlab.errors import InputError
from ldmlab.nn.attention import TransformerEncoder

Params = Mapping[str, Any]
Node = dict[str, Any]
State = Mapping[str, Tensor]

_HOME = "ldmlab.conditioners."
_MODULES = "ldm.modules.encoders.modules."
_HEADS = 8  # of the paper's transformer, always
_IMAGENET_ROWS = 1001  # the classes and, last, "no class"
_VIT_L, _VIT_H = "openai/clip-vit-large-patch14", "ViT-H-14"
_TEXT = {  # official `version` or `arch` => open_clip's text configuration
    _VIT_L: {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
    _VIT_H: {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}


def arguments(target: str, params: Params, official: State | None = None) -> Node:
    """An official `target` and `params` as the node of our conditioner (`_target_` and arguments).

    With the file's tensors (`official`, no prefix) text towers of any size are recognised by their shapes, and what a
    file left out because nothing runs it is not required.
    """
    name = target.rpartition(".")[2]
    readers: dict[str, Callable[[Params, State | None], Node]] = {
        "ClassEmbedder": _class_embedder,
        "TransformerEmbedder": _transformer,
        "BERTEmbedder": _transformer,
        "SpatialRescaler": _rescaler,
        "FrozenCLIPEmbedder": _clip,
        "FrozenOpenCLIPEmbedder": _open_clip,
    }
    if name not in readers:
        raise InputError(f"conditioner target={target} is not supported; supported: {', '.join(readers)}.")
    return readers[name](params, official)


def _class_embedder(params: Params, official: State | None) -> Node:
    """The last row means "no class" in ImageNet's table of 1001, and where training had a `ucg_rate`."""
    rows, rate = params.get("n_classes", 1000), params.get("ucg_rate", 0.0)
    null_row = rows == _IMAGENET_ROWS or rate > 0
    node = {"_target_": _HOME + "class_label.ClassEmbedder", "classes": rows - null_row, "width": params["embed_dim"]}
    return node | {"drop": rate, "null_row": null_row}


def _transformer(params: Params, official: State | None) -> Node:
    """Captions, or boxes where no tokenizer is used and the length is that of triples and two crop corners."""
    length = params.get("max_seq_len", 77)
    objects, rest = divmod(length, 3)
    if params.get("use_tokenizer", True) or rest == 1:
        kind = {"_target_": _HOME + "text.TransformerText", "length": length}
    else:
        kind = {"_target_": _HOME + "layout_tokens.LayoutTokens", "objects": objects, "crop_tokens": rest == 2}
    return kind | {
        "width": params["n_embed"],
        "depth": params["n_layer"],
        "vocab_size": params.get("vocab_size", 30522),
        "drop": 0.0,
        "unused_head": official is None or any(".to_logits." in key for key in official),
    }


def _rescaler(params: Params, official: State | None) -> Node:
    return {
        "_target_": _HOME + "semantic_map.SpatialRescaler",
        "classes": params.get("in_channels", 3),
        "channels": params.get("out_channels"),
        "stages": params.get("n_stages", 1),
        "multiplier": params.get("multiplier", 0.5),
        "method": params.get("method", "bilinear"),
        "bias": params.get("bias", False),
    }


def _clip(params: Params, official: State | None) -> Node:
    """SD 1.x: the last layer or its pooled state, padded with the end token, quick GELU."""
    text = _text("version", params.get("version", _VIT_L), params, ("last", "pooled"), official)
    return _text_node(text, params, params.get("layer", "last"), padding="end", quick_gelu=True)


def _open_clip(params: Params, official: State | None) -> Node:
    """SD 2.x: padded with zeros; the unused block and projection are kept if present."""
    layer = params.get("layer", "last")
    text = _text("arch", params.get("arch", _VIT_H), params, ("last", "penultimate"), official)
    unused = official is None or "model.text_projection" in official
    if layer == "penultimate" and not unused and _is(text, _VIT_H, fewer_layers=1):
        layer = "last"  # a file without the block that is not run
    node = _text_node(text, params, layer, padding="zero", quick_gelu=False) | {"unused": unused}
    if official is not None and unused:
        node["config"]["embed_dim"] = official["model.text_projection"].shape[1]
    return node


def _text(option: str, version: Any, params: Params, layers: tuple[str, ...], official: State | None) -> Node:
    """open_clip's text configuration: from the tensors, else by name."""
    layer = params.get("layer", "last")
    if layer not in layers:
        raise InputError(f"conditioner layer={layer} is not supported; supported: {', '.join(layers)}.")
    text = None if official is None else _text_of(official)
    if text is None and version not in _TEXT:
        raise InputError(f"conditioner {option}={version} is not supported; supported: {', '.join(_TEXT)}.")
    return _TEXT[version] if text is None else text


def _text_of(official: State) -> Node | None:
    """The text configuration of the tensors, in either naming; None where the first ones are missing."""
    for tokens, positions, blocks, expand in (
        ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "layers", "mlp.fc1.weight"),
        ("model.token_embedding.weight", "model.positional_embedding", "resblocks", "mlp.c_fc.weight"),
    ):
        found = [key for key in official if key.endswith((tokens, positions))]
        numbers = {int(key.split(f"{blocks}.")[1].split(".")[0]) for key in official if f"{blocks}." in key}
        mlp = [tensor.shape[0] for key, tensor in official.items() if key.endswith(expand)]
        if len(found) == 2 and numbers and mlp:
            vocabulary, width = next(official[key].shape for key in found if key.endswith(tokens))
            context = next(official[key].shape[0] for key in found if key.endswith(positions))
            sizes = {"context_length": context, "vocab_size": vocabulary, "width": width, "heads": max(width // 64, 1)}
            return sizes | {"layers": max(numbers) + 1} | ({} if mlp[0] == 4 * width else {"mlp_ratio": mlp[0] / width})
    return None


def _is(text: Node, version: str, fewer_layers: int = 0) -> bool:
    """Whether a text configuration is a published one, or that without its last layers."""
    expected = _TEXT[version]
    return text == expected | {"layers": expected["layers"] - fewer_layers}


def _text_node(text: Node, params: Params, layer: str, *, padding: str, quick_gelu: bool) -> Node:
    return {
        "_target_": _HOME + "text.open_clip_text",
        "config": {"embed_dim": text["width"], "quick_gelu": quick_gelu, "text_cfg": text},
        "layer": layer,
        "padding": padding,
        "drop": 0.0,
        "trainable": not params.get("freeze", True),
    }


def official_config(conditioner: nn.Module) -> dict[str, Any]:
    """`target` and `params` of the official class that our conditioner is; InputError where there is none."""
    if isinstance(conditioner, ClassEmbedder):
        rows, width = conditioner.embedding.weight.shape
        return _config("ClassEmbedder", embed_dim=width, n_classes=rows, key="class_label")
    if isinstance(conditioner, (TransformerText, LayoutTokens)):
        tokenizer = {} if isinstance(conditioner, TransformerText) else {"use_tokenizer": False}
        return _config("BERTEmbedder", **_transformer_params(conditioner.transformer), **tokenizer)
    if isinstance(conditioner, SpatialRescaler):
        return _config("SpatialRescaler", **_rescaler_params(conditioner))
    if isinstance(conditioner, OpenClipText):
        return _text_config(conditioner)
    raise InputError(f"conditioner {type(conditioner).__name__} has no official class; export with --format ldmlab.")


def _config(name: str, **params: Any) -> dict[str, Any]:
    return {"target": _MODULES + name, "params": params}


def _transformer_params(transformer: TransformerEncoder) -> dict[str, Any]:
    vocabulary, width = transformer.tokens.weight.shape
    heads = transformer.heads
    if heads != _HEADS:
        raise InputError(f"conditioner.heads={heads}: the official class has {_HEADS}; export with --format ldmlab.")
    depth, length = len(transformer.blocks), transformer.length
    return {"n_embed": width, "n_layer": depth, "vocab_size": vocabulary, "max_seq_len": length}


def _rescaler_params(rescaler: SpatialRescaler) -> dict[str, Any]:
    params = {
        "n_stages": rescaler.stages,
        "method": rescaler.method,
        "multiplier": rescaler.multiplier,
        "in_channels": rescaler.classes,
    }
    if rescaler.channels is None:
        return params
    bias = {} if rescaler.channels.bias is None else {"bias": True}
    return params | {"out_channels": rescaler.channels.out_channels} | bias


def _text_config(conditioner: OpenClipText) -> dict[str, Any]:
    """`version` or `arch` is null for a tower without a published name; the user fills in a folder."""
    config, layer = conditioner.node["config"], conditioner.tower.layer
    text = {"context_length": 77, "vocab_size": 49408, **config["text_cfg"]}
    if config.get("quick_gelu"):
        if layer == "penultimate":
            raise InputError("conditioner.layer=penultimate: the official class has none; use --format diffusers.")
        return _config("FrozenCLIPEmbedder", version=_VIT_L if _is(text, _VIT_L) else None, layer=layer)
    if layer == "pooled":
        raise InputError("conditioner.layer=pooled: the official class has none; export with --format ldmlab.")
    cut = layer == "last" and _is(text, _VIT_H, fewer_layers=1)
    named = cut or _is(text, _VIT_H)
    layer = "penultimate" if cut else layer
    return _config("FrozenOpenCLIPEmbedder", arch=_VIT_H if named else None, layer=layer)
