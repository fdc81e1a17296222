"""How far each way out of a run drifts from the trained model: merged both ways, GGUF in three types, a GGUF adapter.

    python benchmarks/export_drift.py                    trains SmolLM2-135M for a few steps, and hands that run on
    python benchmarks/export_drift.py RUN --tokens 512   hands another run on, and prints its table only

Every model is measured as it lies on the disk, in float32, on held-out text of the run (evaluation/drift.py); every
tensor of a GGUF file has been compared with the merged one before. Where llama.cpp is installed (``make llama-cpp``),
it reads the GGUF files too, with the precision that it has by itself; the adapter is put on the run's own GGUF base.

Results: benchmarks/results/export_drift.json, .md, and the table of docs/measurements.md.
"""

import argparse
import json
import pydoc_data.topics
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from engine_cpu import ROOT, gguf_file
from longfit.config import RunConfig
from longfit.evaluation.drift import Drift, Reference, logits
from longfit.exporting.export import GgufExport, export
from longfit.exporting.measuring import DriftTable
from longfit.exporting.merge_plan import MergePlan
from longfit.exporting.trained import Trained, open_trained
from longfit.training.loop import train
from longfit.training.metrics import ignore
from machine import commit, machine

sys.path.append(str(ROOT))
from tests.exporting.llama_cpp import LlamaCpp

RESULTS = Path(__file__).resolve().parent / "results"
PAGES = (RESULTS / "export_drift.md", ROOT / "docs" / "measurements.md")
BEGIN, END = "<!-- the drift table begins -->", "<!-- the drift table ends -->"
CPU = torch.device("cpu")
FILE_TYPES = ("F16", "Q8_0", "Q4_0")
STEPS, CONTEXT = 6, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trained = open_trained(options.run or short_run(Path(folder)))
        rows = []
        for row in measure(trained, options.tokens, Path(folder)):
            print(f"{row.name:<60} KL {row.kl:.2e}  perplexity {row.perplexity:.4f}  {row.same_greedy:.2%}", flush=True)
            rows.append(row)
            if options.run is None:
                write(rows, trained, time.perf_counter() - began)


def short_run(folder: Path) -> Path:
    """SmolLM2 in NF4, trained for some steps on Python's own reference; its last topics are held out."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    (folder / "topics.txt").write_text("\n\n".join(topics[:-10]), encoding="utf-8")
    (folder / "held-out-topics.txt").write_text("\n\n".join(topics[-10:])[:2500], encoding="utf-8")
    config = RunConfig.of(
        {
            "model.name": str(gguf_file()),
            "data.path": str(folder / "topics.txt"),
            "data.validation": str(folder / "held-out-topics.txt"),
            "context.context": CONTEXT,
            "train.steps": STEPS,
            "train.warmup_steps": 0,
            "train.learning_rate": 1e-3,
            "output.run_dir": str(folder / "run"),
        }
    )
    return train(config).run_dir


def measure(trained: Trained, tokens: int, folder: Path) -> Iterator[Drift]:
    """All rows, the trained model first; nothing of a model stays on the disk once it has been measured."""
    plan = MergePlan.of(trained, dtype=torch.bfloat16)
    table = DriftTable.begin(trained, None, tokens, CPU, ignore)
    yield from table.rows
    for kind in ("16bit", "4bit"):
        (folder / kind).mkdir()
        plan.write(folder / kind, kind)
        table.add(f"merged onto {kind}, bfloat16", folder / kind)
        yield table.rows[-1]
        shutil.rmtree(folder / kind)
    plan = replace(plan, dtype=torch.float32)
    for file_type in FILE_TYPES:
        kind = "4bit"
        made = GgufExport(plan, kind, folder, file_type, ollama=False)
        path = made.write(folder, ignore)
        name = f"GGUF {file_type}, merged onto {kind}"
        table.add(f"{name}, read by longfit", path)
        yield table.rows[-1]
        yield from in_llama_cpp(f"{name}, in llama.cpp", table.trained, path)
        path.unlink()
    if trained.base.endswith(".gguf"):
        lora = folder / "lora" / export(trained.path, folder / "lora", format="gguf-lora", measure=False).files[0]
        name = "GGUF adapter on the base's own file, in llama.cpp"
        yield from in_llama_cpp(name, table.trained, Path(trained.base), lora)


def in_llama_cpp(name: str, reference: Reference, path: Path, lora: Path | None = None) -> Iterator[Drift]:
    """The same comparison with the logits of llama.cpp; nothing where it is not installed."""
    kl = nll = same = count = 0.0
    for window, hidden in zip(reference.windows, reference.hidden, strict=True):
        try:
            theirs = LlamaCpp(path, lora=lora, context=len(window))  # reads one text
        except pytest.skip.Exception:
            return
        p = logits(hidden[:-1], reference.head).log_softmax(-1)
        q = theirs.logits(window.tolist())[:-1].log_softmax(-1)
        theirs.close()
        kl += float((p.exp() * (p - q)).sum(-1).double().sum())
        nll -= float(q.gather(1, window[1:, None]).double().sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(q)
    yield Drift(name, kl / count, float(torch.tensor(nll / count).exp()), same / count, int(count))


def write(rows: list[Drift], trained: Trained, seconds: float) -> None:
    """The numbers, and the pages' tables anew; what else stands on the pages stays."""
    about = {"machine": machine(), "commit": commit(), "base": Path(trained.base).name, "seconds": round(seconds)}
    numbers = json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    (RESULTS / "export_drift.json").write_text(numbers, encoding="utf-8")
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8"), rows), encoding="utf-8")


def table(rows: list[Drift]) -> str:
    """All rows as Markdown."""
    lines = ["| model | tokens | KL | perplexity | same greedy token |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = f"{row.num_tokens:,} | {row.kl:.2e} | {row.perplexity:.3f} | {row.same_greedy:.2%}"
        lines.append(f"| {row.name} | {numbers} |")
    return "\n".join(lines)


def filled(page: str, rows: list[Drift]) -> str:
    """A page with the table in its place."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.partition(END)[2]}"


def read_rows() -> list[Drift]:
    """The rows that were measured last."""
    return [Drift(**row) for row in json.loads((RESULTS / "export_drift.json").read_text())["rows"]]


if __name__ == "__main__":
    main()
