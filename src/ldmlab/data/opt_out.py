"""Opt-out lists: images left out by URL, by SHA-256 of the file, or by perceptual hash of 64 bits."""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from PIL import Image

from ldmlab.data.image_sources import Item
from ldmlab.data.splits import NEAR_BITS, Hashes, perceptual_hash
from ldmlab.disks import open_regular
from ldmlab.errors import InputError, shown
from ldmlab.files import file_sha256

WAYS = ("url", "sha256", "perceptual hash")
_URL = re.compile(r"\w[\w+.-]*://")
_PLAIN = re.compile(r"(?!.*(/\.|\?$))[a-z]+://[a-z0-9.-]+/[A-Za-z0-9._~/?&=!$'()*+,;@-]*")  # has its one form already
_PORTS = {"http": ":80", "https": ":443"}


@dataclass(frozen=True)
class OptOut:
    """A list as an option; workers read it once each."""

    path: str
    sha256: str  # of the list
    distance: int = NEAR_BITS  # bits in which a perceptual hash of the list may differ

    @classmethod
    def of(cls, path: Path, distance: int = NEAR_BITS) -> "OptOut":
        """InputError for a line that is none of the three."""
        if not 0 <= distance <= 16:
            raise InputError(f"--exclude-distance {distance} must be in 0 .. 16 of 64 bits; 3 is usual.")
        try:
            listed = cls(str(path), file_sha256(path), distance)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InputError(f"--exclude {path} cannot be read ({reason}); give a text file.") from None
        if not listed.entries():
            raise InputError(f"--exclude {path} lists nothing; write a URL or a hash a line, or leave the option out.")
        return listed

    def entries(self) -> int:
        """InputError where the list is not the one that it was."""
        known = _read(self.path, self.sha256)
        return len(known.urls) + len(known.sums) + len(known.hashes)

    def record(self, found: Mapping[str, int]) -> dict[str, Any]:
        """For the manifest; found: images left out by each of WAYS."""
        about = {"list": Path(self.path).name, "sha256": self.sha256, "distance": self.distance}
        return {**about, "entries": self.entries(), "left_out": {way: found.get(way, 0) for way in WAYS}}

    def match(self, content: bytes, image: Image.Image, texts: Iterable[Any]) -> str | None:
        """The way of WAYS by which an image is listed; content: of its file; texts: values of its fields."""
        known = _read(self.path, self.sha256)
        if known.urls and not known.urls.isdisjoint(map(one_form, _urls(texts))):
            return WAYS[0]
        if known.sums and hashlib.sha256(content).hexdigest() in known.sums:
            return WAYS[1]
        if len(known.hashes):
            apart = np.bitwise_count(known.hashes ^ np.uint64(perceptual_hash(image.convert("RGB"))))
            if int(apart.min()) <= self.distance:
                return WAYS[2]
        return None


def with_urls_of_file(items: list[Item]) -> list[Item]:
    """Items of which those of one file, such as the rows of several captions, have the URLs of all of them."""
    rows = defaultdict[str, list[Item]](list)
    for item in items:
        if item.span is None:
            rows[os.path.normpath(item.path)].append(item)
    urls = {
        path: tuple(dict.fromkeys(url for row in same for url in _urls(row.fields.values())))
        for path, same in rows.items()
        if len(same) > 1
    }
    return [replace(item, urls=urls.get(os.path.normpath(item.path), ())) for item in items]


def one_form(url: str) -> str:
    """A URL as all equivalent ones are written: RFC 3986, 6.2.2 and 6.2.3; of http and https without its fragment."""
    url = url.strip()
    if _PLAIN.fullmatch(url):
        return url
    try:
        parts = urlsplit(url)
    except ValueError:  # of [ in the host
        return url
    user, at, host = parts.netloc.rpartition("@")
    host = _plain(host.lower()).lower().removesuffix(_PORTS.get(parts.scheme, "\0")).removesuffix(":")
    fragment = f"#{parts.fragment}" if parts.fragment and parts.scheme not in _PORTS else ""
    rest = f"{parts.query and '?'}{parts.query}{fragment}".rstrip()
    path = parts.path if rest else parts.path.rstrip()
    return f"{parts.scheme}://{user}{at}{host}{_without_dots(_plain(path) or '/')}{_plain(rest)}"


def _plain(text: str) -> str:
    """Percent-encoded where it must be, and only there."""
    return re.sub("%[0-9A-Fa-f]{2}", _as_plain, quote(text, safe="%/?#[]@!$&'()*+,;=:~", errors="surrogatepass"))


def _without_dots(path: str) -> str:
    """The path without its segments . and .. (RFC 3986, 5.2.4)."""
    kept, segments = list[str](), path.split("/")
    for segment in segments:
        if segment == "..":
            del kept[max(len(kept) - 1, 1) :]  # the first one is empty: a path begins with /
        elif segment != ".":
            kept.append(segment)
    return "/".join([*kept, ""] if segments[-1] in (".", "..") else kept)


def _as_plain(escape: re.Match[str]) -> str:
    """The letter of a percent-encoding that need not be one; other encodings in capitals."""
    letter = chr(int(escape[0][1:], 16))
    return letter if re.fullmatch("[A-Za-z0-9._~-]", letter) else escape[0].upper()


def _urls(values: Iterable[Any]) -> Iterator[str]:
    """The values that are URLs, also those within lists."""
    for value in values:
        yield from (text for text in (value if isinstance(value, list) else [value]) if _is_url(text))


def _is_url(text: Any) -> bool:
    return isinstance(text, str) and _URL.match(text.strip()) is not None


@dataclass(frozen=True)
class _Lines:
    urls: set[str] = field(default_factory=set)
    sums: set[str] = field(default_factory=set)
    hashes: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))


@cache
def _read(path: str, sha256: str) -> _Lines:
    urls, sums, hashes = set(), set(), set()
    for number, line in enumerate(_text(path, sha256).splitlines(), 1):
        text = line.strip()
        if _is_url(text):
            urls.add(one_form(text))
        elif re.fullmatch(r"[0-9a-fA-F]{64}", text):
            sums.add(text.lower())
        elif re.fullmatch(r"[0-9a-fA-F]{16}", text):
            hashes.add(int(text, 16))
        elif text and not text.startswith("#"):
            raise InputError(
                f"--exclude {path}: line {number} ({shown(text)}) is no URL (https://...), no SHA-256 of a file (64 "
                "hexadecimal digits) and no perceptual hash (16 digits); correct it, or begin a comment with #."
            )
    return _Lines(urls, sums, np.array(sorted(hashes), np.uint64))


def _text(path: str, sha256: str) -> str:
    """The list; InputError where it is another one than at the start, or no text."""
    try:
        with open_regular(Path(path)) as file:
            content = file.read()
    except OSError:
        content = b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise InputError(f"--exclude {path} was changed while it was in use; run the same command again.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"--exclude {path} is no text in UTF-8; write a URL or a hash a line.") from None
