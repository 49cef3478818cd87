"""Hydra's own command line over our files: one run, or the runs of a sweep, here or where a launcher starts them."""

import atexit
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ldmlab.app.compose import check_words, explained, searching
from ldmlab.app.conf_files import conf_dir
from ldmlab.errors import InputError

_OF_SWEEPS = ("launcher", "sweeper")  # groups that choose how runs are started


def hydra_main(config_name: str, job: Callable[[Any], Any]) -> None:
    """Run `job` under Hydra's own command line: overrides, `--multirun`, `--cfg job --resolve`, `--config-dir`.

    In a sweep a run's result is what `job` returns, or an InputError, which does not end the other runs.
    """
    import hydra

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra shortens tracebacks to its own frames otherwise
    overrides, several = _command_line(sys.argv[1:])
    flags = [word for word in sys.argv[1:] if word not in overrides]
    program, sys.argv[1:] = sys.argv[0], [*overrides, *flags]  # Hydra takes no flag between two options
    kept = [flag for flag in flags if flag not in ("-m", "--multirun")]
    failed: list[Exception] = []

    def guarded(config: Any) -> Any:
        """A launcher may call it in another process, where nothing of this command line is known."""
        swept = _words_of_a_swept_run()
        if swept is not None:
            sys.argv[:] = [program, *swept, *kept]
            if "SUBMITIT_FOLDER" in os.environ:  # before what the run registers, which then ends first
                atexit.register(_end_of_job, failed)
        try:
            with searching(sys.argv[1:]):
                return job(config)
        except Exception as error:  # kept for later: Hydra would print its own message and end the sweep
            failed.append(error)
            if swept is None:
                return None
            return error if isinstance(error, InputError) else _printed(error)

    with searching(sys.argv[1:]):
        check_words(overrides, several=several)
        if not several and (chosen := [word for word in overrides if chooses_a_sweep(word) or _of_a_sweep(word)]):
            raise InputError(f"{chosen[0]} is for several runs, or one that a launcher starts; add --multirun.")
        try:
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(guarded)()
        except Exception as error:
            raise explained(error, config_name, overrides) from error
    if failed and not several:  # a sweeper raises what failed in its runs
        raise failed[0]


def _words_of_a_swept_run() -> list[str] | None:
    """The options with which one run of a sweep is started again by itself; None outside of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return [word for word in HydraConfig.get().overrides.task if not chooses_a_sweep(word)]


def chooses_a_sweep(word: str) -> bool:
    return word.partition("=")[0].lstrip("+") in _OF_SWEEPS


def _of_a_sweep(word: str) -> bool:
    return word.lstrip("+~").startswith(tuple(f"hydra.{group}." for group in _OF_SWEEPS))


def _end_of_job(failed: Sequence[Exception]) -> None:
    """A job of submitit ends with 0 once its result is written; after a fault it is to fail in sacct too."""
    if failed:
        print(f"ldmlab: {failed[0]}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2 if isinstance(failed[0], InputError) else 1)


def _printed(error: Exception) -> InputError:
    """The fault in one line, after its traceback: an exception of any class may not survive pickling."""
    traceback.print_exception(error)
    return InputError(" ".join(f"{type(error).__name__}: {error}".split())[:500])


def _command_line(words: Sequence[str]) -> tuple[list[str], bool]:
    """The `key=value` words of Hydra's command line, and whether it is a multirun; a flag that it lacks is refused."""
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> NoReturn:
        raise InputError(f"{message}; --hydra-help explains the flags.")

    parser = get_args_parser()
    parser.allow_abbrev, parser.error = False, refuse  # type: ignore[method-assign]
    known, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        name = unknown[0].partition("=")[0].lstrip("-").replace("-", "_")
        raise InputError(f"{unknown[0]}: there is no such flag; options are written key=value, such as {name}=VALUE.")
    return known.overrides, known.multirun
