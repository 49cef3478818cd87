"""How many workers there may be, and workers that leave signals to the main process."""

import os
import signal
import threading


def processors() -> int:
    """Those this process may run on: a cluster's scheduler often gives a few of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quiet_worker(worker: int) -> None:
    """Worker start: Ctrl-C and a scheduler's signals reach the whole group, but only the main process may act on them.

    It needs its workers to finish the step it saves after. SIGTERM still ends a worker when its own parent sends it.
    """
    for name in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
