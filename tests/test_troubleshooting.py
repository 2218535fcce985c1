"""docs/troubleshooting.md quotes the code: each sentence of its tables is one that the code says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("core", "trt_plugins", "export", "calibrate", "triton_repo", "client")
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
FIELD = "\0"


def texts_of(source: str) -> list[str]:
    """Every text that a file can say, fields of f-strings as one mark; a docstring is said to nobody."""
    said = []
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else FIELD for part in node.values)
            said.append("".join(str(part) for part in parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            said.append(node.value)
    return said


def quoted() -> list[str]:
    first_cells = re.findall(r"^\| (`.*?) \|", PAGE, re.MULTILINE)
    return [text for cell in first_cells for text in re.findall(r"`([^`]+)`", cell)]


@pytest.fixture(scope="module")
def said() -> list[str]:
    files = (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))
    return [text for path in files for text in texts_of(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("sentence", quoted())
def test_a_quoted_sentence_is_one_the_code_says(sentence: str, said: list[str]) -> None:
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in sentence.split("…")), re.DOTALL)
    assert any(pattern.search(text) for text in said)


def test_a_sentence_that_nobody_says_is_noticed(said: list[str]) -> None:
    assert not any("the part must fill less of the frame" in text for text in said)


def test_texts_are_those_of_messages_with_their_fields_marked() -> None:
    source = 'def f():\n    """Says nothing."""\n    raise E(f"port {port} on {host} cannot be taken")'
    assert texts_of(source)[0] == "port \0 on \0 cannot be taken"
    assert "Says nothing." not in texts_of(source)
