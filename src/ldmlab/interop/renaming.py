"""Our networks and their tensors in foreign formats: tables of names (`names.yaml`), read in both directions."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from math import prod
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

from ldmlab.checkpoints import fill, without_weights
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate

Node = Mapping[str, Any]
State = Mapping[str, Tensor]
StateDict = dict[str, Tensor]
Derived = Callable[..., Mapping[str, int | str]]  # numbers in a name => fields
Names = dict[str, tuple[str, ...]]  # tensor here => tensor there, or those of q, k and v
_TABLES, OPTIONS = (
    yaml.safe_load(files("ldmlab.interop").joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    for name in ("names", "options")
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def names_of(form: str, *tables: str) -> dict[str, str]:
    """Rows of tables of a format, module here => module there."""
    rows = {}
    for table in tables:
        for ours, there in _TABLES[form][table].items():
            if isinstance(there, str):
                rows[ours] = there
            else:
                place, inside = there
                rows.update({f"{ours}.{here}": f"{place}.{name}" for here, name in inside.items()})
    return rows


def renamed(
    tensors: Iterable[str],
    table: Mapping[str, str],
    derived: Callable[..., Mapping[str, int | str]] = lambda *numbers: {},
) -> Names:
    """Names of tensors of ours; `derived` gives more fields for the numbers in a name. KeyError: not in the table."""
    names: Names = {}
    for tensor in tensors:
        row, numbers = _NUMBER.sub("#", tensor), [int(number) for number in _NUMBER.findall(tensor)]
        module, _, leaf = row.rpartition(".")
        there = table[row] if row in table else f"{table[module]}.{leaf}"
        fields = {"last": numbers[-1], **derived(*numbers)} if numbers else {}
        parts = "qkv" if "{qkv}" in there else "-"
        names[tensor] = tuple(there.format(*numbers, **fields, qkv=part) for part in parts)
    return names


def numbered(**lists: Sequence[str]) -> Derived:
    """As `derived`: of each list the entry of the first number in a name."""
    return lambda number, *rest: {name: entries[number] for name, entries in lists.items() if number < len(entries)}


_LISTED = 30  # names of one sort in a message


class Mismatch(NamedTuple):
    """How tensors of a file differ from those of a network."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def __bool__(self) -> bool:
        return any(self)

    def __str__(self) -> str:
        sorts = (
            f"{len(names)} {sort} ({', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''})"
            for sort, names in self._asdict().items()
            if names
        )
        return ", ".join(sorts)


def compare(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, flat: bool = False) -> Mismatch:
    """Names and shapes against those expected; flat: weights of 1 x 1 convolutions and linear layers are the same."""

    def same(name: str) -> bool:
        shape, full = tensors[name].shape, expected[name].shape
        matrices = flat and min(len(shape), len(full)) >= 2 and prod(shape[2:]) == prod(full[2:]) == 1
        return shape[:2] == full[:2] if matrices else shape == full

    wrong = sorted(name for name in expected.keys() & tensors.keys() if not same(name))
    return Mismatch(
        missing=sorted(expected.keys() - tensors.keys()),
        unexpected=sorted(tensors.keys() - expected.keys()),
        misshapen=[f"{name} {list(tensors[name].shape)} instead of {list(expected[name].shape)}" for name in wrong],
    )


def refuse_mismatch(mismatches: Mapping[str, Mismatch]) -> None:
    """One InputError for all parts that do not fit."""
    wrong = [f"the {part} has {mismatch} keys" for part, mismatch in mismatches.items() if mismatch]
    if wrong:
        raise InputError(f"{'; '.join(wrong)}; give the configuration that belongs to these weights.")


@dataclass(frozen=True)
class Part:
    """A network of ours, without weights until `filled`, and the names of its tensors in a foreign format."""

    title: str  # in messages
    module: nn.Module
    names: Names  # what is not among them has no place there
    axes: Mapping[str, int] = field(default_factory=dict)  # there, where only one side has a 1 x 1 convolution
    heads: Mapping[str, int] = field(default_factory=dict)  # of q, k, v products, 1 unless listed

    @cached_property
    def expected(self) -> StateDict:
        """Foreign names and shapes, on the meta device."""
        return self.to_foreign({name: tensor.to("meta") for name, tensor in self.module.state_dict().items()})

    def to_foreign(self, state: State) -> StateDict:
        """Our tensors under their foreign names."""
        result: StateDict = {}
        for ours, names in self.names.items():
            if ours not in state:
                continue
            tensor = state[ours]
            if ours in self.axes:
                tensor = tensor.reshape(*tensor.shape[:2], *[1] * (self.axes[ours] - 2))
            parts = [tensor]
            if len(names) > 1:
                split = tensor.unflatten(0, (self.heads.get(ours, 1), len(names), -1))  # (H, 3, d, ...)
                parts = [part.flatten(0, 1) for part in split.unbind(1)]
            result.update(zip(names, parts, strict=True))
        return result

    def to_ours(self, state: State) -> StateDict:
        """Foreign tensors that fit the network under our names: the inverse of `to_foreign`."""
        result, own = {}, self.module.state_dict()
        for ours, names in self.names.items():
            parts = [state[name] for name in names]
            if len(parts) > 1:
                heads = self.heads.get(ours, 1)
                parts = [torch.stack([part.unflatten(0, (heads, -1)) for part in parts], dim=1)]
            result[ours] = parts[0].reshape(own[ours].shape)
        return result

    def mismatch(self, tensors: State) -> Mismatch:
        """How foreign tensors differ from the network's; linear layers and 1 x 1 convolutions are the same."""
        return compare(tensors, self.expected, flat=True)

    def filled(self, tensors: State) -> nn.Module:
        """The module with foreign tensors; one InputError lists all that are missing, unexpected or misshapen."""
        refuse_mismatch({self.title: self.mismatch(tensors)})
        fill(self.module, self.to_ours(tensors))
        return self.module


