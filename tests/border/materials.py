"""Sound inputs of each kind that longfit reads, tiny, and the command that reads each."""

import bz2
import gzip
import hashlib
import json
import lzma
import shutil
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import torch
from tests.border.mutations import Mutation
from tests.border.server import Reply, Server
from tests.model_folders import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEXT = "the long road went on and on, past hills and rivers.\n"
TEMPLATE = """{%- for message in messages %}
{{- '<s>' + message.role + ': ' }}
{%- generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- endfor %}
"""
CHAT = [{"role": "user", "content": "where does it go"}, {"role": "assistant", "content": "past hills"}]
PAGE = "<html><body><h1>Road</h1><p>the long road</p><ul><li>hills</li></ul></body></html>\n"
FLAGS = ("--context", "64", "model.dtype=float32")
PLAIN = ("train", "model", "text.txt", "--rank", "4", *FLAGS)
SAVED = ("--run-dir", "run", "--steps", "3", "train.save_every=1", "train.keep_checkpoints=3")


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        folder: below the materials; a mutant is a copy of it in which one of ``files`` is damaged.
        words: the command that reads it, in the folder that holds the copy.
        result: what must be equal to the sound input's result.
        may_differ: whether a damaged file that is accepted says something else of the same form, as a text does from
            which a word is missing; the arguments are the mutation, the damaged file and the sound one.
        named: what a message may name in the place of the file.
        cache: the folder, beside what is damaged, that the command has as its cache.
        tells: its result says of each thing whether it is damaged.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    words: tuple[str, ...]
    result: Callable[[Reply, Path], object]
    may_differ: Callable[[Mutation, Path, Path], bool]
    structured: bool = False
    snippets: bool = False
    named: tuple[str, ...] = ()
    cache: str | None = None
    tells: bool = False


def never(mutation: Mutation, damaged: Path, sound: Path) -> bool:
    """For files that a run has sealed: what is read is what was written."""
    return False


def always(mutation: Mutation, damaged: Path, sound: Path) -> bool:
    """For texts, which nobody but their author can tell to be damaged."""
    return True


def if_whole(mutation: Mutation, damaged: Path, sound: Path) -> bool:
    """For archives and tables: never by losing their end."""
    return not mutation.is_cut


