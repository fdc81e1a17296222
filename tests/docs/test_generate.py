"""The reference pages are those that the code writes now."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "generate.py"
spec = importlib.util.spec_from_file_location("generate", SCRIPT)
assert spec is not None
assert spec.loader is not None
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


@pytest.mark.parametrize("name", generate.PAGES)
def test_the_page_is_up_to_date(name: str) -> None:
    written = (generate.FOLDER / name).read_text(encoding="utf-8")
    assert written == generate.PAGES[name](), f"run: python docs/generate.py, and commit docs/reference/{name}"


def test_every_setting_and_public_name_says_what_it_means() -> None:
    import longfit

    rows = [line for line in generate.settings_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert all(row.split("|")[-2].strip() for row in rows), [row for row in rows if not row.split("|")[-2].strip()]
    for name in longfit.__all__:
        assert name == "__version__" or (getattr(longfit, name).__doc__ or "").strip(), name
