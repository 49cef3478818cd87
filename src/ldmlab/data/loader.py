"""Loaders whose workers keep to the processors there are and leave signals to the main process."""

import signal
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from ldmlab.data.workers import processors, quiet_worker

T_co = TypeVar("T_co", covariant=True)


class QuietLoader(DataLoader[T_co]):
    """torch's loader; its order of batches does not depend on the number of workers."""

    def __init__(self, dataset: Dataset[Any], *, workers: int, **options: Any) -> None:
        workers = min(workers, processors())
        init = quiet_worker if workers else None
        super().__init__(dataset, num_workers=workers, worker_init_fn=init, **options)

    def __iter__(self) -> Any:
        """Start the workers with SIGTERM blocked: some packages start threads of their own in every forked process,
        before `quiet_worker` runs, and a thread that does not block a signal may be the one to get it."""
        if not hasattr(signal, "sigwaitinfo"):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
