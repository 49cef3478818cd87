"""Hydra's composition over our files and a user's own, with errors as one sentence that names the nearest choice."""

import os
import re
import shlex
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from ldmlab.app.conf_files import OWN, conf_dir, conf_dirs, folder_of, group_choices, groups, leaves
from ldmlab.errors import InputError, check_fraction, did_you_mean, shown

_SEARCHPATH = "hydra.searchpath"
_NO_VALUE = "{0} has no value; give it on the command line as {0}=VALUE."
_TYPES: dict[str, Any] = {  # options outside the groups, which no constructor checks
    **dict.fromkeys(("seed", "batch_size"), int),
    **dict.fromkeys(("keep_reference", "wandb", "mirror", "carry_images"), bool),
    **dict.fromkeys(("model", "device", "run.name", "paths.runs"), str),
    **dict.fromkeys(("run.dir", "run.group", "from_run", "init_from", "teacher", "out", "features.run"), str | None),
    "plugins": str | list[str],
    "splits": list[str],
    "images": list[tuple[str, str]],
    "weights": Literal["averaged", "raw"] | float | list[float],
    "precision": Literal["float32", "bfloat16"],
    "compile": bool | Literal["auto"],
    "dtype": Literal["float16", "float32"],
    "max_bad": float,
}
_INSIDE = ("", "stage.encode.", "stage.evaluation.")  # where these options stand


@contextmanager
def searching(words: Sequence[str]) -> Iterator[None]:
    """Inside, and only there, `--config-dir DIR` and `hydra.searchpath=[...]` of a command line are searched too."""
    texts: list[str] = []
    for index, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            if not value and index + 1 == len(words):
                raise InputError("--config-dir has no value; write --config-dir FOLDER.")
            texts.append(value or words[index + 1])
        elif name.lstrip("+") == _SEARCHPATH:
            found = parse_override(word).value()
            texts += map(str, found if isinstance(found, list) else [found])
    entries = [text if "://" in text else f"file://{Path(text).absolute()}" for text in texts]
    for entry in entries:
        folder = folder_of(entry)
        if folder is None or not folder.is_dir():
            raise InputError(
                f"{entry} holds no configuration; give a folder of groups (backbone/mine.yaml), or pkg:// and "
                "the name of an installed package."
            )
    before = list(OWN)
    OWN[:] = dict.fromkeys([*before, *entries])
    try:
        yield
    finally:
        OWN[:] = before


def compose(config_name: str, overrides: Sequence[str]) -> Any:
    """The configuration `conf/<config_name>.yaml` with `key=value` overrides, as a DictConfig."""
    from hydra import compose as hydra_compose

    with composing(config_name, overrides) as words:
        config = hydra_compose(config_name, words)
    own = (conf_dir() / f"{config_name}.yaml").read_text()
    for name in re.findall(r"^(\w+): \?\?\?", own, re.MULTILINE):  # null is a value for Hydra
        if config.get(name, "") is None:
            raise InputError(_NO_VALUE.format(name))
    return config


