"""Text encoders of diffusers' pipelines and ours, with their tokenizers: CLIPTextModel and LDMBertModel."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer

from ldmlab.errors import InputError
from ldmlab.interop.diffusers.diffusers_config import read_json
from ldmlab.interop.published_weights import WEIGHTS
from ldmlab.interop.renaming import CLIP_TEXT, OPTIONS, Node, clip_node

CLIP, BERT = "CLIPTextModel", "LDMBertModel"
_NO_LENGTH = 1_000_000  # from here on, transformers' tokenizers mean none
_LDM_LENGTH = 77  # fixed in LDMTextToImagePipeline
Config = Mapping[str, Any]
_CLIP_DEFAULTS = {"intermediate_size": 2048, "projection_dim": 512}  # of transformers' CLIPTextConfig
_BERT = OPTIONS["diffusers"]["bert"]  # diffusers' LDMBertConfig => ours, the default of both
HOME = "ldmlab.conditioners."
CLIP_TARGET, BERT_TARGET = f"{HOME}text.open_clip_text", f"{HOME}text.TransformerText"


def kind_of(config: Config) -> str:
    """The class a configuration belongs to."""
    named = [*(config.get("architectures") or ()), config.get("_class_name"), config.get("model_type")]
    if BERT in named or "ldmbert" in named or "encoder_ffn_dim" in config:
        return BERT
    if CLIP in named or "clip_text_model" in named or not any(named):
        return CLIP
    raise InputError(f"the text encoder {named[0]} is not supported; supported: {CLIP} and {BERT}.")


def node(
    config: Config,
    *,
    padding: str = "end",  # CLIP's
    length: int | None = None,  # to which CLIP's tokenizer pads; None: to the encoder's positions
    vocabulary: str | None = None,  # path of BERT's tokens
) -> dict[str, Any]:
    """The node of our conditioner. Its length is that of the tokens diffusers' pipelines pass to the encoder."""
    if kind_of(config) == CLIP:
        _check_fixed(CLIP, config, {"layer_norm_eps": 1e-5})
        positions = min(config.get("max_position_embeddings", 77), length or _NO_LENGTH)
        return clip_node({**_CLIP_DEFAULTS, **config, "max_position_embeddings": positions}, padding=padding)
    ours = {name: config.get(foreign, default) for foreign, (name, default) in _BERT.items()}
    fixed = {"head_dim": 64, "activation_function": "gelu", "scale_embedding": False}
    _check_fixed(BERT, {"encoder_ffn_dim": 5120, **config}, {"encoder_ffn_dim": 4 * ours["width"], **fixed})
    ours["length"] = min(ours["length"], _LDM_LENGTH)
    return {"_target_": BERT_TARGET, **ours, "vocab": vocabulary, "drop": 0.0, "unused_head": True}


def _check_fixed(kind: str, config: Config, fixed: Config) -> None:
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise InputError(f"{kind} with {key}={config[key]} is not supported; supported: {value}.")


def configuration(ours: Node) -> tuple[str, Config]:
    """Class and options for the node of a text conditioner of ours; InputError for what there is no class for."""
    if ours["_target_"] == BERT_TARGET:
        options = {foreign: ours.get(name, default) for foreign, (name, default) in _BERT.items()}
        return BERT, options | {"encoder_ffn_dim": 4 * options["d_model"]}
    if ours["_target_"] != CLIP_TARGET or not ours.get("config"):
        raise InputError(f"conditioner {ours['_target_']} has no text encoder in diffusers; use --format ldmlab.")
    if ours.get("layer", "last") == "pooled":
        raise InputError("conditioner.layer=pooled: diffusers' pipelines read states per token; use --format ldmlab.")
    config, text = ours["config"], ours["config"]["text_cfg"]
    options = {foreign: text.get(name, default) for foreign, (name, default) in CLIP_TEXT.items()}
    options["num_hidden_layers"] -= ours.get("layer", "last") == "penultimate"
    return CLIP, options | {
        "intermediate_size": int(options["hidden_size"] * text.get("mlp_ratio", 4.0)),
        "projection_dim": config["embed_dim"],
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407 if ours.get("padding", "zero") == "end" else 0,
    }


def text_length(ours: Node) -> int:
    if ours["_target_"] == BERT_TARGET:
        return int(ours.get("length", _LDM_LENGTH))
    if not ours.get("config"):
        raise InputError(f"conditioner {ours.get('name')} does not carry its configuration; export the run again.")
    return int(ours["config"]["text_cfg"].get("context_length", 77))


