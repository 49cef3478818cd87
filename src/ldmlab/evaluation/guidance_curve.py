"""The scores over the guidance scale: the same requests and noise, drawn once for each scale."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ldmlab.evaluation.drawing import Drawing, Requests
from ldmlab.evaluation.record import gathered
from ldmlab.evaluation.score import EvaluationPass, Score
from ldmlab.inference.sample_settings import SampleSettings


class GuidanceCurve:
    """Made once the real images are seen and before the first sample."""

    def __init__(self, scales: Sequence[float], seen: EvaluationPass, settings: SampleSettings) -> None:
        self.scales, self.settings = sorted(set(map(float, scales))), settings  # resolved: the evaluation's own
        self._fresh = seen.for_other_samples() if self.scales else seen

    def run(self, drawing: Drawing, asked: Requests, own: Mapping[str, Score]) -> list[dict[str, Any]]:
        """A point for each scale, in rising order; the evaluation's own scale takes its scores."""
        return [
            {"guidance_scale": scale, "scores": {name: asdict(score) for name, score in scores.items()}}
            for scale in self.scales
            for scores in [own if scale == self.settings.guidance_scale else self._at(scale, drawing, asked)]
        ]

    def _at(self, scale: float, drawing: Drawing, asked: Requests) -> dict[str, Score]:
        seen = self._fresh.for_other_samples()
        settings = replace(self.settings, guidance_scale=scale)
        seen.add_all(drawing.share(asked, settings, f"guidance {scale:g}"), real=False)
        return seen.compute((sum(gathered(seen.counts[True])), sum(gathered(seen.counts[False]))))