def if_json(mutation: Mutation, damaged: Path, sound: Path) -> bool:
    """For JSON: if it is an object."""
    try:
        return isinstance(json.loads(damaged.read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return not damaged.exists()  # most of a tokenizer's files are optional


def if_same_tensors(mutation: Mutation, damaged: Path, sound: Path) -> bool:
    """For safetensors: if the tensors have the same names, types and shapes; their values nobody can check."""
    try:
        return _tensors(damaged) == _tensors(sound)
    except (OSError, ValueError, struct.error, AttributeError):
        return False


def if_same_gguf_tensors(mutation: Mutation, damaged: Path, sound: Path) -> bool:
    """As `if_same_tensors`; the values of keys nobody can check either."""
    from longfit.files.gguf_header import read_header

    return read_header(damaged).tensors == read_header(sound).tensors


def _tensors(path: Path) -> object:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}


def printed(reply: Reply, folder: Path) -> object:
    """The JSON that a command printed."""
    return json.loads(reply.out)


def resumed(reply: Reply, folder: Path) -> object:
    """What a run has become, whatever is in its way."""
    weights = (folder / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [(record["step"], record.get("loss"), record.get("eval_loss")) for record in records]
    return hashlib.sha256(weights).hexdigest(), losses


PERPLEXITY = ("ppl", "--data", "text.txt", "--json", "--max-tokens", "48", "model.dtype=float32")
LEDGER = ("--model", "model", "--context", "64", "--json")


def kinds() -> tuple[Kind, ...]:
    """Every kind of input."""
    data = ("data", *LEDGER)
    resume = ("train", "--run-dir", "run", "--resume", "--json")
    tables = ("t.jsonl", "t.json", "t.csv", "c.jsonl", "t.parquet", "t.arrow")
    archives = ("a.zip", "a.tar", "a.tar.gz", "a.txt.gz", "a.txt.bz2", "a.txt.xz", "a.txt.zst", "a.tar.zst")
    papers = ("p.html", "p.ipynb", "p.epub", "p.docx", "p.pptx", "p.pdf")
    checkpoint = "run/checkpoints/step-000002"
    return (
        Kind("config", "base", ("model/config.json",), ("eval", "model", *PERPLEXITY), printed, if_json, True),
        Kind(
            "weights", "base", ("model/model.safetensors",), ("eval", "model", *PERPLEXITY), printed, if_same_tensors,
            True,
        ),
        Kind(
            "shards", "shards", ("model/model.safetensors.index.json", "model/model-00001-of-00003.safetensors"),
            ("eval", "model", *PERPLEXITY), printed, if_same_tensors, True,
        ),
        Kind(
            "tokenizer", "base",
            ("model/tokenizer.json", "model/tokenizer.json", "model/tokenizer_config.json",
             "model/generation_config.json"),
            ("eval", "model", *PERPLEXITY), printed, if_json, True,
        ),
        Kind("gguf", "gguf", ("m.gguf",), ("eval", "m.gguf", *PERPLEXITY), printed, if_same_gguf_tensors),
        Kind(
            "adapter", "ended", tuple(f"run/adapter/{name}" for name in ADAPTER_FILES), ("eval", "run", *PERPLEXITY),
            printed, never, True,
        ),
        Kind(
            "peft", "peft", ("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
            ("train", "model", "text.txt", "--run-dir", "out", "--steps", "1", "adapter.init=adapter", "--json",
             "--rank", "4", *FLAGS),
            lambda reply, folder: json.loads(reply.out)["loss"],
            lambda mutation, damaged, sound: (
                if_same_tensors(mutation, damaged, sound) if damaged.suffix == ".safetensors"
                else if_json(mutation, damaged, sound)
            ),
            True,
        ),
        Kind(
            "run", "run",
            tuple(f"run/{name}" for name in FILES_OF_RUN),
            resume, resumed, never, True, True,
        ),
        Kind(
            "result", "ended",
            tuple(f"run/{name}" for name in (*FILES_OF_RUN, *(f"adapter/{name}" for name in ADAPTER_FILES))),
            ("merge", "run", "--out", "merged", "--no-measure", "--onto", "16bit", "--json"),
            lambda reply, folder: hashlib.sha256((folder / "merged" / "model.safetensors").read_bytes()).hexdigest(),
            never, True, True,
        ),
        Kind(
            "export", "ended",
            ("model/model.safetensors", "model/config.json", "model/tokenizer.json",
             "run/adapter/adapter_model.safetensors", "run/adapter/tokenizer.json", "run/adapter/adapter_config.json"),
            ("export", "run", "--out", "gguf", "--base", "model", "--no-measure", "--json"),
            lambda reply, folder: hashlib.sha256(next((folder / "gguf").glob("*.gguf")).read_bytes()).hexdigest(),
            lambda mutation, damaged, sound: (
                damaged.parent.name == "model"
                and (if_same_tensors if damaged.suffix == ".safetensors" else if_json)(mutation, damaged, sound)
            ),
            True,
        ),
        Kind(
            "runs", "ended", tuple(f"run/{name}" for name in FILES_OF_RUN), ("runs", "."),
            lambda reply, folder: reply.out, always, True, True, tells=True,
        ),
        Kind(
            "pages", "paged", ("state.pages", "state.pages", "state.pages.commit"), (*resume, "optim.file=state.pages"),
            resumed, never, True,
        ),
        Kind(
            "cache", "cache", tuple(f"cache/tokens/*/{name}" for name in
                                    ("ids.i32", "trained.u8", "documents.npz", "notes.json", "checksums.json")),
            (*PLAIN, "--run-dir", "run", "--steps", "1", "data.cache=on", "--json"), resumed, never, True,
            cache="cache",
        ),
        Kind(
            "rates", "cache", ("cache/rates.json",), ("plan", "model", "--context", "64", "--cpu", "--json"), printed,
            always, True, True, cache="cache", tells=True,
        ),
        Kind(
            "checkpoint", "run",
            tuple(f"{checkpoint}/{name}" for name in
                  ("state.json", "trainable.safetensors", "optimizer.pt", "metrics.jsonl", "checksums.json",
                   "adapter/adapter_model.safetensors", "adapter/config.json")),
            resume, resumed, never, True,
        ),
        Kind(
            "yaml", "yaml", ("run.yaml",), ("train", "model", "text.txt", "run.yaml", "--explain", "--json"), printed,
            always, False, True,
        ),
        Kind("table", "data", tables, data, printed, if_whole_table, True, True),
        Kind("text", "data", ("x.txt", "x.md"), data, printed, always, False, True),
        Kind("paper", "data", papers, data, printed, always, False, True),
        Kind("archive", "data", archives, data, printed, if_whole),
        Kind(
            "template", "data", ("chat.jinja",), ("data", "c.jsonl", "--chat-template", "chat.jinja", *LEDGER), printed,
            always, False, True, ("c.jsonl",),  # a template that has become another one may fit the rows no more
        ),
    )  # fmt: skip


FILES_OF_RUN = (
    "config.yaml", "run.json", "data.json", "ledger.json", "metrics.jsonl", "documents.digests", "plan.json",
    "family.json",
)  # fmt: skip
ADAPTER_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json", "checksums.json",
    "tokenizer_config.json", "generation_config.json",
)  # fmt: skip


def if_whole_table(mutation: Mutation, damaged: Path, sound: Path) -> bool:
    """A table of lines may lose some; a binary one never its end."""
    return damaged.suffix not in (".parquet", ".arrow") or not mutation.is_cut


def words_for(kind: Kind, file: str) -> tuple[str, ...]:
    """The command of a kind for one of its files."""
    return ("data", file, *LEDGER) if kind.words[0] == "data" and file != "chat.jinja" else kind.words


def make(server: Server, folder: Path) -> None:
    """Warm a server, and write all materials into a folder unless they are there; takes some seconds."""
    base, made = folder / "base", folder / "made"
    if not made.exists():
        make_base(base)
        for name in ("yaml", "data", "cache"):
            shutil.copytree(base, folder / name)
        (folder / "yaml" / "run.yaml").write_text(YAML)
        _data(folder / "data")
    with tempfile.TemporaryDirectory(prefix="longfit-fuzz-warm-") as warm:
        server.warm(
            (*PLAIN, "--steps", "1", "--run-dir", f"{warm}/run"), ("data", "c.jsonl", *LEDGER), cwd=folder / "data"
        )
    if not made.exists():
        _trained(server, folder, base)
        _cached(server, folder / "cache")
        made.touch()


YAML = """# a run
context:
  context: 64
  attention: exact
adapter:
  targets: [q_proj, v_proj]
  rank: 4
train:
  learning_rate: 2e-4
  steps: 10
data:
  columns: {prompt: q, answer: a}
"""


def make_base(folder: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = llama(dtype=torch.float32, num_hidden_layers=1, vocab_size=260, **shape)
    model.save_pretrained(folder / "model")
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(characters)}
    vocabulary |= {"th": 256, "on": 257, "<s>": 258, "</s>": 259}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("o", "n")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT * 6)


def _trained(server: Server, folder: Path, base: Path) -> None:
    """A run that was killed after two of its three steps, one whose optimiser state is paged, one that has ended; a
    GGUF file, shards, and an adapter as PEFT writes it."""
    for name, more in (("run", ()), ("paged", ("--rank", "64", "optim.budget=128KiB", "optim.file=state.pages"))):
        shutil.copytree(base, folder / name)
        _must(server, folder / name, *PLAIN, *SAVED, *more, end_at=2)
    ended = folder / "ended"
    shutil.copytree(folder / "run", ended)
    _must(server, ended, "train", "--run-dir", "run", "--resume")
    shutil.rmtree(ended / "run" / "checkpoints")
    _must(server, ended, "export", "run", "--out", "gguf", "--no-measure")
    (folder / "gguf").mkdir()
    next((ended / "gguf").glob("*.gguf")).rename(folder / "gguf" / "m.gguf")
    shutil.copy(base / "text.txt", folder / "gguf")
    shutil.rmtree(ended / "gguf")
    shutil.copytree(base, folder / "peft")
    shutil.copytree(ended / "run" / "adapter", folder / "peft" / "adapter")
    (folder / "peft" / "adapter" / "checksums.json").unlink()
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, folder / "shards")
    (folder / "shards" / "model" / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float32)
    model.save_pretrained(folder / "shards" / "model", max_shard_size="40KB")


