"""Faults in images, image shards and latent shards: while training, encoding, indexing and packing."""

import json
import shutil
from pathlib import Path

from faults import plant
from faults.base import COMMANDS, digest, said
from faults.cases import Case


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def _bytes(case: Case, folder: Path) -> str:
    return plant.any_bytes(case.rng.choice(_shards(folder)), case.rng)


def _train(case: Case, name: str) -> None:
    case.classify(case.run(COMMANDS[name]), name)


def images_train_bytes(case: Case) -> None:
    """A shard of images damaged on disk, then a first stage."""
    case.copy("packed")
    case.outcome.planted = _bytes(case, case.work / "packed" / case.rng.choice(("train", "train", "val")))
    _train(case, "first_stage")


def images_train_manifest(case: Case) -> None:
    """A manifest of image shards that contradicts itself or them."""
    case.copy("packed")
    case.outcome.planted = plant.manifest(case.work / "packed" / case.rng.choice(("train", "train", "val")), case.rng)
    _train(case, "first_stage")


def _others(case: Case, split: str) -> str:
    """Shards as others make them: members changed, to be indexed."""
    folder = case.work / "packed" / split
    path = case.rng.choice(_shards(folder))
    content = plant.members(path)
    kind = case.rng.random()
    if kind < 0.35:
        what = plant.sample_field(content, case.rng)
    elif kind < 0.45:
        what = plant.sample_json(content, case.rng)
    elif kind < 0.75:
        what = plant.sample_image(content, case.rng, case.canary)
    else:
        what = plant.strange_members(content, case.rng, case.folder)
    plant.write_tar(path, content)
    (folder / "manifest.json").unlink()
    return f"{split}: {what}"


def images_of_others(case: Case) -> None:
    """Tars made by others, indexed and trained on."""
    case.copy("packed")
    split = case.rng.choice(("train", "train", "val"))
    case.outcome.planted = _others(case, split)
    indexed = case.run(["index", f"packed/{split}", "--split", split, "--workers", "1"])
    if indexed.code != 0:
        case.classify(indexed, "pack")
        return
    trained = case.run(COMMANDS["first_stage"])
    if lines := said(indexed, case.base.results["index"]):
        case.set("said", lines[0])
    case.classify(trained, "first_stage", same=lambda: _as_indexed(case, split))


_OTHER_DATA = ("members: sort", "members: dots", "members: twice", "members: hostile")  # same images in another order


def _as_indexed(case: Case, split: str) -> bool:
    """The same first stage as from tars without faults; of the same images in another order, all of them."""
    if case.outcome.planted.endswith(_OTHER_DATA):
        return _all_there(case, split)
    expected = case.base.digests["indexed" if split == "train" else "first_stage"]
    return bool(digest("first_stage", case.work) == expected)


def _all_there(case: Case, split: str) -> bool:
    """Every sample of the flow without faults counts, whatever its fields became."""
    manifests = (root / "packed" / split / "manifest.json" for root in (case.work, case.base.root))
    totals = [sum(shard["samples"] for shard in json.loads(path.read_text())["shards"]) for path in manifests]
    return totals[0] == totals[1]


def images_encode(case: Case) -> None:
    """Damaged image shards on the way to latents."""
    case.copy("packed", "first_stage")
    split = case.rng.choice(("train", "val"))
    kind = case.rng.random()
    if kind < 0.5:
        case.outcome.planted = _bytes(case, case.work / "packed" / split)
    else:
        case.outcome.planted = plant.manifest(case.work / "packed" / split, case.rng)
    checked = ["data.sha256=true"] if case.rng.random() < 0.2 else []
    case.classify(case.run([*COMMANDS["encode"], *checked]), "encode")


def images_evaluate(case: Case) -> None:
    """Damaged images among those that a first stage is scored on."""
    case.copy("packed", "first_stage", "clip")
    folder, kind = case.work / "packed" / "val", case.rng.random()
    if kind < 0.4:
        case.outcome.planted = _bytes(case, folder)
    elif kind < 0.6:
        case.outcome.planted = plant.manifest(folder, case.rng)
    else:
        path = case.rng.choice(_shards(folder))
        content = plant.members(path)
        case.outcome.planted = plant.sample_image(content, case.rng, case.canary)
        plant.write_tar(path, content)
        _checksums(path)
    case.classify(case.run(COMMANDS["evaluate"]), "evaluate")


def images_pack(case: Case) -> None:
    """A folder of images with damaged or hostile files, or a damaged table."""
    case.copy("images")
    folder, kind = case.work / "images", case.rng.random()
    path = case.rng.choice(sorted(folder.glob("*.png")))
    if kind < 0.25:
        what = plant.any_bytes(path, case.rng)
    elif kind < 0.5:
        name, content = plant.hostile_image(case.rng, case.canary, path.read_bytes())
        path.write_bytes(content)
        what = f"{path.name} is {name}"
    elif kind < 0.8:
        what = _table(case, folder / "metadata.jsonl")
    else:
        what = _strange_folder(case, folder)
    case.outcome.planted = what
    case.classify(case.run(COMMANDS["pack"]), "pack", same=lambda: _packed_whole(case))