def fill_parts(parts: Mapping[str, Part], state: State) -> None:
    """The tensors of a file into parts, the first of which counts what belongs to none; one InputError for all."""
    mine = {title: {k: state[k] for k in part.expected if k in state} for title, part in parts.items()}
    found = {name for tensors in mine.values() for name in tensors}
    mine[next(iter(parts))] |= {name: tensor for name, tensor in state.items() if name not in found}
    refuse_mismatch({part.title: part.mismatch(mine[title]) for title, part in parts.items()})
    for title, part in parts.items():
        part.filled(mine[title])


class OfficialModule(nn.Module):
    """Our modules behind the signature of an official network."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        super().__init__()
        self._parts = parts
        for title, part in parts.items():
            self.add_module(title, part.module)

    def official_state(self) -> StateDict:
        """The tensors as they are now, under their official names."""
        return self._named(lambda module: module.state_dict())

    def official_gradients(self) -> StateDict:
        """Gradients of the parameters that have one, likewise."""

        def found(module: nn.Module) -> StateDict:
            return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

        return self._named(found)

    def _named(self, tensors: Callable[[nn.Module], State]) -> StateDict:
        own = [part.to_foreign(tensors(getattr(self, title))) for title, part in self._parts.items()]
        return {name: tensor for state in own for name, tensor in state.items()}


def refuse_unknown(config: Node, arguments: Iterable[str]) -> None:
    """InputError for what is no argument of the official class."""
    known = sorted(arguments)
    if strange := sorted(config.keys() - set(known)):
        raise InputError(f"{strange[0]} is no argument of the official network; arguments: {', '.join(known)}.")


def unfilled(node: Node, where: str) -> Any:
    """The module of a node of model.yaml, without memory for weights."""
    with without_weights():
        return instantiate(node, where=where)


def downsampling(node: Node) -> int:
    """f of a first stage's node."""
    return int(2 ** (len(node.get("channel_mult") or node.get("encoder_block_out_channels", [1])) - 1))


def named_as_theirs(tensor: str) -> bool:
    """Whether official first stages have the tensor: options of codebooks have counters of ours."""
    return not tensor.startswith("quantiser.") or tensor == "quantiser.codebook.weight"


def refuse_cosine(node: Node) -> None:
    """Codes of unit length exist only in ldmlab: other programs would decode with other vectors."""
    if node.get("cosine"):
        raise InputError("first_stage.cosine=true exists only in ldmlab; export it with --format ldmlab.")


def with_unused_head(state: StateDict, tokens: str, head: str) -> StateDict:
    """The paper's text transformer with the output layer that nothing runs: zeros where the model has none."""
    table = state.get(f"{tokens}.weight")
    if table is None or f"{head}.weight" in state:
        return state
    return {**state, f"{head}.weight": torch.zeros_like(table), f"{head}.bias": table.new_zeros(len(table))}


def clip_names(tensors: Iterable[str], prefix: str) -> Names:
    """Hugging Face's names of an OpenClipText's tensors; weights that are not run are left out."""
    run = (tensor for tensor in tensors if not tensor.startswith("tower.unused."))
    return renamed(run, {ours: prefix + foreign for ours, foreign in names_of("shared", "clip").items()})


CLIP_TEXT = OPTIONS["diffusers"]["clip"]


def clip_node(config: Node, *, layer: str = "last", padding: str = "end") -> dict[str, Any]:
    """Our conditioner's node for a CLIPTextModel's `config.json`; padding: zero where its pad token is number 0."""
    activations = {"quick_gelu": True, "gelu": False}
    activation = config.get("hidden_act", "quick_gelu")
    if activation not in activations:
        raise InputError(f"text encoder hidden_act={activation} is not supported; supported: quick_gelu and gelu.")
    text = {ours: config.get(name, default) for name, (ours, default) in CLIP_TEXT.items()}
    text["mlp_ratio"] = config["intermediate_size"] / text["width"]
    embed_dim = config.get("projection_dim", text["width"])
    return {
        "_target_": "ldmlab.conditioners.text.open_clip_text",
        "config": {"embed_dim": embed_dim, "quick_gelu": activations[activation], "text_cfg": text},
        "layer": layer,
        "padding": padding,
        "drop": 0.0,
    }


# ---- official arguments, from names and shapes of tensors


def numbers_of(state: State, pattern: str) -> list[int]:
    """What the group of a pattern finds at the beginning of names."""
    return [int(match[1]) for name in state if (match := re.match(pattern, name))]


def shape_of(state: State, name: str) -> tuple[int, ...]:
    """InputError where the tensor is missing."""
    if name not in state:
        raise InputError(f"the file has no tensor {name}, so it is no network of this --format; give its own.")
    return tuple(state[name].shape)
