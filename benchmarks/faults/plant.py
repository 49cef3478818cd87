"""Damage to files: bytes, tar members, JSON and YAML values, hostile content, all chosen by a `random.Random`."""

import io
import json
import os
import pickle
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WRONG: list[Any] = [  # values of a wrong type or size, for any field of JSON or YAML
    *[None, True, -1, 0, 2.5, 1e30, float("nan"), float("inf"), 10**30, 2**63, "12", "", "a", "\ud83d", "x" * 5000],
    *[[], {}, [None], ["a", "b"], {"a": 1}, [[[]]], "../../outside/evil", "/etc/passwd", "nan", "null"],
]


def touching(canary: Path) -> Any:
    """An object that creates the canary when a careless reader unpickles it."""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {canary}",)

    return Payload()


# ---- bytes ----


def flip(path: Path, rng: random.Random, low: float = 0.0, high: float = 1.0) -> str:
    """One bit of a file, between two fractions of its length."""
    content = bytearray(path.read_bytes())
    place = min(int((low + (high - low) * rng.random()) * len(content)), len(content) - 1)
    bit = rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} of {len(content)} in {path.name} flipped"


def zeros(path: Path, rng: random.Random) -> str:
    """A block of zeros, as after a crash of the file system."""
    content = bytearray(path.read_bytes())
    place, length = rng.randrange(len(content)), rng.choice((1, 16, 512, 4096))
    content[place : place + length] = bytes(len(content[place : place + length]))
    path.write_bytes(content)
    return f"{length} bytes from {place} of {len(content)} in {path.name} are zero"


def noise(path: Path, rng: random.Random) -> str:
    """A block of random bytes."""
    content = bytearray(path.read_bytes())
    place, length = rng.randrange(len(content)), rng.choice((1, 16, 512))
    content[place : place + length] = rng.randbytes(len(content[place : place + length]))
    path.write_bytes(content)
    return f"{length} bytes from {place} of {len(content)} in {path.name} are random"


def cut(path: Path, rng: random.Random) -> str:
    """A file that ends too early, for half of them padded to its size again."""
    content = path.read_bytes()
    place = min(rng.choice((0, 1, 511, rng.randrange(len(content)), len(content) - 1)), len(content))
    padded = rng.random() < 0.5
    path.write_bytes(content[:place] + bytes(len(content) - place) * padded)
    return f"{path.name} ends after {place} of {len(content)} bytes{', padded with zeros' * padded}"


def longer(path: Path, rng: random.Random) -> str:
    """Bytes behind the end."""
    extra = rng.choice((b"\0" * 4096, b"garbage" * 100, path.read_bytes()))
    path.write_bytes(path.read_bytes() + extra)
    return f"{len(extra)} bytes more at the end of {path.name}"


def missing(path: Path, rng: random.Random) -> str:
    """No file."""
    path.unlink()
    return f"{path.name} is missing"


def replaced(path: Path, rng: random.Random) -> str:
    """Something else under the name: empty, a folder, a FIFO, a pointer, a page, a link to nowhere."""
    path.unlink()
    kind = rng.choice(("empty", "folder", "fifo", "pointer", "page", "loop", "device"))
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        text = {"empty": b"", "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"}
        path.write_bytes(text.get(kind, b"<!DOCTYPE html><html>Not Found</html>"))
    return f"{path.name} is {kind}"


def any_bytes(path: Path, rng: random.Random) -> str:
    """One of the above."""
    return rng.choice((flip, flip, flip, zeros, noise, cut, longer, missing, replaced))(path, rng)


# ---- JSON ----