def _packed_whole(case: Case) -> bool:
    """As many samples as without the fault, and no word that stands for a missing caption."""
    for split in ("train", "val"):
        for path in _shards(case.work / "packed" / split):
            rows = [json.loads(data) for item, data in plant.members(path) if item.name.endswith(".json")]
            if any(str(row.get("caption")).lower() in ("nan", "none", "null", "") for row in rows):
                return False
    return all(_all_there(case, split) for split in ("train", "val"))


def _table(case: Case, path: Path) -> str:
    if case.rng.random() < 0.3:
        return plant.any_bytes(path, case.rng) if case.rng.random() < 0.5 else plant.json_text(path, case.rng)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = case.rng.choice(rows)
    name = case.rng.choice(("file_name", "caption", "kind"))
    row[name] = case.rng.choice([*plant.WRONG, "../outside/kept.txt", ["first", "second"], "002.png"])
    path.write_text("\n".join(map(json.dumps, rows)))
    return f"metadata.jsonl: {name} of one row is {str(row[name])[:40]!r}"


def _strange_folder(case: Case, folder: Path) -> str:
    kind = case.rng.choice(("loop", "link out", "broken link", "apple", "names", "extra", "fifo"))
    if kind == "loop":
        (folder / "loop").symlink_to(folder)
    elif kind == "link out":
        (folder / "out.png").symlink_to(case.outside / "kept.txt")
    elif kind == "broken link":
        (folder / "000.png").unlink()
        (folder / "000.png").symlink_to("nowhere.png")
    elif kind == "apple":
        (folder / "._000.png").write_bytes(b"\0\5\x16\7")
        (folder / ".DS_Store").write_bytes(b"Bud1")
    elif kind == "names":
        (folder / "000.png").rename(folder / "a b=c,d (1) \u00e9\U0001f600.png")
    elif kind == "extra":
        shutil.copy(folder / "000.png", folder / "not in the table.png")
    else:
        import os

        os.mkfifo(folder / "pipe.png")
    return f"images: {kind}"


def latents_train_bytes(case: Case) -> None:
    """A latent shard damaged on disk, then a denoiser."""
    case.copy("packed", "latents")
    case.outcome.planted = _bytes(case, case.work / "latents" / case.rng.choice(("train", "train", "val")))
    _train(case, "denoiser")


def latents_train_manifest(case: Case) -> None:
    """A manifest of latents that contradicts itself or them."""
    case.copy("packed", "latents")
    case.outcome.planted = plant.manifest(case.work / "latents" / case.rng.choice(("train", "train", "val")), case.rng)
    _train(case, "denoiser")


def latents_moments(case: Case) -> None:
    """Moments that are no numbers, of another shape, or code, in a shard whose checksums fit them."""
    case.copy("packed", "latents")
    split = case.rng.choice(("train", "train", "val"))
    path = case.rng.choice(_shards(case.work / "latents" / split))
    content = plant.members(path)
    case.outcome.planted = f"{split}: {plant.npy(content, case.rng)}"
    plant.write_tar(path, content)
    _checksums(path)
    values = case.outcome.planted.endswith(("values", "dtype"))  # other numbers with fitting checksums are other data
    _judge_moments(case, values)


def _judge_moments(case: Case, values: bool) -> None:
    result = case.run(COMMANDS["denoiser"])
    if values and result.code == 0:
        return
    case.classify(result, "denoiser")


def _checksums(path: Path) -> None:
    """The manifest written for what the shard holds now."""
    from google_crc32c import value

    from faults.base import hashlib

    raw = path.read_bytes()
    offsets, key = [], None
    import tarfile

    with tarfile.open(path) as archive:
        for item in archive:
            name = item.name.partition(".")[0]
            if name != key:
                offsets.append(item.offset)
                key = name
    ends = [*offsets[1:], len(raw)]
    manifest, places = path.parent / "manifest.json", path.parent / "manifest.places"
    content = json.loads(manifest.read_text())
    names = [shard["name"] for shard in content["shards"]]
    before = sum(shard["samples"] for shard in content["shards"][: names.index(path.name)])
    shard = content["shards"][names.index(path.name)]
    rows = b"".join(
        (start // 512).to_bytes(4, "little") + value(raw[start:end]).to_bytes(4, "little")
        for start, end in zip(offsets, ends, strict=True)
    )
    old = places.read_bytes()
    places.write_bytes(old[: 8 * before] + rows + old[8 * (before + shard["samples"]) :])
    shard |= {"bytes": len(raw), "samples": len(offsets), "sha256": hashlib.sha256(raw).hexdigest()}
    content["places_sha256"] = hashlib.sha256(places.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))


def latents_first_stage(case: Case) -> None:
    """The first stage beside latents damaged or exchanged."""
    case.copy("packed", "latents", "model")
    folder = case.work / "latents" / "first_stage"
    if case.rng.random() < 0.3:
        case.outcome.planted = plant.edit_yaml(folder / "model.yaml", case.rng, case.canary)
    else:
        case.outcome.planted = plant.any_bytes(folder / "first_stage.safetensors", case.rng)
    _train(case, "denoiser")


KINDS = {
    "data: images, train": images_train_bytes,
    "data: images, manifest": images_train_manifest,
    "data: tars of others": images_of_others,
    "data: images, encode": images_encode,
    "data: images, evaluate": images_evaluate,
    "data: images, pack": images_pack,
    "data: latents, train": latents_train_bytes,
    "data: latents, manifest": latents_train_manifest,
    "data: latents, moments": latents_moments,
    "data: latents' first stage": latents_first_stage,
}
