"""Tokenizer folders of diffusers' pipelines: what to read from them, and what to write for our tokenizers."""

import hashlib
import json
from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer

from ldmlab.errors import InputError
from ldmlab.interop.diffusers.files import read_json
from ldmlab.interop.fetch import WEIGHTS

_START, _END = "<|startoftext|>", "<|endoftext|>"
_PADDINGS = {_END: "end", "!": "zero"}  # "!" has the number 0


def clip_padding(folder: Path) -> str:
    """zero | end, by the pad token; a vocabulary that is not CLIP's is refused."""
    if _vocabulary(folder) != clip_vocabulary():
        raise InputError(f"{folder} has another vocabulary than CLIP's, which ldmlab does not read; use another model.")
    settings: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            settings |= read_json(folder / file)
    token = settings.get("pad_token", _END)
    content = token["content"] if isinstance(token, dict) else token
    if content not in _PADDINGS:
        raise InputError(f"{folder} pads with {content!r}, which is not known; known are {_END} and !.")
    return _PADDINGS[content]


def _vocabulary(folder: Path) -> dict[str, int]:
    if (folder / "vocab.json").is_file():
        return read_json(folder / "vocab.json")
    return dict(read_json(folder / "tokenizer.json")["model"]["vocab"])


def clip_vocabulary() -> dict[str, int]:
    """CLIP's tokens and their numbers, with the marks that transformers uses for start and end."""
    table: dict[str, int] = dict(SimpleTokenizer().encoder)
    marks = {"<start_of_text>": _START, "<end_of_text>": _END}
    return {marks.get(token) or token: number for token, number in table.items()}


def pad_token(padding: str) -> str:
    """The token that fills up after a caption's end."""
    return next(token for token, name in _PADDINGS.items() if name == padding)


def write_clip_files(folder: Path) -> None:
    """vocab.json and merges.txt, from which transformers' CLIPTokenizer is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary(), ensure_ascii=False), encoding="utf-8")
    ranks = SimpleTokenizer().bpe_ranks
    merges = [" ".join(pair) for pair in sorted(ranks, key=ranks.__getitem__)]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def bert_vocabulary(folder: Path) -> str | None:
    """Path of the vocabulary, or None for the published one, which `ldmlab fetch wordpiece` brings."""
    file = folder / "vocab.txt"
    if not file.is_file():
        raise InputError(f"{file} is missing; copy the vocabulary of the model's tokenizer there, one token a line.")
    published = hashlib.sha256(file.read_bytes()).hexdigest().startswith(WEIGHTS["wordpiece"].sha256)
    return None if published else str(file.resolve())
