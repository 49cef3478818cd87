"""The memorisation part of a report: suspected copies beside the training images that they resemble."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ldmlab.report.report_images import image_tag

_GROUPS = (  # of pairs; pages of before have `pairs` alone
    ("closest", "sample", "The samples nearest to a training image, of all that were drawn."),
    ("held_out", "held_out", "Held-out real images at the threshold: as near as this two different images come."),
    ("pairs", "sample", "Ordinary samples, beside the training images nearest to them."),
)


def audit_section(result: Mapping[str, Any], folder: Path) -> str:
    """Says how many are suspicious, and shows the pairs."""
    found = result.get("neighbours")
    if not found:
        return ""
    lead = f"Each image beside the nearest of all {found['training_images']:,} training images (cosine distance)."
    groups = "".join(
        f"<p>{note}</p>{_cards(found[name], left, found['bar'], folder)}"
        for name, left, note in _GROUPS
        if found.get(name)
    )
    return f"<section><h2>Learned by heart?</h2><p>{escape(lead + ' ' + verdict(found))}</p>{groups}</section>"


def verdict(found: Mapping[str, Any]) -> str:
    """The share of copies in a sentence; empty without held-out images."""
    if found["copies"] is None:
        return "Without held-out images there is no threshold, so nothing is counted."
    expected = ""
    if found.get("expected") is not None:
        expected = f" ({found['expected']:.1%} ± {found['error']:.1%} expected of images never seen in training)"
    return (
        f"{found['copies']:.1%} of all samples{expected} are nearer to a training image than {found['bar']:.3g}, the "
        f"threshold that held-out images set; half of the samples are within {found['median_distance_samples']:.3g} "
        f"of one, half of the held-out images within {found['median_distance_held_out']:.3g}."
    )


def _cards(pairs: Sequence[Mapping[str, Any]], left: str, bar: float | None, folder: Path) -> str:
    cards = "".join(_card(pair, left, bar, folder) for pair in pairs)
    return f'<div class="cards pairs">{cards}</div>'


def _card(pair: Mapping[str, Any], left: str, bar: float | None, folder: Path) -> str:
    words = f"“{pair['caption']}” beside “{pair['train_caption']}”, {pair['distance']:.3g}"
    images = "".join(image_tag(folder, pair[side], words) for side in (left, "train"))
    mark = "copy" if left == "sample" and bar is not None and pair["distance"] < bar else ""
    return f'<figure class="card {mark}"><div>{images}</div><figcaption>{escape(words)}</figcaption></figure>'
