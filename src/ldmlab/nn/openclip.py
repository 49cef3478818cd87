"""CLIP models of open_clip: published ones by name, our own by configuration.

A configuration is open_clip's own (`embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu`, `custom_text`), plus `mean` and
`std` of the pixels. A model is built from it and the weights without network access.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.errors import InputError, did_you_mean, first_line, one_of, shown
from ldmlab.files import weights_folder
from ldmlab.nn.blocks import LayerNorm
from ldmlab.nn.compiling import region

region(ResidualAttentionBlock)
Config = dict[str, Any]
_LEAST_TOKENS = 2 * 256 + 2  # bytes, those that end a word, and the two special ones


@dataclass(frozen=True)
class OpenClip:
    """A CLIP model with what its two inputs need."""

    model: nn.Module  # encode_image, encode_text, logit_scale; names of tensors as in open_clip
    tokenizer: SimpleTokenizer
    config: Config  # rebuilds the model, see above
    image_size: int  # px, square
    mean: tuple[float, ...]  # of RGB in [0, 1]
    std: tuple[float, ...]

    @property
    def node(self) -> Config:
        """For model.yaml: what `build_clip` needs to rebuild the model without a network."""
        return {"_target_": "ldmlab.nn.openclip.build_clip", "config": self.config}

    def pixels(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], any size => normalised (B, 3, image_size, image_size)."""
        return clip_pixels(images, self.image_size, self.mean, self.std)

    def ids(self, captions: Sequence[str]) -> Tensor:
        """Captions => token ids (B, L), cut to the model's context length."""
        return self.tokenizer(list(captions))


def clip_pixels(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) in [-1, 1], any size => (B, 3, size, size), resized bicubically and normalised."""
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    # filled on the device: a copy from here would wait for it
    centre, spread = (torch.stack([images.new_full((1, 1), x) for x in v]) for v in (mean, std))  # (3, 1, 1)
    return ((images + 1) / 2 - centre) / spread


def build_clip(
    name: str | None = None,  # of a published architecture, such as ViT-B-32
    pretrained: str | None = None,  # with name: tag of published weights or path of a file; None: fresh weights
    config: Mapping[str, Any] | None = None,  # instead of name: our own architecture, fresh weights
    image_size: int | None = None,  # with a config whose vision_cfg names none; derived in wiring
) -> OpenClip:
    """A CLIP model on the CPU in training mode; exactly one of `name` and `config`."""
    check_source("clip", name, pretrained, config)
    if name is not None:
        model, full = _published(name, pretrained)
    else:
        assert config is not None
        full = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD} | _sized(config, image_size)
        model = from_config(full)
    size = model.visual.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    if height != width:
        raise InputError(f"the CLIP image tower takes {height} x {width} images; choose one with square images.")
    mean, std = tuple(full["mean"]), tuple(full["std"])
    full |= {"mean": list(mean), "std": list(std)}
    return OpenClip(model, make_tokenizer(full), full, height, mean, std)


def check_source(
    where: str, name: str | None, pretrained: str | None, config: Mapping[str, Any] | None, weights: str | None = None
) -> None:
    """InputError unless a published architecture or one of our own is named, not both, and nothing for the other."""
    if (name is None) == (config is None):
        raise InputError(f"{where}.name={name} and {where}.config={shown(config)}: give exactly one of them.")
    if name is None and pretrained is not None:
        raise InputError(f"{where}.pretrained={pretrained} has no effect without {where}.name; give both or neither.")
    if config is None and weights is not None:
        raise InputError(f"{where}.weights={weights} has no effect without {where}.config; use {where}.pretrained.")


def from_config(config: Mapping[str, Any]) -> Any:
    """The open_clip class for a configuration, with fresh weights."""
    arguments = {k: v for k, v in _plain(config).items() if k not in ("mean", "std", "custom_text")}
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    try:
        return _keeping_dtypes(kind(**arguments))
    except InputError:  # of a size
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"clip.config cannot be built: {error}; see conf/clip/ for ones that can.") from error


def _keeping_dtypes(model: nn.Module) -> nn.Module:
    """The model with its layer norms as ours: the same, but for the dtype under autocast of a GPU."""
    for module in model.modules():
        if type(module) is open_clip.transformer.LayerNorm:
            module.__class__ = LayerNorm
    return model


def _sized(config: Mapping[str, Any], image_size: int | None) -> Config:
    """The configuration with the image size filled in, if it has none, and checked against the patches."""
    full = _plain(config)
    vision, tokens = full["vision_cfg"], full["text_cfg"].get("vocab_size", _LEAST_TOKENS)
    if tokens < _LEAST_TOKENS:
        raise InputError(f"clip.config.text_cfg.vocab_size={tokens} is less than {_LEAST_TOKENS}; try 8192.")
    if image_size is not None:
        vision.setdefault("image_size", image_size)
    size, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
    if isinstance(vision.get("layers"), int) and size % patch:
        raise InputError(
            f"clip.config.vision_cfg.patch_size={patch} does not divide the image size {size}; choose a divisor."
        )
    return full


def _published(name: str, pretrained: str | None) -> tuple[Any, Config]:
    known = open_clip.list_models()
    if ":" not in name and name not in known:
        raise InputError(f"clip.name={name} is no model of open_clip; {did_you_mean(name, known, str(known))}")
    cfg: Mapping[str, Any] = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    weights = None if pretrained is None else str(_weights_file(name, pretrained))
    try:
        model = open_clip.create_model(
            name,
            weights,
            require_pretrained=weights is not None,
            force_quick_gelu=bool(cfg.get("quick_gelu")),  # known from the tag, not from a file's name
        )
        config = open_clip.get_model_config(name)
    except Exception as error:
        raise InputError(
            f"clip.name={name} with clip.pretrained={pretrained} cannot be loaded ({first_line(error)}); "
            "give the path of weights that belong to this model."
        ) from error
    gelu = any(isinstance(module, QuickGELU) for module in model.modules())
    given = open_clip.get_model_preprocess_cfg(model) | {k: cfg[k] for k in ("mean", "std") if k in cfg}
    return _keeping_dtypes(model), _plain(config) | {"quick_gelu": gelu, "mean": given["mean"], "std": given["std"]}


def published_file(name: str, pretrained: str) -> Path | None:
    """Where `ldmlab fetch clip` put the weights of a published model; None if they are missing."""
    return next(weights_folder().glob(f"{published_stem(name, pretrained)}.*"), None)


def published_stem(name: str, pretrained: str) -> str:
    """The file's name without its ending, relative to the folder of fetched weights."""
    return f"clip/{name.replace('/', '-')}_{pretrained}"


