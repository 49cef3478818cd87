"""Evaluation protocol: samples, conditions, reference and scores, written completely into every record."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from typing import Any

from ldmlab.errors import InputError, check_fraction, check_side, one_of
from ldmlab.inference.sample_settings import GUIDANCE, SampleSettings

CONDITIONS = ("none", "reference", "balanced_classes")
_OF_THE_DATA = frozenset({"masks", "captions", "labels", "posterior", "psim", "psnr", "epoch"})  # open too


@dataclass(frozen=True)
class Protocol:
    """Samples, conditions, reference and scores; everything except the model that determines a score."""

    idle_without = "copy_quantile: neighbours, at_most: samples=null, paper_row: paper_table"
    name: str
    reference: str  # split compared with: train | val
    metrics: Mapping[str, Any]  # files of conf/metric by name
    samples: int | None = None  # generated images; null: one for each reference image
    at_most: int | None = None  # where samples is null: no more than these
    conditions: str = "reference"  # none | reference: as the reference images, in order | balanced_classes
    classes: int | None = None  # with balanced_classes: how many there are
    reference_limit: int | None = None  # only the first images of the split; null: all
    max_bad: float = 0.1  # share of the reference images that may be unreadable
    image_size: int | None = None  # side of the images compared, px; null: as the model was trained
    task: Mapping[str, Any] = field(default_factory=dict)  # options of the model's task, such as held_out_masks
    steps: int | None = 50
    eta: float = 0.0
    guidance_scale: float | None = None  # null: 3 if the model was trained for it, 2 with a weak model, else 1 (off)
    guidance_interval: Sequence[float] | None = None  # guided between [low, high]; null: everywhere
    guidance_interval_unit: str = "position"  # of its bounds: position, 0 (clean) .. 1 (noise) | sigma
    guidance_rescale: float | None = None  # how far guidance keeps the output's deviation, 0 .. 1
    guided_channels: int | None = None  # the first ones of the latent; null: all
    weak_model: str | None = None  # of autoguidance: run, checkpoint or model folder
    sampler: str = "ddim"
    spacing: str | None = None  # null: the sampler's own
    sampling: Mapping[str, Any] = field(default_factory=dict)  # other settings: churn, shift, temperature, window, ...
    seed: int = 0
    neighbours: int = 0  # samples shown with their nearest training images; 0: no search for copies
    copy_quantile: float = 0.01  # share of held-out images that the threshold calls copies
    sweep: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # settings of sampling => values scored too
    sweep_seeds: int = 1  # samples of each combination of these values, from seed on: mean and deviation
    class_field: str | None = None  # field of KEY.json by which scores are broken down
    controls: int = 0  # noise, shuffled and real images scored beside the samples, of each at most these; 0: none
    shown: int = 40  # samples in the report's grid
    paper_table: str | None = None  # of the paper's tables
    paper_row: str | None = None  # id of the table's row to compare with
    dataset: str | None = None  # name of the data set that the reference shards hold
    feature_network: str | None = None  # name of the extractor; results of another one are marked
    reference_rule: str | None = None  # crop and resize rule that made the reference shards; another is refused
    reference_hash: str | None = None  # manifest hash of the reference shards, to pin a set; another is refused
    also_against: str | None = None  # all of another split: a second Frechet distance of the same samples
    pairs: bool = False  # each sample against the image whose condition it was given: PSNR, SSIM, LPIPS
    mask_buckets: Mapping[str, Sequence[float]] = field(default_factory=dict)  # name => share of the hole [low, high)
    bucket_tables: Mapping[str, str] = field(default_factory=dict)  # name => table of the paper
    evaluators: Mapping[str, Any] = field(default_factory=dict)  # files of conf/evaluator by name: measure conditioning
    baselines: Mapping[str, Any] = field(
        default_factory=dict
    )  # files of conf/baseline by name, scored by the same metrics
    changed: Sequence[str] = ()  # options that are not those of the file of this name; evaluate.py finds them
    leaves_open: Mapping[str, str] = field(default_factory=dict)  # field => what the paper leaves open, what is chosen

    def __post_init__(self) -> None:
        if self.image_size is not None:
            check_side("protocol.image_size", self.image_size)
        one_of("protocol.reference", self.reference, ("train", "val"))
        if self.also_against is not None and self.also_against not in {"train", "val"} - {self.reference}:
            raise InputError(
                f"protocol.also_against={self.also_against} is not the other split than protocol.reference="
                f"{self.reference}; choose train or val, or null."
            )
        if not 0 < self.copy_quantile < 1:
            raise InputError(
                f"protocol.copy_quantile={self.copy_quantile} is not between 0 and 1; choose for instance 0.01."
            )
        one_of("protocol.conditions", self.conditions, CONDITIONS)
        for name in ("samples", "at_most"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise InputError(f"protocol.{name}={value} is too few to score; choose at least 2.")
        for name in ("shown", "neighbours", "controls"):
            if (value := getattr(self, name)) < 0:
                raise InputError(f"protocol.{name}={value} is below 0; choose 0 for none.")
        check_fraction("protocol.max_bad", self.max_bad)
        self._check_pairs()
        self._check_sweep()
        self.settings()  # its values are checked here too
        if lost := sorted(self.leaves_open.keys() - {item.name for item in fields(self)} - _OF_THE_DATA):
            raise InputError(f"protocol.leaves_open names {', '.join(lost)}, which is no field of a protocol.")
        if (self.conditions == "balanced_classes") != (self.classes is not None):
            raise InputError("protocol.classes goes with protocol.conditions=balanced_classes; give both or neither.")

    def _check_pairs(self) -> None:
        if self.mask_buckets and not self.pairs:
            raise InputError(
                "protocol.mask_buckets compares samples with their originals; set protocol.pairs=true too."
            )
        if self.pairs and self.conditions != "reference":
            raise InputError(
                f"protocol.conditions={self.conditions} has no image to compare with a sample, which protocol.pairs "
                "needs; choose protocol.conditions=reference."
            )
        if unknown := sorted(self.bucket_tables.keys() - self.mask_buckets.keys()):
            raise InputError(f"protocol.bucket_tables names {', '.join(unknown)}, which no protocol.mask_buckets is.")
        for name, bounds in self.mask_buckets.items():
            if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= 1:
                raise InputError(f"protocol.mask_buckets.{name}={list(bounds)} is no range; give [low, high].")

    def _check_sweep(self) -> None:
        if self.sweep_seeds < 1 or (self.sweep_seeds > 1 and not self.sweep):
            way = "1 or more" if self.sweep_seeds < 1 else "1, or give protocol.sweep"
            raise InputError(f"protocol.sweep_seeds={self.sweep_seeds} has nothing to repeat; choose {way}.")
        known = [one.name for one in fields(SampleSettings) if one.name not in ("seed", "size")]
        for name, values in self.sweep.items():
            one_of("protocol.sweep", name, known)
            if isinstance(values, str | int | float | None) or not len(values):
                raise InputError(f"protocol.sweep.{name}={values} is no list of values; give for instance [1,1.5,2].")
            if len({str(float(one) if isinstance(one, int | float) else one) for one in values}) < len(values):
                raise InputError(f"protocol.sweep.{name}={list(values)} names a value twice; give each once.")

    def settings(self, **changes: Any) -> SampleSettings:
        """How its samples are generated, with these changes; a scale of 1 among them is without guidance."""
        if changes.get("guidance_scale") == 1:
            changes |= {**dict.fromkeys(GUIDANCE), "guidance_interval_unit": "position"}
        same = {item.name for item in fields(SampleSettings)} & {item.name for item in fields(self)}
        own = {"size": self.image_size, **{name: getattr(self, name) for name in same}}
        for name in self.sampling:
            if name in own:
                field_name = "image_size" if name == "size" else name
                raise InputError(f"protocol.sampling.{name} is protocol.{field_name}; set that.")
            one_of("protocol.sampling", name, {item.name for item in fields(SampleSettings)} - own.keys())
        return SampleSettings(**{**own, **self.sampling, **changes})

    def combinations(self) -> list[dict[str, Any]]:
        """The settings of each point of the sweep, the first of its settings changing last; none without a sweep."""
        return [dict(zip(self.sweep, values, strict=True)) for values in product(*self.sweep.values())] * bool(
            self.sweep
        )

    def as_plain(self) -> dict[str, Any]:
        """For metrics.json."""
        return asdict(self) | {"changed": list(self.changed)}