def _cached(server: Server, folder: Path) -> None:
    """A cache as it is left by a run, with the rates that ``longfit doctor --measure`` finds."""
    _must(server, folder, *PLAIN, "--run-dir", "warm", "data.cache=on", cache=folder / "cache", end_at=2)
    shutil.rmtree(folder / "warm")
    rates = dict.fromkeys(("matmul_flops", "attention_flops", "copy_bytes", "disk_bytes"), 1e10)
    measured = {"cpu": {"device": "cpu", "name": "a processor", "dtype": "float32", **rates}}
    (folder / "cache" / "rates.json").write_text(json.dumps(measured))


def _must(server: Server, folder: Path, *words: str, end_at: int | None = None, cache: Path | None = None) -> None:
    reply = server.run(*words, cwd=folder, limits=False, end_at=end_at, cache=cache)
    assert reply.code == 0, f"{words}: {reply.err}"


def _data(folder: Path) -> None:
    rows = [{"text": TEXT * 2}, {"text": "hills and rivers"}, {"text": "and on", "note": None}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "t.jsonl").write_text(lines)
    (folder / "t.json").write_text(json.dumps(rows))
    (folder / "t.csv").write_text('text,note\n"the long, ""road""",1\nhills,2\n')
    (folder / "c.jsonl").write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(3)))
    (folder / "chat.jinja").write_text(TEMPLATE)
    model = folder / "model" / "tokenizer_config.json"
    model.write_text(json.dumps(json.loads(model.read_text()) | {"chat_template": TEMPLATE}))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "t.parquet", write_page_checksum=True)
    with pyarrow.ipc.new_stream(folder / "t.arrow", table.schema) as writer:
        writer.write_table(table)
    (folder / "x.txt").write_text(TEXT * 3)
    (folder / "x.md").write_text("# Road\n\n" + TEXT)
    _papers(folder)
    _archives(folder, [("a.txt", TEXT), ("b/b.jsonl", lines), ("c.html", PAGE)])