@contextmanager
def composing(config_name: str, overrides: Sequence[str]) -> Iterator[list[str]]:
    """Hydra set up over all folders, and the overrides for it; its errors are explained."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    words = [word for word in overrides if word.partition("=")[0].lstrip("+") != _SEARCHPATH]
    with searching(overrides):
        check_words(overrides)
        if own := [quoted(entry) for entry in OWN if folder_of(entry) is not None]:
            words.append(f"{_SEARCHPATH}=[{','.join(own)}]")
        running = GlobalHydra.instance().hydra  # it allows one global composition, so that one waits
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                yield words
        except Exception as error:
            raise explained(error, config_name, overrides) from error
        finally:
            GlobalHydra.instance().hydra = running


def check_words(overrides: Sequence[str], *, several: bool = False) -> None:
    """Refuse what Hydra would misread: special characters, no value, a number for a file; values of `several` runs."""
    sweeps = several and any(parse_override(word).is_sweep_override() for word in overrides)
    for word in overrides:
        key, equals, value = word.partition("=")
        if sweeps and key == "run.dir" and value != "null" and "," not in value and "${" not in value:
            raise InputError(f"{word} is one folder for several runs; give run.name=NAME, and paths.runs=FOLDER.")
        if equals and not value and not key.startswith("~"):
            raise InputError(f"{key}= has no value; write {key}=VALUE, or {key}=null for none.")
        parsed = parse_override(word)
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


def parse_override(word: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        parsed = OverridesParser.create().parse_overrides([word])[0]
        if parsed.is_range_sweep() and next(parsed.sweep_iterator(), None) is None:
            raise InputError(f"{word} lists no value; give at least one.")
        return parsed
    except OverrideParseException as error:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[+~]*[\w@./:-]+", key):
            raise InputError(f"{shown(word)} is no option; write options as key=value.") from error
        raise InputError(
            f"{key}={shown(value)} cannot be parsed, because of its special characters; write {_for_shell(key, value)}."
        ) from error


def _for_shell(key: str, value: str) -> str:
    return shlex.quote(f"{key}={quoted(value)}")


def typed(key: str, value: object) -> str:
    """`key=value` to be typed in a shell, quoted where the shell or Hydra would read it in another way."""
    plain = re.fullmatch(r"[\w.@:-]*/[\w./@:-]+", str(value))  # a word alone may be a number, null or true
    return f"{key}={value}" if plain else _for_shell(key, str(value))


def quoted(value: str) -> str:
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
    if type(error).__module__.startswith("submitit."):
        line = " ".join(str(error).split())[-500:].rstrip(".")
        return InputError(f"launcher=slurm: {line}; logs are in the folder .submitit of paths.runs.")
    text = "it nests too deeply, or is among its own defaults" if isinstance(error, RecursionError) else str(error)
    if "override must be a string or a list. Got NoneType" in text:
        empty = next((key for key in (word.partition("=null")[0] for word in overrides) if key in groups()), "a group")
        return InputError(f"{empty}=null: a group takes the name of a file; leave it out for the default.")
    if not isinstance(error, HydraException | OmegaConfBaseException):
        unusable = InputError(f"{_at_fault(error, overrides)} cannot be used: {_line(text)}.")
        return unusable if _of_hydra(error) else error
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        return _missing_choice(match[1])
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1], config_name, overrides)
    if match := re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", text):
        return _unknown_key(match[2], config_name, overrides)
    if match := re.search(r"Could not append to config.*? already at '([^']+)'", text, re.DOTALL):
        return InputError(f"+{match[1]}: the option exists already; leave out the + to change it.")
    if isinstance(error, MissingMandatoryValue) and (key := getattr(error, "full_key", None)):
        return InputError(_NO_VALUE.format(key))
    what, reason = getattr(error, "full_key", None) or _at_fault(error, overrides), text.split("\n    full_key")[0]
    return InputError(f"{what} cannot be used: {_line(reason)}.")


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def _of_hydra(error: Exception) -> bool:
    """Whether Hydra or its reader of yaml could make no sense of what it was given."""
    names = [frame.f_globals["__name__"].partition(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)]
    below = names[::-1][: names[::-1].index("ldmlab")] if "ldmlab" in names else names  # what ours called last
    return bool({"hydra", "omegaconf", "yaml"}.intersection(below)) and not isinstance(error, OSError)


def _at_fault(error: Exception, overrides: Sequence[str]) -> str:
    """The file that Hydra was reading, else the words that were typed."""
    frames = (frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__))
    files = [path for names in frames if (path := names.get("config_path")) and not os.path.isdir(path)]
    return f"the configuration file {files[-1]}" if files else f"the command line {' '.join(map(shown, overrides))!r}"


def _missing_choice(path: str) -> InputError:
    if path.startswith("hydra/launcher/submitit"):
        return InputError("launcher=slurm needs hydra-submitit-launcher; install it: pip install 'ldmlab[cluster]'.")
    group, _, name = path.rpartition("/")
    while group and not any((folder / group).is_dir() for folder in conf_dirs()):
        group, _, head = group.rpartition("/")
        name = f"{head}/{name}"
    if not group:
        return InputError(f"{path}: there is no such option or group{_nearest(path, groups())}")
    return InputError(f"{group}={name}: there is no such file in conf/{group}/{_nearest(name, group_choices(group))}")


def _unknown_key(key: str, config_name: str, overrides: Sequence[str]) -> InputError:
    from omegaconf import OmegaConf

    chosen = [word for word in overrides if word.partition("=")[0].partition("@")[0].lstrip("+") in groups()]
    known = groups()
    for words in (chosen, []):
        if len(words) < len(overrides):  # else a file asks for what there is not, whatever is typed
            with suppress(InputError):
                content = OmegaConf.to_container(compose(config_name, words), resolve=False)
                if _taken(key, content):
                    return InputError(f"{key}: no file has this option, but its part takes it; write +{key}=VALUE.")
                known = [name for name, _ in leaves(content)] + known
                break
    known = [name for name in known if name != key]
    return InputError(f"{key}: there is no such option{_nearest(key, known)} `--cfg job` prints them all.")


def _taken(key: str, content: Any) -> bool:
    """Whether the class above an option has an argument of that name, which no file states."""
    from ldmlab.instantiate import accepts

    *above, name = key.split(".")
    for part in above:
        content = content.get(part) if isinstance(content, dict) else None
    return isinstance(content, dict) and "_target_" in content and accepts(content, name, where=".".join(above))


def _nearest(name: str, choices: list[str]) -> str:
    """The end of a sentence: `; did you mean x?`, or the whole list when nothing is near and it is short."""
    same_end = [c for c in choices if c.rpartition(".")[2] == name.rpartition(".")[2]]  # under a wrong parent
    if hint := did_you_mean(name, choices, cutoff=0.5) or did_you_mean(name, same_end, cutoff=0):
        return f"; {hint}"
    return f"; there are {', '.join(choices)}." if choices and len(choices) <= 30 else "."


def plain(config: Any) -> dict[str, Any]:
    """The whole configuration as dicts, lists and numbers; what it names is trusted, for a person composed it."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from ldmlab.instantiate import trust_typed
    from ldmlab.plugins import allow

    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise InputError(_NO_VALUE.format(missing[0]))
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise explained(error, "", []) from error
    assert isinstance(content, dict)
    for key, annotation in _TYPES.items():
        for inside in _INSIDE:
            _check_option(content, f"{inside}{key}", annotation)
    allow(content.get("plugins"))
    trust_typed(content)
    return {str(key): value for key, value in content.items()}


def _check_option(content: dict[Any, Any], key: str, annotation: Any) -> None:
    """InputError where the option `key` of the configuration has another type, is empty or out of range."""
    from ldmlab.argument_types import check_type

    *groups, name = key.split(".")
    node: Any = content
    for group in groups:
        node = node.get(group) if isinstance(node, dict) else None
    if not isinstance(node, dict) or name not in node:
        return
    value = node[name]
    check_type(value, annotation, key)
    if value == "" or (name == "splits" and not value):
        raise InputError(f"{key}={value!r} is empty; give a value, or leave the option out.")
    if name == "batch_size" and value < 1:
        raise InputError(f"{key}={value} must be at least 1.")
    if name == "max_bad":
        check_fraction(key, value)
