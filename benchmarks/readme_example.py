"""The library example of README.md, as it is printed there; only what it works on is put in its place."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def readme_example(
    *, model: Path, text: Path, adapter: Path, context: int | None = None, group_size: int | None = None
) -> str:
    """Return the code of the example.

    Args:
        model: stands for the path of the model.
        text: a file of text, stands for the book.
        adapter: the folder to save into.
        context, group_size: tokens; None leaves the printed numbers.
    Raises: ValueError: README.md has no such example, or not all of these in it.
    """
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    code = next((block for block in blocks if "longfit.load(" in block), None)
    if code is None:
        raise ValueError(f"{README}: no ```python block with longfit.load(")
    places = {
        '"path/or/hub-id/or/file.gguf"': repr(str(model)),
        '"book.txt"': repr(str(text)),
        '"adapter"': repr(str(adapter)),
        **({} if context is None else {"32_768": str(context)}),
        **({} if group_size is None else {"group_size=8192": f"group_size={group_size}"}),
    }
    for printed, put in places.items():
        if printed not in code:
            raise ValueError(f"{README}: the example does not say {printed} any more")
        code = code.replace(printed, put)
    return code
