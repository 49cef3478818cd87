"""Gradients averaged over processes while the backward pass still runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_ELEMENTS = 6_500_000  # 25 MB of float32 a bucket


class MeanGradients:
    """Replaces every gradient of a group by its mean over processes, in flat buckets of about 25 MB.

    A bucket is sent as soon as its gradients are complete, beginning with the last parameters, whose gradients come
    first. Buckets leave in one order on all processes, whatever parameters a process's loss reaches; a gradient that
    one of them does not have counts as zero.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._buckets: list[list[nn.Parameter]] = []
        room = 0
        for parameter in reversed(parameters):
            if room <= 0 or parameter.dtype != self._buckets[-1][-1].dtype:
                self._buckets.append([])
                room = _BUCKET_ELEMENTS
            self._buckets[-1].append(parameter)
            room -= parameter.numel()
            parameter.register_post_accumulate_grad_hook(partial(self._complete, len(self._buckets) - 1))
        self._missing: list[int] = []  # gradients, by bucket; [] outside `during`
        self._sent: list[tuple[Tensor, Any]] = []  # sums on their way

    @contextmanager
    def during(self) -> Iterator[None]:
        """Around the backward pass that completes the gradients; all buckets are on their way at its end."""
        self._missing = [len(bucket) for bucket in self._buckets]
        try:
            yield
            while len(self._sent) < len(self._buckets):
                self._send()
        finally:
            self._missing = []

    @torch.no_grad()
    def wait(self) -> None:
        """All gradients are means afterwards."""
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            parts = flat.div_(dist.get_world_size()).split([p.numel() for p in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(part.view_as(parameter.grad))
        self._sent.clear()

    def _complete(self, index: int, _: Tensor) -> None:
        if not self._missing:
            return
        self._missing[index] -= 1
        assert index >= len(self._sent), "a gradient changed after it was sent"
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        """The next bucket."""
        bucket = self._buckets[len(self._sent)]
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.reshape(-1) for p in bucket if p.grad is not None])
        self._sent.append((flat, dist.all_reduce(flat, async_op=True)))