def wrong_value(content: Any, rng: random.Random, values: list[Any] | None = None) -> str:
    """A random place of a nested value gets a value of a wrong type, is removed, or is doubled; what was done."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)) and len(node[key]) < 400:
                walk(node[key])

    walk(content)
    node, key = rng.choice(places)
    if isinstance(node, dict) and rng.random() < 0.2:
        del node[key]
        return f"{key} is missing"
    old = node[key]
    node[key] = rng.choice(values or WRONG)
    if isinstance(old, int) and not isinstance(old, bool) and rng.random() < 0.4:
        node[key] = old + rng.choice((-1, 1, 512, -512, old, 2**50))
    return f"{key} is {str(node[key])[:40]!r} instead of {str(old)[:40]!r}"


def json_text(path: Path, rng: random.Random) -> str:
    """Text that is no JSON, or too much of it."""
    content = path.read_bytes()
    kind = rng.choice(("cut", "nested", "latin", "list", "empty", "bom", "twice", "nul"))
    path.write_bytes(
        {
            "cut": content[: rng.randrange(len(content))],
            "nested": b"[" * 200_000 + b"]" * 200_000,
            "latin": content + b"\xe9\xff",
            "list": b"[" + content + b"]",
            "empty": b"",
            "bom": b"\xef\xbb\xbf" + content,
            "twice": content + content,
            "nul": content.replace(b" ", b"\0", 1),
        }[kind]
    )
    return f"{path.name}: {kind}"


def edit_json(path: Path, change: Callable[[Any], str]) -> str:
    """The content changed in place."""
    content = json.loads(path.read_text())
    what = change(content)
    path.write_text(json.dumps(content))
    return f"{path.name}: {what}"


def manifest(folder: Path, rng: random.Random) -> str:
    """A manifest with a wrong value, of a shard more often than not, or no JSON at all."""
    path = folder / "manifest.json"
    if rng.random() < 0.2:
        return json_text(path, rng)

    def change(content: Any) -> str:
        where = rng.random()
        if where < 0.45:
            return "a shard's " + wrong_value(rng.choice(content["shards"]), rng)
        if where < 0.6:
            names = rng.choice((["../../outside/evil"], ["/etc/passwd"], [".."], ["a" * 300], ["x\0y"], ["train"]))
            rng.choice(content["shards"])["name"] = names[0]
            return f"a shard's name is {names[0][:30]!r}"
        if where < 0.7:
            return any_bytes(folder / "manifest.places", rng)
        return wrong_value(content, rng)

    return edit_json(path, change)


# ---- tars ----

Members = list[tuple[tarfile.TarInfo, bytes]]


def members(path: Path) -> Members:
    """The members of a tar, in order."""
    with tarfile.open(path) as archive:
        return [(item, archive.extractfile(item).read()) for item in archive]  # type: ignore[union-attr]


def write_tar(path: Path, content: Members) -> None:
    """A plain tar of members."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for item, data in content:
            if item.isreg():
                item.size = len(data)
            archive.addfile(item, io.BytesIO(data))


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    """A member's header."""
    item = tarfile.TarInfo(name)
    item.type, item.linkname = kind, link
    return item


def sample_field(content: Members, rng: random.Random) -> str:
    """A field of one sample's JSON is of a wrong type, or many samples lack it."""
    places = [index for index, (item, _) in enumerate(content) if item.name.endswith(".json")]
    name = rng.choice(("caption", "class_id", "caption", "class_id", "class", "original_width"))
    value = rng.choice([*WRONG, ["first", "second"], "c1", 1.5, 3.0, 7, -3, 99, {"en": "a"}])
    chosen = places if rng.random() < 0.2 else [rng.choice(places)]
    for index in chosen:
        fields = json.loads(content[index][1])
        if rng.random() < 0.15:
            fields.pop(name, None)
        else:
            fields[name] = value
        content[index] = (content[index][0], json.dumps(fields).encode())
    return f"{name} of {len(chosen)} of {len(places)} samples is {str(value)[:40]!r}"


def sample_json(content: Members, rng: random.Random) -> str:
    """One sample's JSON is no JSON of an object."""
    index = rng.choice([i for i, (item, _) in enumerate(content) if item.name.endswith(".json")])
    text = rng.choice(
        (b"", b"[]", b"3", b"{", b"null", b"\xff\xfe", b"[" * 200_000, b'{"caption": "\\ud83d", "class_id": 0}')
    )
    content[index] = (content[index][0], text)
    return f"{content[index][0].name} is {text[:20]!r}"


def sample_image(content: Members, rng: random.Random, canary: Path) -> str:
    """One image is no image, a program or a bomb."""
    index = rng.choice([i for i, (item, _) in enumerate(content) if item.name.endswith((".webp", ".png"))])
    item, data = content[index]
    name, made = hostile_image(rng, canary, data)
    ending = rng.choice((".png", ".jpg", ".webp"))
    content[index] = (member(item.name.rpartition(".")[0] + ending), made)
    return f"{content[index][0].name} is {name}"


def hostile_image(rng: random.Random, canary: Path, data: bytes) -> tuple[str, bytes]:
    """Content under the name of an image."""
    script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n(touch {canary}) (w) file pop showpage\n%%EOF\n"
    choices = {
        "empty": b"",
        "cut": data[: rng.randrange(1, max(len(data), 2))],
        "text": b"this is a text",
        "PostScript": script.encode(),
        "a loop of PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n{} loop\n",
        "a bomb": png(30_000, 30_000),
        "a PNG of absurd sides": png(2**31 - 1, 2**31 - 1),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "a pickle": pickle.dumps(touching(canary)),
        "of no pixels": png(0, 0),
    }
    name = rng.choice(list(choices))
    return name, choices[name]


