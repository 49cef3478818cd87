"""What every command shares: errors become one sentence and an exit code, Ctrl-C is not a traceback."""

import errno
import os
import sys
from collections.abc import Callable

from ldmlab.errors import InputError


def run_door(command: Callable[[], int | None]) -> int:
    """The exit code of `command`: 2 with one sentence on stderr for what the user can mend, 130 for Ctrl-C."""
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    try:
        return command() or 0
    except InputError as error:
        return _say(str(error), 2)
    except KeyboardInterrupt:
        return _say("stopped.", 130)
    except BrokenPipeError:  # `ldmlab ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        place = f" ({error.filename})" if error.filename else ""
        return _say(f"{error.strerror}{place}; free some space or choose another folder, then run it again.", 2)


def _say(sentence: str, code: int) -> int:
    print(f"ldmlab: {sentence}", file=sys.stderr)
    return code