def _papers(folder: Path) -> None:
    import docx
    import pptx
    from matplotlib.figure import Figure

    (folder / "p.html").write_text(PAGE)
    cell = {"cell_type": "code", "source": ["print(1)\n"], "metadata": {}, "outputs": []}
    (folder / "p.ipynb").write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4}))
    document = docx.Document()
    document.add_paragraph(TEXT)
    document.save(str(folder / "p.docx"))
    slides = pptx.Presentation()
    slides.slides.add_slide(slides.slide_layouts[5]).shapes.title.text = TEXT
    slides.save(str(folder / "p.pptx"))
    page = Figure(figsize=(4, 4))
    page.text(0.1, 0.5, TEXT.strip())
    page.savefig(folder / "p.pdf")
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="c.opf"/></rootfiles></container>'
    )
    book = (
        '<package xmlns="http://www.idpf.org/2007/opf"><manifest><item id="a" href="a.xhtml" '
        'media-type="application/xhtml+xml"/></manifest><spine><itemref idref="a"/></spine></package>'
    )
    with zipfile.ZipFile(folder / "p.epub", "w") as archive:
        archive.writestr("META-INF/container.xml", container)
        archive.writestr("c.opf", book)
        archive.writestr("a.xhtml", PAGE)


def _archives(folder: Path, members: Sequence[tuple[str, str]]) -> None:
    source = folder.parent / "members"
    for name, text in members:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members:
            archive.writestr(name, text)
    for name, mode in (("a.tar", "w"), ("a.tar.gz", "w:gz")):
        with tarfile.open(folder / name, mode) as tar:
            for member, _ in members:
                tar.add(source / member, member)
    text = TEXT.encode() * 3
    (folder / "a.txt.gz").write_bytes(gzip.compress(text))
    (folder / "a.txt.bz2").write_bytes(bz2.compress(text))
    (folder / "a.txt.xz").write_bytes(lzma.compress(text))
    for name, content in (("a.txt.zst", text), ("a.tar.zst", (folder / "a.tar").read_bytes())):
        with pyarrow.CompressedOutputStream(str(folder / name), "zstd") as stream:
            stream.write(content)
