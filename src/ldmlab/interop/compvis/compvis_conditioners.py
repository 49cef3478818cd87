"""Configurations of the official conditioners (`cond_stage_config`) and our nodes, both ways."""

from collections.abc import Callable, Mapping
from typing import Any

from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.conditioners.layout_tokens import LayoutTokens
from ldmlab.conditioners.semantic_map import SpatialRescaler
from ldmlab.conditioners.text import OpenClipText, TransformerText
from ldmlab.errors import InputError
from ldmlab.interop.renaming import OPTIONS, State, clip_node

Params = Mapping[str, Any]
Node = dict[str, Any]

_HOME = "ldmlab.conditioners."
MODULES = "ldm.modules.encoders.modules."
_HEADS = 8  # of the paper's transformer, always
_IMAGENET_ROWS = 1001  # the classes and, last, "no class"
_TRANSFORMER, _RESCALER, _TEXT = (OPTIONS["compvis"][name] for name in ("transformer", "rescaler", "texts"))
_VIT_L, _VIT_H = "openai/clip-vit-large-patch14", "ViT-H-14"
_TEXT_NAMES = (  # tokens, positions, blocks and their first linear layer, as Hugging Face and open_clip name them
    ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "layers.", "mlp.fc1.weight"),
    ("model.token_embedding.weight", "model.positional_embedding", "resblocks.", "mlp.c_fc.weight"),
)


def arguments(target: str, params: Params, official: State | None = None) -> Node:
    """An official `target` and `params` as the node of our conditioner (`_target_` and arguments).

    With the file's tensors (`official`, no prefix) text towers of any size are recognised by their shapes, and what a
    file left out because nothing runs it is not required. A CLIP may be described by transformers' `CLIPTextConfig`.
    """
    name = target.rpartition(".")[2]
    if "hidden_size" in params and name.endswith(("FrozenCLIPEmbedder", "CLIPTextModel")):
        fields = {"intermediate_size": 4 * params["hidden_size"], **params}
        return clip_node(fields, layer=params.get("layer", "last"), padding=params.get("padding", "end"))
    readers: dict[str, Callable[[Params, State | None], Node]] = {
        "ClassEmbedder": _class_embedder,
        "TransformerEmbedder": _transformer,
        "BERTEmbedder": _transformer,
        "SpatialRescaler": lambda params, official: _translated("semantic_map.SpatialRescaler", params, _RESCALER),
        "FrozenCLIPEmbedder": _clip,
        "FrozenOpenCLIPEmbedder": _open_clip,
    }
    if name not in readers:
        raise InputError(f"conditioner target={target} is not supported; supported: {', '.join(readers)}.")
    return readers[name](params, official)


def _translated(target: str, params: Params, table: Mapping[str, tuple[str, Any]]) -> Node:
    options = {ours: params.get(name, default) for name, (ours, default) in table.items()}
    return {"_target_": _HOME + target, **options}


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
        node = _translated("text.TransformerText", params, _TRANSFORMER) | {"length": length}
    else:
        node = _translated("layout_tokens.LayoutTokens", params, _TRANSFORMER)
        node |= {"objects": objects, "crop_tokens": rest == 2}
    head = official is None or any(".to_logits." in key for key in official)
    return node | {"drop": 0.0, "unused_head": head}


def _clip(params: Params, official: State | None) -> Node:
    """SD 1.x: the last layer or its pooled state, padded with the end token, quick GELU."""
    node = _text_node(params, official, "version", _VIT_L, ("last", "pooled"))
    node["config"]["quick_gelu"] = True
    return node | {"padding": "end"}


def _open_clip(params: Params, official: State | None) -> Node:
    """SD 2.x: padded with zeros; the unused block and projection are kept if present."""
    node = _text_node(params, official, "arch", _VIT_H, ("last", "penultimate"))
    unused = official is None or "model.text_projection" in official
    if node["layer"] == "penultimate" and not unused and _is(node["config"]["text_cfg"], _VIT_H, fewer_layers=1):
        node["layer"] = "last"  # a file without the block that is not run
    if official is not None and unused:
        node["config"]["embed_dim"] = official["model.text_projection"].shape[1]
    return node | {"padding": "zero", "unused": unused}


