"""docs/troubleshooting.md quotes messages that the code prints."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)


def template(node: ast.AST) -> str:
    """The text of an f-string or a sum of strings, `...` in place of values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "..."


@pytest.fixture(scope="module")
def messages() -> str:
    trees = (ast.parse(file.read_text()) for file in (ROOT / "src").rglob("*.py"))
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    return "\n".join(template(node) for tree in trees for node in ast.walk(tree) if isinstance(node, kinds))


def test_messages_are_quoted() -> None:
    assert len(QUOTED) > 40
    assert len(QUOTED) == len(set(QUOTED))


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_is_one_of_the_code(quoted: str, messages: str) -> None:
    assert quoted in messages