def png(width: int, height: int) -> bytes:
    """A grey PNG whose pixels are zeros, compressed; a few rows of it where it would be large."""
    rows = zlib.compress(bytes((width + 1) * min(height, 30_000)) if width <= 30_000 else b"", 9)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1 if width > 100 else 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def strange_members(content: Members, rng: random.Random, case: Path) -> str:
    """Members that others' tools leave, links, hostile names, other orders."""
    kind = rng.choice(
        ("apple", "store", "macosx", "dots", "hostile", "link", "hardlink", "sparse", "device", "twice", "sort")
    )
    place = rng.randrange(len(content))
    if kind == "apple":
        content[:] = [
            pair for item, data in content for pair in ((member(f"._{item.name}"), b"\0\5\x16\7"), (item, data))
        ]
    elif kind == "store":
        content.insert(0, (member(".DS_Store"), b"\0\0\0\1Bud1"))
    elif kind == "macosx":
        content += [(member(f"__MACOSX/._{item.name}"), b"x") for item, _ in content[:4]]
    elif kind == "dots":
        for item, _ in content if rng.random() < 0.5 else content[:2]:
            stem, _, ending = item.name.rpartition(".")
            item.name = f"IMG 2.0.{stem}.{ending}"
    elif kind == "hostile":
        name = rng.choice(
            ("../../outside/evil.png", f"{case}/outside/evil.png", "a/../../../evil.png", "\u202egnp.png")
        )
        content.insert(place, (member(name), b"evil"))
    elif kind == "link":
        content.insert(place, (member("linked.png", tarfile.SYMTYPE, "/etc/passwd"), b""))
    elif kind == "hardlink":
        content.insert(place, (member("hard.png", tarfile.LNKTYPE, content[0][0].name), b""))
    elif kind == "device":
        content.insert(place, (member("device.png", tarfile.CHRTYPE), b""))
    elif kind == "sparse":
        item = member("sparse.png", tarfile.GNUTYPE_SPARSE)
        content.insert(place, (item, b""))
    elif kind == "twice":
        content += [(member(item.name), data) for item, data in content[:2]]
    else:
        rng.shuffle(content)
    return f"members: {kind}"


