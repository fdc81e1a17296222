"""The README of an adapter folder: on what, with what and how it was made, how it reads, and how to use it elsewhere.

An adapter is useless without its base, and a base that is a path on one machine or one of many GGUF files of the same
name is no base at all: the card names it, for a GGUF file with the sha256 of its bytes, which ``config.json`` has too.
Whoever publishes the model chooses its licence; the field is left open.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from longfit.config import RunConfig
from longfit.files.checksums import seal_folder
from longfit.files.writing import replace_folder, writing
from longfit.model.gguf import is_gguf
from longfit.model.vocabulary import FIRST_NEW_ROW
from longfit.training.best import best_of
from longfit.training.metrics import read_metrics

REFUSED_BY_SERVERS = (
    "this adapter holds {what} trained whole, which servers of plain LoRA adapters (vLLM, llama.cpp) refuse: merge it"
    " with longfit merge {run} --out DIR"
)


@dataclass(frozen=True)
class GgufBase:
    """A base that is one GGUF file: its name and the sha256 of its bytes, by which anybody knows it again."""

    file: str
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "GgufBase":
        """Read the whole file."""
        with path.open("rb") as file:
            return cls(path.name, hashlib.file_digest(file, "sha256").hexdigest())


def refused_by_servers(config: RunConfig, run_dir: Path) -> str | None:
    """Why a server of plain LoRA adapters will not take the result, and what to do; None if it will."""
    adapter = config.adapter
    parts = {
        "norms": adapter.train_norms,
        "embeddings": adapter.train_embeddings,
        "embeddings of new tokens": adapter.train_new_tokens,
    }
    what = " and ".join(name for name, trained in parts.items() if trained)
    return REFUSED_BY_SERVERS.format(what=what, run=run_dir) if what else None


def write_cards(run_dir: Path, config: RunConfig) -> None:
    """Put a README into ``adapter/`` and ``best/`` of a finished run, and a GGUF base's hash into their config.json."""
    base = GgufBase.of(Path(config.model.name)) if is_gguf(Path(config.model.name)) else None
    for folder in (run_dir / "adapter", run_dir / "best"):
        if not folder.is_dir():
            continue
        card = model_card(run_dir, folder, config, base)
        with writing(folder, then="the run is finished: longfit train --run-dir RUN --resume writes it again"):
            replace_folder(folder, partial(_with_card, folder, card, base))


def _with_card(folder: Path, card: str, base: GgufBase | None, new: Path) -> None:
    """Copy an adapter's folder, and add what is known of its base."""
    shutil.copytree(folder, new, dirs_exist_ok=True)
    if base is not None:
        path = new / "config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["gguf_base"] = {"file": base.file, "sha256": base.sha256}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (new / "README.md").write_text(card, encoding="utf-8")
    seal_folder(new)


def model_card(run_dir: Path, folder: Path, config: RunConfig, base: GgufBase | None) -> str:
    """The text of the card.

    Args:
        run_dir: of the run.
        folder: the adapter that it is about.
        config: of the run, resolved.
        base: of a GGUF base.
    """
    name = config.model.name
    head = {"base_model": base.file if base else name, "library_name": "peft", "tags": ["lora", "longfit"]}
    parts = [
        "---\n" + yaml.safe_dump(head, sort_keys=False) + "license:  # yours to choose\n---",
        f"# {run_dir.resolve().name}",
        f"A LoRA adapter for `{name}`, trained with longfit.",
        *_base_lines(base),
        "## Use it",
        "```python\n" + load_lines(folder.resolve(), name, base, new_rows=_has_new_rows(folder)) + "```",
        *[f"**Note:** {line}." for line in [refused_by_servers(config, run_dir)] if line],
        f"As one model: `longfit merge {run_dir} --out DIR`; for llama.cpp: `longfit export {run_dir} --out DIR`.",
        "## How it went",
        *_curve_lines(run_dir, folder),
        "## Data",
        *_data_lines(run_dir),
        "## Settings",
        "```yaml\n" + config.replace({"output.run_dir": None}).to_yaml() + "```",
    ]
    return "\n\n".join(parts) + "\n"


def load_lines(folder: Path, name: str, base: GgufBase | None, *, new_rows: bool = False) -> str:
    """Python that loads base and adapter with transformers and peft, from anywhere on this machine."""
    where = f'"{name}"' if base is None else f'"{Path(name).parent}", gguf_file="{base.file}"'
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n\n"
        f'adapter = "{folder}"\n'
        "config = AutoConfig.from_pretrained(adapter)  # with the positions that it was trained at\n"
        + ("rows, config.vocab_size = config.vocab_size, config.base_vocab_size\n" if new_rows else "")
        + f"base = AutoModelForCausalLM.from_pretrained({where}, config=config)\n"
        + ("base.resize_token_embeddings(rows)  # for the new tokens; the adapter fills them\n" if new_rows else "")
        + "model = PeftModel.from_pretrained(base, adapter)\n"
        "tokenizer = AutoTokenizer.from_pretrained(adapter)\n"
    )


def _has_new_rows(folder: Path) -> bool:
    return FIRST_NEW_ROW in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _base_lines(base: GgufBase | None) -> list[str]:
    if base is None:
        return []
    return [f"The base is the file `{base.file}`, sha256 `{base.sha256}`; another file of that name is another base."]


def _curve_lines(run_dir: Path, folder: Path) -> list[str]:
    records = read_metrics(run_dir / "metrics.jsonl")
    best = best_of(records)
    lines = [f"- {text}" for text in _losses(records)]
    if best is not None:
        this = "this adapter is that of" if folder.name == "best" else "the best is in `best/`, that of"
        lines.append(f"- lowest validation loss {best.eval_loss:.4f} after step {best.step}; {this} that step")
    return ["\n".join(lines)] if lines else []


def _losses(records: Sequence[dict[str, Any]]) -> list[str]:
    steps = [record for record in records if "loss" in record]
    if not steps:
        return []
    tokens = sum(int(record.get("tokens", 0)) for record in steps)
    return [
        f"{steps[-1]['step']:,} steps, {tokens:,} tokens",
        f"training loss {steps[0]['loss']:.4f} at the first step, {steps[-1]['loss']:.4f} at the last",
    ]


def _data_lines(run_dir: Path) -> list[str]:
    lines = []
    for part, sources in json.loads((run_dir / "data.json").read_text(encoding="utf-8")).items():
        whole = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()
        lines.append(f"- {part}: {len(sources):,} sources, sha256 of their digests `{whole}`")
    ledger = json.loads((run_dir / "ledger.json").read_text(encoding="utf-8"))
    numbers = {key: value for key, value in ledger.items() if isinstance(value, int) and not isinstance(value, bool)}
    lines += [f"- {key.replace('_', ' ')}: {value:,}" for key, value in numbers.items()]
    return ["\n".join(lines)]
