"""What the jobs of the comparison draw and rebuild, a row a factor."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ldmlab.report.report_images import thumbnail_tag

_SHOWN = 8  # images a row


def image_rows(jobs: Sequence[Mapping[str, Any]]) -> str:
    """For each first stage images there and back, for each job its last samples; nothing where none were kept."""
    rows, seen = [], set()
    for job in sorted(jobs, key=lambda found: (found["downsampling"], found["max_steps"], found["seed"])):
        name, first_stage = f"f{job['downsampling']}", Path(job["first_stage"])
        if job["first_stage"] not in seen and (rebuilt := _newest(first_stage, "tradeoff-*", "rebuilt_*.png")):
            rows.append(_row(f"{name}: there and back", rebuilt))
        seen.add(job["first_stage"])
        usual = job["points"][0]["sampler_steps"]
        drawn = _newest(Path(job["folder"]), f"step_{job['max_steps']:08d}-{usual}-*", "sample_*.png")
        label = f"{name}: drawn after {job['max_steps']:,} steps" + (f", seed {job['seed']}" if job["seed"] else "")
        rows.append(_row(label, drawn) if drawn else "")
    return "".join(rows)


def _newest(run: Path, evaluation: str, images: str) -> list[Path]:
    """The images of the latest of a run's evaluations of that name."""
    found = sorted(run.glob(f"evaluation/{evaluation}"), key=lambda folder: folder.stat().st_mtime)
    kept = sorted(found[-1].glob(f"images/{images}")) if found else []
    return kept[:: max(len(kept) // _SHOWN, 1)][:_SHOWN]  # neighbours in the set look alike


def _row(label: str, images: Sequence[Path]) -> str:
    tags = "".join(thumbnail_tag(path.parent, path.name) for path in images)
    return f'<h3>{escape(label)}</h3><div class="thumbnails">{tags}</div>'
