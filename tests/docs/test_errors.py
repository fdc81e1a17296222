"""The page of errors names every kind, and quotes what the code says."""

import ast
import inspect
import re
from pathlib import Path

from longfit import errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")


def texts() -> str:
    """Every string of the sources, as it reads: implicit concatenation joined, what is filled in left out."""
    found = []
    for path in sorted((ROOT / "src" / "longfit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_kind_of_error_is_on_the_page() -> None:
    kinds = [name for name, kind in vars(errors).items() if inspect.isclass(kind)]
    assert [name for name in kinds if f"`{name}`" not in PAGE] == []


def test_every_message_that_is_quoted_exists() -> None:
    quoted = [text for row in re.findall(r'^\| (".*?) \|', PAGE, flags=re.M) for text in re.findall(r'"([^"]+)"', row)]
    said = texts()
    assert len(quoted) > 10
    assert [text for text in quoted if text not in said] == []
