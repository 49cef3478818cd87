"""The help of train.py and evaluate.py, read from conf/ without importing Hydra."""

import re
import sys

from ldmlab.app.compose import conf_dir, group_choices, searching

_USES_SHOWN = 12  # names of one group listed before "... and N more"


def hydra_help(config_name: str, opening: str, examples: str) -> str:
    """Usage, the groups with their choices and the options with their comments."""
    text = (conf_dir() / f"{config_name}.yaml").read_text()
    with searching(sys.argv[1:]):
        return "\n".join([opening, "", *_groups(text), "", *_options(text), "", *_always(config_name), "", examples])


def _groups(text: str) -> list[str]:
    lines = ["choose a file of each group (group=name, several as group=[a,b]); the first shown is the default:"]
    for group, default, comment in re.findall(r"^  - (\w+): (\S+)(?:[ \t]+# (.*))?$", text, re.MULTILINE):
        names = group_choices(group)
        first = [] if default in ("null", "???") else [default]
        names = first + [name for name in names if name not in first]
        more = f" ... and {len(names) - _USES_SHOWN} more" if len(names) > _USES_SHOWN else ""
        lines.append(f"  {group:<13} {' '.join(names[:_USES_SHOWN])}{more}")
        if comment:
            lines.append(f"  {'':<13} {comment}")
    return lines


def _options(text: str) -> list[str]:
    lines = ["set an option (key=value):"]
    section = ""
    for raw in text.split("_self_")[-1].split("\nhydra:")[0].splitlines():
        match = re.match(r"^( *)(\w+):[ \t]*([^#\n]*?)[ \t]*(?:# (.*))?$", raw)
        if not match:
            continue
        indent, key, value, comment = match.groups()
        section = section if indent else ("" if value else f"{key}.")
        if value or indent:
            lines.append(f"  {(section if indent else '') + key + '=' + value:<28} {comment or ''}".rstrip())
    return lines


def _always(config_name: str) -> list[str]:
    return [
        "and always:",
        "  --cfg job --resolve          print the whole configuration",
        "  -m, --multirun a=1,2 b=x,y   run every combination",
        "  --config-dir FOLDER          groups of your own: FOLDER/backbone/mine.yaml, then backbone=mine",
        f"  conf/{config_name}.yaml and the files of the groups explain each option next to its value.",
    ]
