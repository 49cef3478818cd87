"""Contrastive training of a text and an image encoder: an image and its caption become similar, others dissimilar."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from open_clip import ClipLoss
from torch import Tensor, nn

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.metrics.clip_scores import retrieval
from ldmlab.nn.openclip import ClipTokens, OpenClip
from ldmlab.nn.pixels import to_float
from ldmlab.stored_names import IDS_PREFIX
from ldmlab.training.data_module import Batch, first_images, gathered, slice_of_process
from ldmlab.training.stage import Losses, Stage

_LARGEST_SCALE = math.log(100.0)  # of the logits, as in CLIP
_IDS = IDS_PREFIX + "clip"  # from the loader
_PANEL_IMAGES, _PANEL_FOUND = 8, 4


class ClipStage(Stage):
    """An open_clip model against its contrastive loss over the pairs of all processes.

    Every other caption of the batch counts as wrong, also one with the same words: data with few distinct captions
    needs a batch much smaller than their number.
    """

    kind: ClassVar[str] = "clip"
    averaged: ClassVar[str | None] = "clip"
    monitor = "recall_5_of_50"
    monitor_mode = "max"
    panel_titles: ClassVar[Mapping[str, str]] = {
        "found_by_caption": "validation image | images that its caption, below, finds: best first",
        "similarities": "similarity of images (rows) and captions (columns): white 1, black -1",
    }

    def __init__(self, *, model: OpenClip, **options: Any) -> None:
        super().__init__(**options)
        if self.accumulate > 1:
            raise InputError(
                f"accumulate={self.accumulate}: the contrastive loss compares pairs within a micro-batch only; "
                "use accumulate=1 with a larger micro-batch or more processes."
            )
        self.open_clip = model
        self.clip = model.model

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Both towers and the scale of the logits are one group."""
        return {"clip": [p for p in self.clip.parameters() if p.requires_grad]}

    def saved(self) -> dict[str, nn.Module]:
        """The whole model, names as in open_clip."""
        return {"clip": self.clip}

    def tokenizers(self) -> dict[str, Any]:
        return {"clip": ClipTokens(self.open_clip.tokenizer)}

    def losses(self, group: str, batch: Batch) -> Losses:
        """Mean of both directions' cross-entropies; each process has its own pairs against those of all."""
        with torch.no_grad():
            self.clip.logit_scale.clamp_(0, _LARGEST_SCALE)  # type: ignore[operator]
        image, text = self._features(batch)
        scale = self.clip.logit_scale.exp()  # type: ignore[operator]
        ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        loss = ClipLoss(local_loss=True, gather_with_grad=True, **ranks)
        with torch.autocast(self.device.type, enabled=False):
            total = loss(image, text, scale)
        return Losses(total, {"loss": total, "logit_scale": scale})

    def _features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of images and captions, unit length, float32, (B, D) each."""
        scale: Tensor = self.clip.logit_scale  # type: ignore[assignment]
        images = self.open_clip.pixels(to_float(batch["image"].to(self.device))).to(scale.dtype)
        ids = batch[_IDS] if _IDS in batch else self.open_clip.ids(batch["caption"]).to(self.device)
        image = self.clip.encode_image(images, normalize=True)  # type: ignore[operator]
        text = self.clip.encode_text(ids, normalize=True)  # type: ignore[operator]
        return image.float(), text.float()

    def on_validation_epoch_start(self) -> None:
        self._pairs: list[tuple[str, str, Tensor, Tensor]] = []  # key, caption, features of image and text

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if not len(batch["position"]):
            return
        image, text = (f.cpu() for f in self._features(batch))
        self._pairs += zip(batch["key"], batch["caption"], image, text, strict=True)

    def validation_metrics(self) -> dict[str, float]:
        """Retrieval among the pairs, the same whatever the number of processes."""
        mine, self._pairs = self._pairs, []
        everything = sorted((row for part in distributed.gather(mine) for row in part), key=lambda row: row[0])
        if not everything:
            return {}
        _, captions, images, texts = zip(*everything, strict=True)
        return retrieval(torch.stack(images), torch.stack(texts), captions)

    def panels(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Rows of a validation image | the images its caption finds first; and similarities, image by caption."""
        batch = first_images(batches, 64, self.device)
        image, text = (gathered(f, len(batch["position"])) for f in self._features(slice_of_process(batch)))
        images = batch["image"].cpu().permute(0, 2, 3, 1)  # (N, H, W, 3)
        similarity = image @ text.T  # (N, N)
        found = similarity.T.topk(min(_PANEL_FOUND, len(image)), dim=1).indices[:_PANEL_IMAGES]  # (P, found)
        rows = [torch.cat([images[i], *images[best]], dim=1) for i, best in enumerate(found)]
        self.panel_labels = {"found_by_caption": batch["caption"][: len(rows)]}
        shade = ((similarity + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        cells = shade.repeat_interleave(8, 0).repeat_interleave(8, 1)
        return {"found_by_caption": torch.stack(rows), "similarities": cells[None, :, :, None].repeat(1, 1, 1, 3)}
