"""Hydra's composition over our files and a user's own, with errors as one sentence that names the nearest choice."""

import difflib
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from ldmlab.errors import InputError, shown

_PACKAGED = Path(__file__).parents[1] / "conf"
_CHECKOUT = Path(__file__).parents[3] / "conf"
_OWN: list[str] = []  # a user's search path entries of the running command: file://FOLDER or pkg://PACKAGE
_TYPES: dict[str, Any] = {  # options outside the groups, which no constructor checks
    **dict.fromkeys(("seed", "batch_size"), int),
    **dict.fromkeys(("keep_reference", "wandb", "mirror", "carry_images"), bool),
    **dict.fromkeys(("model", "device", "run.name", "paths.runs"), str),
    **dict.fromkeys(("run.dir", "run.group", "from_run", "init_from", "out"), str | None),
    "plugins": str | list[str],
    "splits": list[str],
    "images": list[tuple[str, str]],
    "weights": Literal["averaged", "raw"],
    "precision": Literal["float32", "bfloat16"],
    "dtype": Literal["float16", "float32"],
    "max_bad": float,
}
_FLAGS_WITH_VALUE = (  # of Hydra
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    "--experimental-rerun",
)
_FLAGS = (
    "--info",
    "-i",
    "--resolve",
    "--run",
    "-r",
    "--multirun",
    "-m",
    "--shell-completion",
    "-sc",
    "--version",
    "--hydra-help",
)


def conf_dir() -> Path:
    """The configuration that belongs to this code: inside an installed package, or at the root of a checkout."""
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def conf_dirs() -> list[Path]:
    """Ours, then the user's own of `--config-dir` and `hydra.searchpath`."""
    return [conf_dir(), *(folder for entry in _OWN if (folder := _folder(entry)) is not None)]


def find_file(path: str) -> Path | None:
    """The first folder's file of this name, without its ending: backbone/unet_small."""
    return next((file for folder in conf_dirs() if (file := folder / f"{path}.yaml").is_file()), None)


def group_choices(group: str) -> list[str]:
    """The names that `group=` accepts, with folders inside the group; `_NAME.yaml` are base files."""
    files = [(p, folder / group) for folder in conf_dirs() for p in (folder / group).rglob("*.yaml")]
    return sorted({str(p.relative_to(folder).with_suffix("")) for p, folder in files if p.name[0] != "_"})


def groups() -> list[str]:
    """The configuration groups, one folder each."""
    folders = [p for conf in conf_dirs() for p in conf.iterdir() if p.is_dir()]
    return sorted({p.name for p in folders if p.name != "hydra" and any(p.rglob("*.yaml"))})


@contextmanager
def searching(words: Sequence[str]) -> Iterator[None]:
    """Inside, `--config-dir DIR` and `hydra.searchpath=[...]` of a command line count too; InputError if one is absent.

    They belong to that command: the next one in this process does not look there.
    """
    entries = [f"file://{Path(folder).absolute()}" for folder in _config_dirs(words)]
    for word in words:
        if word.lstrip("+").startswith("hydra.searchpath="):
            entries += _searchpath(word)
    for entry in entries:
        folder = _folder(entry)
        if folder is None or not folder.is_dir():
            raise InputError(
                f"{entry} holds no configuration; give a folder of groups (backbone/mine.yaml), or pkg:// and "
                "the name of an installed package."
            )
    before = list(_OWN)
    _OWN[:] = dict.fromkeys([*before, *entries])
    try:
        yield
    finally:
        _OWN[:] = before


def _config_dirs(words: Sequence[str]) -> Iterator[str]:
    for index, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            if not value and index + 1 == len(words):
                raise InputError("--config-dir has no value; write --config-dir FOLDER.")
            yield value or words[index + 1]


def _searchpath(word: str) -> list[str]:
    value = _parsed(word).value()
    entries = value if isinstance(value, list) else [value]
    texts = [str(entry) for entry in entries]
    return [text if "://" in text else f"file://{Path(text).absolute()}" for text in texts]


def _folder(entry: str) -> Path | None:
    """Where an entry of the search path lies."""
    kind, _, place = entry.partition("://")
    if kind == "file":
        return Path(place)
    import importlib.util

    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        return None
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def compose(config_name: str, overrides: Sequence[str]) -> Any:
    """The configuration `conf/<config_name>.yaml` with `key=value` overrides, as a DictConfig."""
    from hydra import compose as hydra_compose

    with composing(config_name, overrides) as words:
        return hydra_compose(config_name, words)


