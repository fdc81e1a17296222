"""How far each way out of a run drifts from the trained model: merged both ways, GGUF in three types, a GGUF adapter.

    python -m benchmarks.export_drift RUN --tokens 512

Every model is measured as it lies on the disk, in float32, on held-out text of the run (evaluation/drift.py). Where
llama.cpp is installed (tests/exporting/llama_cpp.py says how), it reads the GGUF files too, with the threads and the
precision that it has by itself; the adapter is put on the run's own GGUF base. Results go to
``benchmarks/results/export_drift.md``.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.exporting.llama_cpp import LlamaCpp

from longfit.evaluation.drift import Drift, Reference, logits, measure_drift, read_reference
from longfit.exporting.export import export
from longfit.exporting.held_out import held_out_windows
from longfit.exporting.merge import MergePlan, measure_folder
from longfit.exporting.trained import Trained, open_trained
from longfit.model.context import adopt_positions
from longfit.model.load import load

RESULTS = Path(__file__).parent / "results" / "export_drift.md"
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    began = time.perf_counter()
    trained = open_trained(options.run)
    text = held_out_windows(trained, None, options.tokens)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.run) as folder:
        for row in measure(trained, text.windows, Path(folder)):
            print(f"{row.name:<50} KL {row.kl:.2e}  perplexity {row.perplexity:.4f}  {row.same_greedy:.2%}", flush=True)
            rows.append(row)
    write(rows, options.run, options.tokens, time.perf_counter() - began)


def measure(trained: Trained, windows: tuple[torch.Tensor, ...], folder: Path) -> Iterator[Drift]:
    """All rows, the trained model first; nothing of a model stays on the disk once it has been measured."""
    model, _ = trained.load(CPU, dtype=torch.float32)
    reference = read_reference(model, windows)
    yield measure_drift("as trained: adapter on NF4", model, reference)
    with model.disable_adapter():
        yield measure_drift("NF4 base without the adapter", model, reference)
    del model
    plan = MergePlan.of(trained, dtype=torch.bfloat16)
    for kind in ("16bit", "4bit"):
        (folder / kind).mkdir()
        plan.write(folder / kind, kind)
        yield measure_folder(f"merged onto {kind}, bfloat16", folder / kind, reference, CPU, torch.float32)
        shutil.rmtree(folder / kind)
    for file_type, kind in (("F16", "4bit"), ("Q8_0", "4bit"), ("Q4_0", "4bit"), ("Q4_0", "16bit")):
        made = export(trained.path, folder / "gguf", type=file_type, onto=kind, measure=False)
        path = folder / "gguf" / made.files[0]
        name = f"GGUF {file_type}, merged onto {kind}"
        model, _ = load(path, quant="none", dtype=torch.float32, device=CPU)
        adopt_positions(model, trained.adapter)
        yield measure_drift(f"{name}, read by longfit", model, reference)
        del model
        yield from in_llama_cpp(f"{name}, in llama.cpp", reference, path)
        shutil.rmtree(folder / "gguf")
    if trained.base.endswith(".gguf"):
        made = export(trained.path, folder / "lora", format="gguf-lora")
        lora = folder / "lora" / made.files[0]
        yield from in_llama_cpp(
            "GGUF adapter on the base's own file, in llama.cpp", reference, Path(trained.base), lora
        )


def in_llama_cpp(name: str, reference: Reference, path: Path, lora: Path | None = None) -> Iterator[Drift]:
    """The same comparison with the logits of llama.cpp; nothing where it is not installed."""
    try:
        theirs = LlamaCpp(path, lora=lora, context=max(len(window) for window in reference.windows))
    except pytest.skip.Exception:
        return
    kl = nll = same = count = 0.0
    for window, hidden in zip(reference.windows[:1], reference.hidden[:1], strict=True):  # a context reads one text
        p = logits(hidden[:-1], reference.head).log_softmax(-1)
        q = theirs.logits(window.tolist())[:-1].log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum(-1).double().sum())
        nll -= float(q.gather(1, window[1:, None]).double().sum())
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(q)
    theirs.close()
    yield Drift(name, kl / count, float(torch.tensor(nll / count).exp()), same / count, int(count))


def write(rows: list[Drift], run: Path, tokens: int, seconds: float) -> None:
    """The table as a page."""
    lines = [
        "# Drift of each way out of a run",
        "",
        f"`python -m benchmarks.export_drift RUN --tokens {tokens}`, {seconds:,.0f} s on a busy machine of two cores; "
        f"base `{open_trained(run).base.rsplit('/', 1)[-1]}`. KL in nats a token to the model as it was trained.",
        "",
        "| model | tokens | KL | perplexity | same greedy token |",
        "|---|---|---|---|---|",
        *(
            f"| {row.name} | {row.num_tokens:,} | {row.kl:.2e} | {row.perplexity:.3f} | {row.same_greedy:.2%} |"
            for row in rows
        ),
    ]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
