"""What a concept filter blocks of the shipped validation emoji: those of one category, and the others.

python benchmarks/concept_filter.py FILTER.yaml Flags
"""

import sys
from pathlib import Path

import torch

from ldmlab.app.filters import read_filter
from ldmlab.data.shard_data import ShardData

LIMITS = (1.0, 1.5, 2.0, 2.5, 3.0)


def main(path: str, category: str) -> None:
    guard = read_filter(Path(path), "cpu")
    folders = [f"data/emoji-256/{split}" for split in ("train", "val")]
    dataset = ShardData(*folders, image_size=32, fields=("caption", "category"), workers=0).val_dataset("images", "val")
    samples = [dataset[place] for place in range(len(dataset))]
    of_category = torch.tensor([sample["category"] == category for sample in samples])
    images = torch.stack([torch.as_tensor(sample["image"]).permute(1, 2, 0) for sample in samples])
    scores = {"prompts": guard.prompt_scores([s["caption"] for s in samples]), "images": guard.image_scores(images)}
    for kind, found in scores.items():
        for limit in LIMITS:
            over = (found > limit).any(dim=1).double()
            inside, outside = over[of_category], over[~of_category]
            shares = f"{inside.mean():.0%} of {len(inside)}, {outside.mean():.1%} of {len(outside)} others"
            print(f"{kind:<8} {limit}  {shares}")


if __name__ == "__main__":
    main(*sys.argv[1:])