PAD_TOKENS = {"end": "<|endoftext|>", "zero": "!"}  # by our padding; "!" has the number 0


def clip_padding(folder: Path) -> str:
    """zero | end, by the pad token; a vocabulary that is not CLIP's is refused."""
    plain, fast = folder / "vocab.json", folder / "tokenizer.json"  # of older and newer releases of transformers
    vocabulary = read_json(plain) if plain.is_file() else _fast_tokenizer(fast)["model"]["vocab"]
    if vocabulary != clip_vocabulary():
        raise InputError(f"{folder} has another vocabulary than CLIP's, which is not supported; use another model.")
    token = _settings(folder).get("pad_token", PAD_TOKENS["end"])
    content = token["content"] if isinstance(token, dict) else token
    for padding, known in PAD_TOKENS.items():
        if content == known:
            return padding
    supported = " and ".join(PAD_TOKENS.values())
    raise InputError(f"{folder} pads with {content!r}, which is not supported; supported: {supported}.")


def clip_length(folder: Path) -> int | None:
    """To how many tokens diffusers' pipelines pad; None where the tokenizer's settings name no number."""
    length = _settings(folder).get("model_max_length")
    if length is None or (isinstance(length, (int, float)) and length >= _NO_LENGTH):
        return None
    if not isinstance(length, int) or isinstance(length, bool) or length < 2:
        raise InputError(f"{folder}: model_max_length={length} is no number of tokens; copy the folder again.")
    return length


def _settings(folder: Path) -> dict[str, Any]:
    files = (folder / name for name in ("special_tokens_map.json", "tokenizer_config.json"))
    return {key: value for file in files if file.is_file() for key, value in read_json(file).items()}


def _fast_tokenizer(file: Path) -> dict[str, Any]:
    """The content of tokenizer.json, with a vocabulary in it."""
    content = read_json(file)
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise InputError(f"{file} has no vocabulary; copy the folder again.")
    return content


def clip_vocabulary() -> dict[str, int]:
    """CLIP's tokens and their numbers, with the marks that transformers uses for start and end."""
    table: dict[str, int] = dict(SimpleTokenizer().encoder)
    marks = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return {marks.get(token) or token: number for token, number in table.items()}


def write_clip_files(folder: Path) -> None:
    """vocab.json and merges.txt, from which transformers' CLIPTokenizer is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary(), ensure_ascii=False), encoding="utf-8")
    ranks = SimpleTokenizer().bpe_ranks
    merges = [" ".join(pair) for pair in sorted(ranks, key=ranks.__getitem__)]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def tokenizer_of(node: Node, scratch: Path) -> Any:
    """transformers' CLIPTokenizer that cuts and pads as ours; its files are made in `scratch`."""
    from transformers import AddedToken, CLIPTokenizer

    write_clip_files(scratch)
    token = PAD_TOKENS[node.get("padding", "zero")]
    pad = AddedToken(token, single_word=True, normalized=False)  # where it is "!", one at a word's end is no padding
    return CLIPTokenizer.from_pretrained(scratch, model_max_length=text_length(node), pad_token=pad)


def bert_vocabulary(folder: Path) -> str | None:
    """Path of the vocabulary, or None for the published one, which `ldmlab fetch wordpiece` brings."""
    file, fast = folder / "vocab.txt", folder / "tokenizer.json"
    lower = _settings(folder).get("do_lower_case", True)
    if file.is_file():
        content = file.read_bytes()
    elif fast.is_file():
        file, settings = fast, _fast_tokenizer(fast)
        tokens = sorted(settings["model"]["vocab"], key=settings["model"]["vocab"].__getitem__)
        content = "".join(f"{token}\n" for token in tokens).encode()
        normalizer = settings.get("normalizer") or {}
        if settings["model"].get("type", "WordPiece") != "WordPiece" or normalizer.get("type") != "BertNormalizer":
            raise InputError(f"{fast} is not supported; supported: WordPiece with BERT's normalizer.")
        lower = lower and normalizer.get("lowercase", True)
    else:
        raise InputError(f"{folder} has neither vocab.txt nor tokenizer.json; copy the model's tokenizer there.")
    if not lower:
        raise InputError(f"{folder}: a tokenizer that keeps capitals (do_lower_case=false) is not supported.")
    published = hashlib.sha256(content).hexdigest().startswith(WEIGHTS["wordpiece"].sha256)
    return None if published else str(file.resolve())
