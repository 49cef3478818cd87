"""The scores over the guidance scale: the same conditions and noise, sampled once for each scale."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ldmlab.evaluation.scoring import EvaluationPass, Track
from ldmlab.evaluation.sources import Samples


class GuidanceCurve:
    """Made once the real images are seen and before the first sample."""

    def __init__(self, scales: Sequence[float], seen: EvaluationPass, samples: Samples) -> None:
        self.scales, self.samples = sorted(set(map(float, scales))), samples
        self._fresh = seen.for_other_samples() if self.scales else seen

    def run(self, own: Mapping[str, Any], batch_size: int, track: Track) -> list[dict[str, Any]]:
        """A point for each scale, in rising order; the evaluation's own scale takes its scores."""
        usual = self.samples.settings.guidance_scale
        return [
            {"guidance_scale": scale, "scores": dict(own) if scale == usual else self._at(scale, batch_size, track)}
            for scale in self.scales
        ]

    def _at(self, scale: float, batch_size: int, track: Track) -> dict[str, Any]:
        seen = self._fresh.for_other_samples()
        settings = replace(self.samples.settings, guidance_scale=scale)
        title = f"samples at guidance scale {scale:g}"
        seen.add_all(self.samples.share(self.samples.requests, settings, title, batch_size, track), real=False)
        return {name: asdict(score) for name, score in seen.compute().items()}