@contextmanager
def composing(config_name: str, overrides: Sequence[str]) -> Iterator[list[str]]:
    """Hydra set up over all folders, and the overrides for it; its errors are explained."""
    from hydra import initialize_config_dir

    words = [word for word in overrides if not word.lstrip("+").startswith("hydra.searchpath=")]
    with searching(overrides):
        check_words(overrides)
        if own := [entry for entry in _OWN if _folder(entry) is not None]:
            words.append(f"hydra.searchpath=[{','.join(_quoted(entry) for entry in own)}]")
        try:
            with _aside(), initialize_config_dir(str(conf_dir()), version_base="1.3"):
                yield words
        except Exception as error:
            raise explained(error, config_name, overrides) from error


@contextmanager
def _aside() -> Iterator[None]:
    """Hydra allows one global composition; suspend the running one."""
    from hydra.core.global_hydra import GlobalHydra

    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running


def hydra_main(config_name: str, job: Callable[[Any], None]) -> None:
    """Run `job` under Hydra's own command line: overrides, `--multirun`, `--cfg job --resolve`, `--config-dir`."""
    import hydra

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra shortens tracebacks to its own frames otherwise
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):  # Lightning reads them when it is imported
        if not os.environ.get(name, "0").isdecimal():
            value = os.environ[name]
            raise InputError(f"the environment variable {name}={value} is no number; start with torchrun or srun.")
    overrides = _overrides(sys.argv[1:])
    failed: list[Exception] = []

    def guarded(config: Any) -> None:
        try:
            job(config)
        except Exception as error:  # kept for later: Hydra would print its own message and end the sweep
            failed.append(error)

    with searching(sys.argv[1:]):
        check_words(overrides, several=bool({"-m", "--multirun"} & set(sys.argv[1:])))
        try:
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(guarded)()
        except Exception as error:
            raise explained(error, config_name, overrides) from error
    if failed:
        raise failed[0]


def _overrides(words: Sequence[str]) -> list[str]:
    """The `key=value` words of Hydra's command line; a flag that it does not have is refused."""
    found, skip = [], False
    for word in words:
        flag = word.partition("=")[0]
        if skip or not word.startswith("-"):
            if not skip:
                found.append(word)
            skip = False
        elif flag in _FLAGS_WITH_VALUE:
            skip = "=" not in word
        elif flag not in _FLAGS:
            name = flag.lstrip("-").replace("-", "_")
            raise InputError(f"{word}: there is no such flag; options are written key=value, such as {name}=VALUE.")
    return found


def check_words(overrides: Sequence[str], *, several: bool = False) -> None:
    """Refuse arguments that Hydra would misread: special characters, no value, a number for a file.

    several: the command line may list values of several runs.
    """
    for word in overrides:
        key, equals, value = word.partition("=")
        if equals and not value and not key.startswith("~"):
            raise InputError(f"{key}= has no value; write {key}=VALUE, or {key}=null for none.")
        parsed = _parsed(word)
        if parsed.is_sweep_override() and not several:
            raise InputError(
                f"{word} lists several values, for several runs: start them with --multirun; one value with a comma is "
                f"written {_for_shell(key, value)}."
            )
        group = key.lstrip("+~").partition("@")[0]
        if key.startswith("~") and "." not in key and group not in groups():
            raise InputError(f"{word}: only a group or its entry can be left out (~logger); give {group}=VALUE.")
        if parsed.is_sweep_override() or not equals or group not in groups():
            continue
        choice = parsed.value()
        if isinstance(choice, dict):
            raise InputError(
                f"{key}={shown(choice)}: a group takes the name of a file; write FOLDER/{group}/NAME.yaml and give "
                f"--config-dir FOLDER {group}=NAME."
            )
        for name in choice if isinstance(choice, list) else [choice]:
            if name is not None and not isinstance(name, str) and type(name).__name__ != "QuotedString":
                raise _missing_choice(f"{group}/{shown(name)}")


def _parsed(word: str) -> Any:
    """One override as Hydra understands it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        return OverridesParser.create().parse_overrides([word])[0]
    except OverrideParseException as error:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[+~]*[\w@./:-]+", key):
            raise InputError(f"{shown(word)} is no option; write options as key=value.") from error
        raise InputError(
            f"{key}={shown(value)} cannot be parsed, because of its special characters; write {_for_shell(key, value)}."
        ) from error


def _for_shell(key: str, value: str) -> str:
    return shlex.quote(f"{key}={_quoted(value)}")


def _quoted(value: str) -> str:
    """Text as a quoted value of Hydra's grammar."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f'"{escaped}{chr(92) * trailing}"'