def npy(content: Members, rng: random.Random) -> str:
    """One sample's moments: not finite, of another shape or type, a flipped header, code."""
    index = rng.choice([i for i, (item, _) in enumerate(content) if item.name.endswith(".npy")])
    item, data = content[index]
    array = np.load(io.BytesIO(data)).copy()
    kind = rng.choice(
        ("nan", "inf", "shape", "channels", "dtype", "header", "header", "object", "empty", "huge", "values")
    )
    if kind in ("nan", "inf"):
        array.flat[rng.randrange(array.size)] = float(kind)
    elif kind == "shape":
        array = array[..., : rng.randrange(array.shape[-1])]
    elif kind == "channels":
        array = array[:, : rng.randrange(array.shape[1])]
    elif kind == "dtype":
        array = array.astype(rng.choice((np.float64, np.int8, np.complex64, np.float32)))
    elif kind == "values":
        array = array * np.float16(3.0)
    made = io.BytesIO()
    np.save(made, array)
    raw = bytearray(made.getvalue())
    if kind == "header":
        raw[rng.randrange(128)] ^= 1 << rng.randrange(8)
    elif kind == "empty":
        raw = bytearray()
    elif kind == "huge":
        raw = bytearray(raw.replace(b"(1, 8, 4, 4)", b"(99999999, 8, 4, 4)"))
    elif kind == "object":
        made = io.BytesIO()
        np.save(made, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        raw = bytearray(made.getvalue())
    content[index] = (item, bytes(raw))
    return f"{item.name}: {kind}"


# ---- YAML of models ----

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


def hostile_targets(canary: Path, outside: Path) -> list[dict[str, Any]]:
    """Nodes that run code or write where the reader builds whatever is named."""
    command = f"touch {canary}"
    evil = f"{outside}/evil"
    return [
        {"_target_": "os.system", "command": command},
        {"_target_": "subprocess.run", "args": command, "shell": True},
        {"_target_": "builtins.eval", "source": f"__import__('os').system('{command}')"},
        {"_target_": "builtins.exec", "source": f"open('{evil}', 'w')"},
        {
            "_target_": "ldmlab.build.build_latent_diffusion",
            "trust": True,
            "spec": {"first_stage": {"_target_": "os.system", "command": command}},
        },
        {"_target_": "ldmlab.build.load", "path": str(outside), "trust": True},
        {"_target_": "ldmlab.app.cli.dispatch", "arguments": ["export", "model", evil]},
        {"_target_": "ldmlab.build.os.system", "command": command},
        {"_target_": "ldmlab.checkpoints.os.system", "command": command},
        {"_target_": "ldmlab.instantiate.importlib.import_module", "name": "antigravity"},
        {
            "_target_": "ldmlab.instantiate.instantiate",
            "node": {"_target_": "os.system", "command": command},
            "trust": True,
        },
        {"_target_": "ldmlab.checkpoints.write_atomically", "path": evil, "write": "x"},
        {"_target_": "ldmlab.files.write_text", "path": evil, "text": "evil"},
        {"_target_": "ldmlab.interop.published_weights.fetch", "name": "lpips", "url": f"file://{outside}/kept.txt"},
        {"_target_": "torch.load", "f": str(outside / "evil.pt"), "weights_only": False},
        {"_target_": "pathlib.Path.touch", "self": evil},
        {"_target_": "ldmlab.training.run_folder.RunFolder.create", "root": str(outside), "name": "evil"},
        {"_target_": "ldmlab.data.shard_data.ShardData", "train": str(outside), "val": str(outside), "image_size": 16},
        {"_target_": "ldmlab.conditioners.text.open_clip_text", "config": {}, "weights": str(outside / "evil.pt")},
        {"_target_": "functools.partial", "_partial_": True, "func": command},
        {"_target_": "ldmlab.nn.openclip.torch.hub.load", "repo_or_dir": str(outside), "model": "x", "source": "local"},
        {"_target_": "ldmlab.plugins.allow", "names": "os", "option": "x"},
    ]


def edit_yaml(path: Path, rng: random.Random, canary: Path) -> str:
    """A value of model.yaml of a wrong type, a hostile target, a bomb, or text that is none."""
    import yaml

    kind = rng.random()
    content = yaml.safe_load(path.read_text())
    if kind < 0.4:
        what = wrong_type(content, rng)
    elif kind < 0.75:
        nodes = [key for key, value in content.items() if isinstance(value, dict) and key != "sha256"]
        key = rng.choice(nodes)
        node = rng.choice(hostile_targets(canary, canary.parent / "outside"))
        if rng.random() < 0.4 and isinstance(content[key], dict):
            content[key] = {**content[key], "extra": node}
        else:
            content[key] = {"x": node} if key == "conditioners" else node
        what = f"{key} is {node['_target_']}"
    elif kind < 0.85:
        key = rng.choice(("kind", "format_version", "first_stage", "image_size", "backbone"))
        text = BOMB + path.read_text().replace(f"{key}:", f"old_{key}:", 1) + f"\n{key}: *j\n"
        if rng.random() < 0.3:
            text = text.replace("_target_: ldmlab.backbones.unet.UNet", "_target_: *j")
        path.write_text(text)
        return f"{path.name}: aliases grow to 9^9 as {key}"
    else:
        return _yaml_text(path, rng)
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=False))
    return f"{path.name}: {what}"


FREE = ("weights", "source", "name", "licence", "origin")  # keys whose text nothing depends on


def wrong_type(content: Any, rng: random.Random) -> str:
    """A value of another type than it has; one of its own type would describe another model, which is no fault."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(content)
    node, key = rng.choice([(node, key) for node, key in places if key not in FREE])
    old = node[key]
    values = [value for value in WRONG if type(value) is not type(old) and value is not None]
    if isinstance(old, float):
        values = [value for value in values if not isinstance(value, int) or isinstance(value, bool)]
    elif old is None:
        values = [value for value in values if not isinstance(value, (int, float))]
    node[key] = rng.choice([*values, float("nan")])
    return f"{key} is {str(node[key])[:40]!r} instead of {str(old)[:40]!r}"


def _yaml_text(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    kind = rng.choice(("cut", "latin", "tag", "list", "empty", "nul", "nested", "duplicate"))
    path.write_bytes(
        {
            "cut": content[: rng.randrange(1, len(content))],
            "latin": content + b"# \xe9\xff\n",
            "tag": content.replace(b"kind: ", b"kind: !!python/object/apply:os.system [true] #", 1),
            "list": b"- 1\n- 2\n",
            "empty": b"",
            "nul": content.replace(b" ", b"\0", 1),
            "nested": b"[" * 5000 + b"]" * 5000,
            "duplicate": content + content,
        }[kind]
    )
    return f"{path.name}: {kind}"
