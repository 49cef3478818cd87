"""How much of a field, such as the category, follows from a caption by a text tower, for new captions too.

    python benchmarks/caption_probe.py runs/demo/clip data/emoji-256 category

A linear classifier is fitted to training captions and applied to validation captions: on the mean of the tower's states
over a caption's tokens, and on which pieces of words occur. Printed: accuracy balanced over the classes that occur.
"""

import json
import sys
import tarfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmlab.build import load_clip
from ldmlab.conditioners.text import TextTower

_PIECES, _STEPS = 8192, 200  # numbers of the commonest pieces of words; updates of a classifier


def main() -> None:
    """Prints one line an input of the classifier."""
    run, shards, field = sys.argv[1:]
    rows = {split: captions(Path(shards) / split, field) for split in ("train", "val")}
    names = sorted({label for _, label in rows["train"]})
    labels = {split: torch.tensor([names.index(label) for _, label in found]) for split, found in rows.items()}
    clip = load_clip(run)
    tower = TextTower(clip.model, "last", False).eval()
    ids = {split: clip.ids([caption for caption, _ in found]) for split, found in rows.items()}
    print(f"{len(rows['train'])} training captions, {len(rows['val'])} others, {len(names)} classes of {field}")
    for name, inputs in (("states of the tower", means), ("pieces of words", pieces)):
        known, new = (inputs(tower, ids[split]) for split in ("train", "val"))
        found = probe(known, labels["train"], new, labels["val"])
        print(f"{name}: {found[0]:.1%} of training captions, {found[1]:.1%} of others (chance {1 / len(names):.1%})")


def captions(folder: Path, field: str) -> list[tuple[str, str]]:
    """Caption and field of every sample of shards."""
    found = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            fields = (json.load(tar.extractfile(one)) for one in tar if one.name.endswith(".json"))  # type: ignore[arg-type]
            found += [(one["caption"], str(one[field])) for one in fields]
    return found


@torch.no_grad()
def means(tower: TextTower, ids: Tensor) -> Tensor:
    """Token numbers (B, L) => mean states (B, D)."""
    states = torch.cat([tower(part) for part in ids.split(256)])
    there = (ids > 0).float()[..., None]
    return (states * there).sum(1) / there.sum(1)


def pieces(tower: TextTower, ids: Tensor) -> Tensor:
    """Token numbers (B, L) => which of the commonest pieces occur (B, _PIECES), rows of norm 1."""
    return F.normalize(torch.zeros(len(ids), _PIECES).scatter_(1, ids.where(ids < _PIECES, 0), 1.0))


def probe(known: Tensor, labels: Tensor, new: Tensor, new_labels: Tensor) -> tuple[float, float]:
    """Balanced accuracy of a linear classifier on what it was fitted to, and on what is new."""
    torch.manual_seed(0)
    weight = 1 / torch.bincount(labels).float()
    linear = torch.nn.Linear(known.shape[1], len(weight))
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.02, weight_decay=0.1)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(linear(known), labels, weight=weight).backward()
        optimizer.step()

    def balanced(inputs: Tensor, truth: Tensor) -> float:
        right = linear(inputs).argmax(1) == truth
        return float(torch.stack([right[truth == k].float().mean() for k in truth.unique()]).mean())

    return balanced(known, labels), balanced(new, new_labels)


if __name__ == "__main__":
    main()