def explained(error: Exception, config_name: str, overrides: Sequence[str]) -> Exception:
    """An InputError for user errors, any other exception unchanged."""
    from hydra.errors import HydraException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    if isinstance(error, InputError):
        return error
    text = str(error)
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return (
            InputError(f"{_at_fault(error, overrides)} cannot be used: {_line(text)}.") if _of_hydra(error) else error
        )
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        return _missing_choice(match[1])
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1], config_name, overrides)
    if match := re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", text):
        return _unknown_key(match[2], config_name, overrides)
    if match := re.search(r"Could not append to config.*? already at '([^']+)'", text, re.DOTALL):
        return InputError(f"+{match[1]}: the option exists already; leave out the + to change it.")
    if isinstance(error, MissingMandatoryValue) and (key := getattr(error, "full_key", None)):
        return _no_value(key)
    what, reason = getattr(error, "full_key", None) or _at_fault(error, overrides), text.split("\n    full_key")[0]
    return InputError(f"{what} cannot be used: {_line(reason)}.")


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def _of_hydra(error: Exception) -> bool:
    """Whether Hydra or its reader of yaml could make no sense of what it was given."""
    frames = list(traceback.walk_tb(error.__traceback__))
    name = str(frames[-1][0].f_globals["__name__"]) if frames else ""
    return name.partition(".")[0] in ("hydra", "omegaconf", "yaml") and not isinstance(error, OSError)


def _at_fault(error: Exception, overrides: Sequence[str]) -> str:
    """The file that Hydra was reading, else the words that were typed."""
    frames = (frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__))
    files = [names["config_path"] for names in frames if names.get("config_path")]
    return f"the configuration file {files[-1]}" if files else f"the command line {' '.join(map(shown, overrides))!r}"


def _no_value(key: str) -> InputError:
    return InputError(f"{key} has no value; give it on the command line as {key}=VALUE.")


def _missing_choice(path: str) -> InputError:
    group, _, name = path.rpartition("/")
    while group and not any((folder / group).is_dir() for folder in conf_dirs()):
        group, _, head = group.rpartition("/")
        name = f"{head}/{name}"
    if not group:
        return InputError(f"{path}: there is no such option or group{_nearest(path, groups())}")
    return InputError(f"{group}={name}: there is no such file in conf/{group}/{_nearest(name, group_choices(group))}")


def _unknown_key(key: str, config_name: str, overrides: Sequence[str]) -> InputError:
    chosen = [word for word in overrides if word.partition("=")[0].partition("@")[0].lstrip("+") in groups()]
    known = groups()
    for words in (chosen, []):
        if len(words) < len(overrides):  # else a file asks for what there is not, whatever is typed
            with suppress(InputError):
                known = _flat_keys(compose(config_name, words)) + groups()
                break
    known = [name for name in known if name != key]
    return InputError(f"{key}: there is no such option{_nearest(key, known)} `--cfg job` prints them all.")


def _flat_keys(node: Any, prefix: str = "") -> list[str]:
    from omegaconf import DictConfig

    keys: list[str] = []
    for name in node:
        keys.append(f"{prefix}{name}")
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_missing() and not child._is_none():
            keys += _flat_keys(child, f"{prefix}{name}.")
    return keys


def _nearest(name: str, choices: list[str]) -> str:
    """The end of a sentence: `; did you mean x?`, or the whole list when nothing is near and it is short."""
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if not near:  # a right last part under a wrong parent
        near = [c for c in choices if c.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(choices)}." if choices and len(choices) <= 30 else "."


def plain(config: Any) -> dict[str, Any]:
    """The whole configuration as dicts, lists and numbers; a value that is still missing is an InputError.

    A person composed it, so what it names is trusted, and the packages of `plugins` are allowed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from ldmlab.argument_types import check_type
    from ldmlab.instantiate import trust_typed
    from ldmlab.plugins import allow

    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise _no_value(missing[0])
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise explained(error, "", []) from error
    assert isinstance(content, dict)
    for key, annotation in _TYPES.items():
        group, _, name = key.rpartition(".")
        node = content.get(group) if group else content
        if isinstance(node, dict) and name in node:
            check_type(node[name], annotation, key)
            if node[name] == "":
                raise InputError(f"{key}='' is empty; give a value, or leave the option out.")
    if content.get("batch_size", 1) < 1:
        raise InputError(f"batch_size={content['batch_size']} must be at least 1.")
    allow(content.get("plugins"))
    trust_typed(content)
    return {str(key): value for key, value in content.items()}
