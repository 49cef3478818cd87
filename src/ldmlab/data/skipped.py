"""Bad samples counted, and the run stopped when they are too many."""

from collections import Counter
from typing import Any

from ldmlab.errors import InputError

JUDGED_OVER = 1000  # images: below that one bad sample would be a large share


class SkipCounter:
    """Counts images and skipped samples over batches; `limit` is the share of skipped ones a run may have."""

    def __init__(self, limit: float) -> None:
        self.limit, self.seen = limit, 0
        self.by_shard: Counter[str] = Counter()

    @property
    def skipped(self) -> int:
        """Skipped samples so far."""
        return self.by_shard.total()

    @property
    def share(self) -> float:
        """Skipped samples per image that was wanted."""
        return self.skipped / max(self.seen, 1)

    def add(self, batch: dict[str, Any]) -> list[str]:
        """Count a batch and return what it skipped ("SHARD[SAMPLE]: reason"); InputError above the limit."""
        reasons: list[str] = batch["skipped"]
        self.seen += len(batch["key"])
        self.by_shard.update(reason.split("[", 1)[0] for reason in reasons)
        if self.skipped > self.limit * max(self.seen, JUDGED_OVER):
            worst, count = self.by_shard.most_common(1)[0]
            raise InputError(
                f"data: {self.skipped} bad samples among {self.seen} images are more than the allowed share of "
                f"{self.limit:g}, {count} of them in {worst} (last: {reasons[-1]}); repair or repack the shards, "
                "or raise the allowed share."
            )
        return reasons