def _text_node(params: Params, official: State | None, option: str, usual: str, layers: tuple[str, ...]) -> Node:
    """An open_clip tower, its configuration from the tensors, else by name."""
    layer, version = params.get("layer", "last"), params.get(option, usual)
    if layer not in layers:
        raise InputError(f"conditioner layer={layer} is not supported; supported: {', '.join(layers)}.")
    text = None if official is None else _text_of(official)
    if text is None and version not in _TEXT:
        raise InputError(f"conditioner {option}={version} is not supported; supported: {', '.join(_TEXT)}.")
    text = text or _TEXT[version]
    return {
        "_target_": _HOME + "text.open_clip_text",
        "config": {"embed_dim": text["width"], "quick_gelu": False, "text_cfg": text},
        "layer": layer,
        "drop": 0.0,
        "trainable": not params.get("freeze", True),
    }


def _text_of(official: State) -> Node | None:
    """The text configuration of the tensors, in either naming; None where the first ones are missing."""
    for tokens, positions, block, expand in _TEXT_NAMES:
        table, rows, mlp = (
            next((tensor.shape for key, tensor in official.items() if key.endswith(end)), None)
            for end in (tokens, positions, expand)
        )
        numbers = {int(key.split(block)[1].split(".")[0]) for key in official if block in key}
        if table is not None and rows is not None and mlp is not None and numbers:
            width, ratio = table[1], {} if mlp[0] == 4 * table[1] else {"mlp_ratio": mlp[0] / table[1]}
            sizes = {"context_length": rows[0], "vocab_size": table[0], "width": width, "heads": max(width // 64, 1)}
            return sizes | {"layers": max(numbers) + 1} | ratio
    return None


def _is(text: Node, version: str, fewer_layers: int = 0) -> bool:
    """Whether a text configuration is a published one, or that without its last layers."""
    expected = _TEXT[version]
    return text == expected | {"layers": expected["layers"] - fewer_layers}


def official_config(conditioner: Any) -> dict[str, Any]:
    """`target` and `params` of the official class that our conditioner is; InputError where there is none."""
    if isinstance(conditioner, ClassEmbedder):
        rows, width = conditioner.embedding.weight.shape
        return _config("ClassEmbedder", embed_dim=width, n_classes=rows, key="class_label")
    if isinstance(conditioner, (TransformerText, LayoutTokens)):
        transformer = conditioner.transformer
        if transformer.heads != _HEADS:
            raise InputError(
                f"conditioner.heads={transformer.heads}: the official class has {_HEADS}; export with --format ldmlab."
            )
        vocabulary, width = transformer.tokens.weight.shape
        sizes = {"n_embed": width, "n_layer": len(transformer.blocks), "vocab_size": vocabulary}
        tokenizer = {} if isinstance(conditioner, TransformerText) else {"use_tokenizer": False}
        return _config("BERTEmbedder", **sizes, max_seq_len=transformer.length, **tokenizer)
    if isinstance(conditioner, SpatialRescaler):
        plain = ("in_channels", "n_stages", "multiplier", "method")
        params = {name: getattr(conditioner, _RESCALER[name][0]) for name in plain}
        if (mapper := conditioner.channels) is not None:
            params |= {"out_channels": mapper.out_channels} | ({} if mapper.bias is None else {"bias": True})
        return _config("SpatialRescaler", **params)
    if isinstance(conditioner, OpenClipText):
        return _text_config(conditioner)
    raise InputError(f"conditioner {type(conditioner).__name__} has no official class; export with --format ldmlab.")


def _config(name: str, **params: Any) -> dict[str, Any]:
    return {"target": MODULES + name, "params": params}


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
    arch = _VIT_H if cut or _is(text, _VIT_H) else None
    return _config("FrozenOpenCLIPEmbedder", arch=arch, layer="penultimate" if cut else layer)