def _weights_file(name: str, pretrained: str) -> Path:
    """A path as it is; a tag's file among the fetched weights: nothing is fetched in the middle of a run."""
    if Path(pretrained).is_file():
        return Path(pretrained)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        raise InputError(
            f"clip.pretrained={pretrained} is neither a file nor a tag of {name}; "
            + (f"there are {', '.join(tags)}." if tags else "give the path of its weights.")
        )
    found = published_file(name, pretrained)
    if found is None:
        command = f"ldmlab fetch clip --model {name} --pretrained {pretrained}"
        raise InputError(
            f"the weights of {name} {pretrained} are not here; run `{command}` on a machine with internet."
        )
    return found


def _plain(node: Any) -> Any:
    """Nested mappings and sequences as plain dicts and lists."""
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    return [_plain(value) for value in node] if isinstance(node, (list, tuple)) else node


def make_tokenizer(config: Mapping[str, Any]) -> SimpleTokenizer:
    """CLIP's byte-pair tokenizer, which ships with open_clip and reads any language."""
    text = config["text_cfg"]
    if text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise InputError("this CLIP model has a tokenizer of its own; choose one with CLIP's, such as ViT-B-32.")
    tokenizer = SimpleTokenizer(context_length=text.get("context_length", 77))
    size = text.get("vocab_size", tokenizer.vocab_size)
    return _first_tokens(tokenizer, size) if _LEAST_TOKENS <= size < tokenizer.vocab_size else tokenizer


def _first_tokens(tokenizer: SimpleTokenizer, size: int) -> SimpleTokenizer:
    """The tokenizer with its first merges alone, `size` tokens: rarer words fall into more pieces."""
    special = [tokenizer.decoder[number] for number in tokenizer.all_special_ids]
    merges = size - _LEAST_TOKENS
    tokens = [tokenizer.decoder[number] for number in range(size - len(special))] + special
    tokenizer.encoder = {token: number for number, token in enumerate(tokens)}
    tokenizer.decoder = dict(enumerate(tokens))
    tokenizer.bpe_ranks = dict(list(tokenizer.bpe_ranks.items())[:merges])
    tokenizer.vocab_size = size
    tokenizer.all_special_ids = [tokenizer.encoder[token] for token in special]
    tokenizer.sot_token_id, tokenizer.eot_token_id = tokenizer.all_special_ids
    return tokenizer


class ClipTokens:
    """Captions to token numbers (B, L), cut to the context and padded: zero as in open_clip | end as in SD 1.x."""

    def __init__(self, tokenizer: SimpleTokenizer, padding: str = "zero") -> None:
        one_of("conditioner.padding", padding, ("zero", "end"))
        self.tokenizer, self.padding = tokenizer, padding

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, L) int64."""
        ids = self.tokenizer(list(captions))
        end = self.tokenizer.eot_token_id
        return ids if self.padding == "zero" else ids.masked_fill((ids == end).cumsum(1) > 0, end)

    def lost(self, caption: str) -> str:
        """The end of a caption that does not fit into the context; empty if all does."""
        ids = self.tokenizer.encode(caption)
        return self.tokenizer.decode(ids[self.tokenizer.context_length - 2 :]).strip()  # start and end take two places
