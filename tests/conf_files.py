"""Files of conf/GROUP with what they inherit."""

from typing import Any

from ldmlab.app.compose import compose, group_choices, plain


def conf_names(group: str, *without: str) -> list[str]:
    """The choices of a group, found by its folder."""
    return [name for name in group_choices(group) if name not in without]


def conf_node(group: str, name: str) -> dict[str, Any]:
    """The composed node of one choice."""
    node = plain(compose(f"{group}/{name}", []))[group]
    return next(iter(node.values())) if group == "conditioner" else node
