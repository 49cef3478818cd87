"""A class number to one learned vector: a single token of cross-attention, as in the paper, or a summed vector."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.conditioners import BaseConditioner, check_classes
from ldmlab.contracts import Encode
from ldmlab.errors import InputError, one_of


class ClassEmbedder(BaseConditioner):
    """`classes` learned vectors and, for guidance, one more, the last, for "no class"."""

    reads = frozenset({"class_id"})

    def __init__(
        self,
        classes: int,  # number of classes, numbered from 0
        width: int = 512,  # of their vectors
        drop: float = 0.1,  # rate of "no class" in training, for guidance
        slot: str = "tokens",  # tokens: (B, 1, width) | vector: (B, width)
        null_row: bool = True,  # a row for "no class"; False: as in the paper's models without guidance, drop is 0
    ) -> None:
        super().__init__(drop, width)
        one_of("conditioner.slot", slot, ("tokens", "vector"))
        self.classes, self.slot = classes, slot
        if drop and not null_row:
            raise InputError(f"conditioner.drop={drop} needs a row for no class; set null_row=true or drop=0.")
        self.embedding = nn.Embedding(classes + null_row, width)

    def forward(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """The vectors of `class_id` (B,); numbers outside 0 .. classes - 1 are refused."""
        ids = torch.as_tensor(batch["class_id"])
        check_classes("class_id", ids, "conditioner.classes", self.classes)
        return self._rows(ids)

    def check(self, fields: Mapping[str, Any]) -> None:
        """Refuse a class that the model was not trained on."""
        number = fields["class_id"]
        if not isinstance(number, int) or not 0 <= number < self.classes:
            raise InputError(f"class_id {number!r} is not a class of this model; classes: 0 .. {self.classes - 1}.")

    def null(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        if self.embedding.num_embeddings == self.classes:
            raise InputError("conditioner.null_row=false: this model has no vector for no class; use guidance_scale=1.")
        return self._rows(torch.full((len(batch["class_id"]),), self.classes, device=self.embedding.weight.device))

    def _rows(self, ids: Tensor) -> Tensor:
        vectors = self.embedding(ids.to(self.embedding.weight.device))
        return vectors[:, None, :] if self.slot == "tokens" else vectors


class OneHotClass(ClassEmbedder):
    """(B, classes): sqrt(classes) where the class is, so that the mean square is 1; zeros for "no class" (EDM2)."""

    place: Tensor  # the device

    def __init__(self, classes: int, drop: float = 0.1) -> None:
        BaseConditioner.__init__(self, drop, classes)
        self.classes, self.slot = classes, "vector"
        self.register_buffer("place", torch.zeros(0), persistent=False)

    def null(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        return torch.zeros(len(batch["class_id"]), self.classes, device=self.place.device)

    def _rows(self, ids: Tensor) -> Tensor:
        return self.classes**0.5 * F.one_hot(ids.to(self.place.device).long(), self.classes).float()
