"""Published weights that some choices need: fetched on demand by command, never in the middle of a run.

They are in LDMLAB_WEIGHTS or ~/.cache/ldmlab, under the names of their files.
"""

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import yaml

from ldmlab.errors import InputError, first_line
from ldmlab.files import file_sha256, weights_folder, write_atomically

Advance = Callable[[int, int], None]  # bytes so far, bytes in all (0: unknown)
_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Weights:
    """A published file; `sha256` is its hash or, where the publisher has that in the name, the start of it."""

    file: str
    url: str
    sha256: str
    mib: int
    licence: str
    used_for: str


_TABLE = yaml.safe_load(files("ldmlab.interop").joinpath("published_weights.yaml").read_text(encoding="utf-8"))
WEIGHTS = {name: Weights(**row) for name, row in _TABLE.items()}
CLIP = "clip"  # any open_clip model, `ldmlab fetch clip --model ViT-B-32 --pretrained openai`


def weights_path(name: str) -> Path:
    """The fetched file; InputError naming the command when it is missing."""
    path = weights_folder() / entry_of(name).file
    if not path.is_file():
        raise InputError(f"{name} weights are not at {path}; run `ldmlab fetch {name}` on a machine with internet.")
    return path


def entry_of(name: str) -> Weights:
    if name not in WEIGHTS:
        raise InputError(f"{name}: there are no such weights; there are {', '.join([*WEIGHTS, CLIP])}.")
    return WEIGHTS[name]


def fetch(name: str, *, url: str | None = None, advance: Advance = lambda done, total: None) -> Path:
    """Download, check and put in place; a complete existing file is kept. `url` names a mirror."""
    weights = entry_of(name)
    path = weights_folder() / weights.file
    if path.is_file() and file_sha256(path).startswith(weights.sha256):
        return path
    source = url or weights.url
    write_atomically(path, lambda temporary: _download(source, temporary, weights.sha256, advance))
    return path


def _download(source: str, path: Path, expected: str, advance: Advance) -> None:
    digest, done = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(source, timeout=_TIMEOUT_SECONDS) as answer, open(path, "wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            while chunk := answer.read(_CHUNK_BYTES):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                advance(done, total)
    except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
        raise InputError(f"{source} cannot be fetched ({error}); try again, or give a mirror with --url.") from error
    if total and done < total:
        raise InputError(f"{source} broke off after {done} of {total} bytes; run the command again.")
    if not digest.hexdigest().startswith(expected):
        raise InputError(
            f"{source} gave a file whose SHA-256 begins {digest.hexdigest()[:16]} instead of {expected}; "
            "it was deleted, try again or give another --url."
        )


def fetch_clip(model: str, pretrained: str) -> Path:
    """A published open_clip model through open_clip's own download, put where ldmlab looks for it."""
    import open_clip

    from ldmlab.nn.openclip import published_file, published_stem  # late: it brings torch

    if (model, pretrained) not in open_clip.list_pretrained():
        tags = open_clip.list_pretrained_tags_by_model(model)
        hint = f"there are {', '.join(tags)}" if tags else "`ldmlab fetch --list` names some models"
        raise InputError(f"--model={model} --pretrained={pretrained} is not published by open_clip; {hint}.")
    if here := published_file(model, pretrained):
        return here
    settings = open_clip.get_pretrained_cfg(model, pretrained)
    try:
        loaded = Path(open_clip.download_pretrained(settings, cache_dir=str(weights_folder() / "clip" / "downloads")))
    except Exception as error:
        reason = first_line(error)
        raise InputError(f"{model} {pretrained} cannot be fetched ({reason}); try again with internet.") from error
    path = weights_folder() / f"{published_stem(model, pretrained)}{loaded.suffix}"
    os.link(loaded.resolve(), path)  # the hub's own folder names it by its hash
    return path
