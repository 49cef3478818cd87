"""Imports between rooms point down only, and heavy packages stay in the rooms that own them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "ldmlab"
GROUND = {
    "errors",
    "contracts",
    "part_checks",
    "values",
    "stored_names",
    "randomness",
    "provenance",
    "instantiate",
    "argument_types",
    "plugins",
    "annotations",
    "files",
    "disks",
    "open_image",
    "format1",
    "distributed",
    "sharded",
}
MAY_USE = {  # room => rooms it may import
    **dict.fromkeys(GROUND, GROUND),
    "nn": GROUND,
    "checkpoints": GROUND,
    "averaging": GROUND | {"checkpoints"},
    "model_files": GROUND | {"checkpoints", "averaging"},
    **{
        room: GROUND | {"nn", "checkpoints"}
        for room in (
            *("first_stages", "backbones", "conditioners", "encoders", "losses", "diffusion", "samplers"),
            *("tasks", "data", "metrics", "marking"),
        )
    },
}
MAY_USE["inference"] = set(MAY_USE)
LOW = set(MAY_USE)
for middle in ("training", "evaluation", "report", "interop"):
    MAY_USE[middle] = LOW | {middle}
MAY_USE["interop"] |= {"build"}  # whole models come in and go out
MAY_USE["study"] = LOW | {"study", "report"}  # its results are a page
MAY_USE["play"] = LOW | {"play"}
ONLY_IN = {"pytorch_lightning": {"training"}, "hydra": {"app"}, "omegaconf": {"app"}, "wandb": {"training", "app"}}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ([f"ldmlab.{a.name}" for a in node.names] if node.module == "ldmlab" else [node.module])


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package in ONLY_IN:
            assert room in ONLY_IN[package], f"{room} imports {name}"
        if package == "ldmlab" and room in MAY_USE:
            used = rest.partition(".")[0]
            assert used == room or used in MAY_USE[room], f"{room} imports ldmlab.{used}"


def test_the_table_knows_every_room() -> None:
    rooms = {p.relative_to(SOURCE).parts[0].removesuffix(".py") for p in FILES}
    assert rooms - MAY_USE.keys() <= {"app", "build", "__init__", "__main__"}


def test_formats_do_not_import_each_other() -> None:
    """What two foreign formats share lies beside their packages."""
    formats = sorted(path.parent for path in (SOURCE / "interop").glob("*/__init__.py"))
    assert len(formats) > 1
    for folder in formats:
        others = tuple(f"ldmlab.interop.{other.name}" for other in formats if other != folder)
        for path in folder.rglob("*.py"):
            assert not [name for name in imports(path) if name.startswith(others)], path


def test_no_two_files_import_each_other() -> None:
    """Nor through others: no circle among the files, imports inside functions and for types included."""
    names = {path: ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts) for path in FILES}
    known = {name.removesuffix(".__init__") for name in names.values()}
    edges = {name.removesuffix(".__init__"): set(_files_imported(path, known)) for path, name in names.items()}
    while free := [name for name, used in edges.items() if not used]:
        edges = {name: used - set(free) for name, used in edges.items() if name not in free}
    assert not edges, f"these files import each other in a circle, or are imported by one: {sorted(edges)}"


def _files_imported(path: Path, known: set[str]) -> Iterator[str]:
    own = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            candidates = [name if name in known else str(node.module) for name in inside]
        else:
            continue
        yield from (name for name in candidates if name in known and name != own)
