"""The settings of a run: nine sections, each a handful of fields with type, default, allowed values and meaning.

Defaults follow QLoRA (NF4 with double quantisation, adapters on all linear layers, learning rate 2e-4) and LongLoRA
(20 steps of warm-up, groups of a quarter of the context, section 3.2). The text below a field is its documentation;
``longfit train --explain`` shows it.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

COLUMN_NAMES = ("text", "messages", "prompt", "answer", "context", "system", "tools")  # what data.columns may name
LARGEST_AMOUNT = 1 << 60
LARGEST_COUNT = 10**9
"""Of steps, windows, epochs: more is a slip of the finger, and would be counted up to."""
TOKEN_UNITS = {"": 1, "k": 1024, "m": 1024**2}
BYTE_UNITS = {
    **{"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40},
    **{"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
}


def parse_tokens(value: object) -> object:
    """Read a number of tokens; ``k`` is 1,024 tokens and ``m`` 1,048,576, so ``"32k"`` is 32,768."""
    return _parse_amount(value, TOKEN_UNITS, "a number of tokens such as 8192 or 16k (= 16,384)")


def parse_bytes(value: object) -> object:
    """Read a number of bytes, such as ``"24GiB"`` (binary) or ``"24GB"`` (decimal)."""
    return _parse_amount(value, BYTE_UNITS, "a number of bytes such as 24GiB, 512MiB or 24GB")


def _parse_amount(value: object, units: Mapping[str, int], allowed: str) -> object:
    if not isinstance(value, str | bool):
        return value
    match = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([A-Za-z]*)", str(value).strip())
    if match is None or match[2].lower() not in units:
        raise PydanticCustomError("amount", "must be {allowed}", {"allowed": allowed})
    amount = Decimal(re.sub("[_,]", "", match[1])) * units[match[2].lower()]
    if amount > LARGEST_AMOUNT:
        raise PydanticCustomError("amount", "must be {allowed}, and no more than any machine has", {"allowed": allowed})
    if amount != int(amount):
        raise PydanticCustomError("amount", "must be {allowed}, a whole number", {"allowed": allowed})
    return int(amount)


def _even(value: int) -> int:
    if value % 2:
        raise PydanticCustomError("even", "must be an even number of tokens, at least 2", {"fix": value + 1})
    return value


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise PydanticCustomError("power", "must be a power of two", {"fix": 1 << (value.bit_length() - 1)})
    return value


Tokens = Annotated[int, BeforeValidator(parse_tokens), Field(ge=1, le=1 << 40)]
EvenTokens = Annotated[int, BeforeValidator(parse_tokens), Field(ge=1, le=1 << 40), AfterValidator(_even)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1, le=LARGEST_AMOUNT)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _contradiction(text: str, **values: object) -> PydanticCustomError:
    """Return the error of two settings of one section that do not go together."""
    return PydanticCustomError("together", text, values)


class Section(BaseModel):
    """What all sections share: unknown keys are refused, values are fixed once made and finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSection(Section):
    name: str = Field(min_length=1)
    """Base model: a folder, a Hugging Face hub id, or a .gguf file."""
    quant: Literal["nf4", "fp4", "int4", "int8", "none"] = "nf4"
    """How the frozen linear layers are stored; int8 has one constant a row, none keeps them in dtype."""
    double_quant: bool = True
    """Quantise the block constants again (QLoRA, section 3): 4.127 instead of 4.5 bits a parameter."""
    block_size: Annotated[int, Field(ge=16, le=4096), AfterValidator(_power_of_two)] = 64
    """Weights that share one absmax (not int8)."""
    int8_threshold: float | None = Field(default=None, ge=0)
    """int8 only: multiply in integers, activations of this magnitude and above in 16 bits (LLM.int8(): 6; 0: none);
    unset: weights are de-quantised, activations stay as they are."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype, and storage dtype of what is not quantised; auto: what the device multiplies fast: bfloat16, or
    float32 on processors without bf16 instructions, or float16 on cards without bfloat16."""
    device: str = "auto"
    """Where the model runs: auto (cuda if there is one, else cpu), cpu, cuda, cuda:1."""

    int8_modules: Annotated[list[str], Field(min_length=1)] | None = None
    """Full names of layers to store in 8 bits in a base of 4 bits; `longfit eval quant --budget` finds them."""

    @model_validator(mode="after")
    def _threshold_needs_int8(self) -> "ModelSection":
        if self.int8_modules is not None and self.quant in ("int8", "none"):
            raise _contradiction("int8_modules only acts in a base of 4 bits; drop it, or choose quant nf4")
        if self.int8_threshold is not None and self.quant != "int8":
            raise _contradiction("int8_threshold only acts with quant int8; add model.quant=int8 or drop it")
        return self


class ContextSection(Section):
    context: Tokens | None = None
    """Tokens in a training window; unset: the native context of the base model."""
    rope: Literal["yarn", "linear", "ntk", "theta", "none"] = "yarn"
    """How rotary positions are scaled when context exceeds the native context."""
    attention: Literal["exact", "shifted"] = "exact"
    """Attention while training; shifted is LongLoRA's S2-Attn. Evaluation is always exact."""
    group_size: EvenTokens | None = None
    """Tokens in a shifted-attention group; unset: a quarter of the context."""

    @model_validator(mode="after")
    def _group_size_fits(self) -> "ContextSection":
        if self.group_size is not None and self.attention == "exact":
            raise _contradiction(
                "group_size only acts with shifted attention; add context.attention=shifted or drop group_size"
            )
        if self.group_size is not None and self.context is not None and self.group_size > self.context:
            text = "group_size {group_size} is longer than the context {context}; drop it for a quarter of the context"
            raise _contradiction(text, group_size=self.group_size, context=self.context)
        return self


class AdapterSection(Section):
    rank: int = Field(default=16, ge=1, le=65_536)
    """Rank of the low-rank update; alpha / rank scales it."""
    alpha: float = Field(default=32.0, gt=0)
    """Numerator of the scaling alpha / rank."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA): large ranks learn as fast as small ones; lower alpha with it."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the adapters, while training."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Layers that get an adapter: all-linear (QLoRA) or a list of names such as [q_proj, v_proj]."""
    experts: bool = False
    """Also an adapter on every weight of every expert of a mixture of experts; needs dropout 0."""
    train_embeddings: bool = False
    """Also train the input embeddings (LongLoRA, section 3.3)."""
    train_norms: bool = False
    """Also train the normalisation layers (LongLoRA, section 3.3)."""
    train_new_tokens: bool = False
    """Give tokens that the tokenizer has and the embedding lacks a row each, and train those rows alone."""
    init: str | None = None
    """Start from the adapter of this run, or of this folder, with new data and a new schedule; unset: anew."""
    start: Literal["standard", "loftq"] = "standard"
    """Where adapters of a quantised base begin: at nothing, or at the low-rank part of what rounding lost (LoftQ)."""

    @model_validator(mode="after")
    def _one_beginning(self) -> "AdapterSection":
        if self.start != "standard" and self.init is not None:
            raise _contradiction("start and init exclude each other: the older adapter is the start; drop one")
        if self.start != "standard" and self.experts:
            raise _contradiction("start loftq repairs linear layers, not experts; drop experts or start")
        return self

    @model_validator(mode="after")
    def _rows_train_once(self) -> "AdapterSection":
        if self.train_embeddings and self.train_new_tokens:
            raise _contradiction("train_embeddings and train_new_tokens exclude each other; drop one")
        return self


class DataSection(Section):
    path: str = Field(min_length=1)
    """Text or chats to train on: a file, a table (.jsonl .json .csv .parquet), a .zip, or a folder of them."""
    text_column: str | None = None
    """Column of tables that holds plain text; unset: recognised by its name."""
    columns: dict[str, str] = {}
    """Which columns hold what, such as {prompt: ask, answer: say}; names: text, messages, prompt, answer, context,
    system, tools."""
    encoding: str | None = None
    """Encoding of text files; unset: UTF-8, or what a byte order mark says."""
    normalise: Literal["none", "nfc"] = "none"
    """nfc composes decomposed Unicode (NFD), which costs more tokens; none leaves the text as it is."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """Rows and files that cannot be used stop the run, or are skipped and listed in the ledger."""
    exclude: list[str] = []
    """File name patterns to leave out, such as ["*.log"]."""
    chat_template: str | None = None
    """Template for chats: chatml, a file, or Jinja text; unset: the tokenizer's own. Saved with the adapter."""
    template_drops: Literal["error", "allow"] = "error"
    """What becomes of chats of which the template drops something: an error, or trained without it, and counted."""
    control_tokens: Literal["text", "control"] = "text"
    """What control tokens are that plain text spells out: text, or the model's own, as in sets rendered already."""
    train_on: Literal["all", "last", "marked"] = "all"
    """Answers of a chat that are trained on: all but those their row says no to, the last, or those it says yes to."""
    date: str | None = None
    """Day that a template prints, as 2026-01-31; unset: the day the run begins."""
    long_chat: Literal["error", "split", "truncate_left", "truncate_right", "drop"] = "error"
    """What becomes of chats longer than the context; long texts are always split, and nothing of them is lost."""
    cache: Literal["auto", "on", "off"] = "auto"
    """Keep tokens in the user's cache folder ($LONGFIT_CACHE) for the next run; auto: those of 8 MB of files and more;
    off holds them in memory, 4 bytes a token of text, 5 of chats."""
    cache_limit: Bytes = 32 << 30
    """Bytes of cached tokens of all sets, such as 8GiB (unset: 32GiB); beyond it those used longest ago are removed."""
    validation: str | None = None
    """Held-out text, read like path; unset: none, unless validation_fraction is given."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the documents held out for validation, chosen by train.seed."""
    validation_windows: int = Field(default=16, ge=1, le=LARGEST_COUNT)
    """At most this many windows are evaluated each time."""

    @model_validator(mode="after")
    def _columns_are_known(self) -> "DataSection":
        if unknown := [name for name in self.columns if name not in COLUMN_NAMES]:
            text = "columns: unknown name {name}; allowed are {allowed}"
            raise _contradiction(text, name=unknown[0], allowed=", ".join(COLUMN_NAMES))
        if self.columns and self.text_column is not None:
            raise _contradiction("columns and text_column exclude each other; drop one")
        return self

    @field_validator("date")
    @classmethod
    def _date_is_a_day(cls, value: str | None) -> str | None:
        try:
            return value if value is None else datetime.strptime(value, "%Y-%m-%d").strftime("%Y-%m-%d")
        except ValueError:
            raise PydanticCustomError("date", "must be a day such as 2026-01-31") from None

    @model_validator(mode="after")
    def _one_kind_of_validation(self) -> "DataSection":
        if self.validation is not None and self.validation_fraction:
            raise _contradiction("validation and validation_fraction exclude each other; drop one")
        return self


class TrainSection(Section):
    steps: int | None = Field(default=None, ge=1, le=LARGEST_COUNT)
    """Optimiser steps; unset: as many as epochs needs."""
    epochs: float | None = Field(default=None, gt=0, le=LARGEST_COUNT)
    """Passes over the data; unset: 1, unless steps is given."""
    batch_size: int = Field(default=1, ge=1, le=LARGEST_COUNT)
    """Windows in one forward pass, for each of the windows trained at once (parallel.data)."""
    gradient_accumulation: int = Field(default=1, ge=1, le=LARGEST_COUNT)
    """Forward passes per optimiser step; every trained token weighs the same."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate."""
    warmup_steps: int | None = Field(default=None, ge=0, le=LARGEST_COUNT)
    """Steps of linear warm-up; unset: 20 (LongLoRA), or a tenth of a shorter run."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up; cosine falls to zero at the end of the run."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; never on norms and biases."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients with a larger global norm are scaled down to it."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Decides adapter initialisation, held-out documents, order of windows and dropout."""
    save_every: int = Field(default=50, ge=1, le=LARGEST_COUNT)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(default=2, ge=1, le=LARGEST_COUNT)
    """Newest checkpoints kept."""
    eval_every: int = Field(default=50, ge=1, le=LARGEST_COUNT)
    """Steps between validation losses, if there is validation text."""
    keep_best: bool = True
    """Keep the adapter with the lowest validation loss in best/, for eval, chat, merge and export to use."""
    patience: int | None = Field(default=None, ge=1)
    """End the run when the validation loss has not fallen so many times in a row; unset: never."""
    samples: list[str] = []
    """Prompts that the model answers while it trains, into samples.jsonl."""
    samples_document: str | None = None
    """Text file that all those prompts are about."""
    samples_every: int = Field(default=50, ge=1)
    """Steps between those answers; the last step always gives some."""
    samples_tokens: int = Field(default=64, ge=1)
    """Longest of those answers."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        if self.steps is not None and self.epochs is not None:
            raise _contradiction("steps and epochs exclude each other; drop one")
        if self.steps is not None and self.warmup_steps is not None and self.warmup_steps >= self.steps:
            text = "warmup_steps {warmup} must be smaller than steps {steps}, or the run ends before its warm-up"
            raise _contradiction(text, warmup=self.warmup_steps, steps=self.steps)
        if self.samples_document is not None and not self.samples:
            raise _contradiction('samples_document only acts with samples; add train.samples=["What is it about?"]')
        return self


class OptimSection(Section):
    optim: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW with 32-bit or 8-bit state."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    budget: Bytes | None = None
    """Bytes of optimiser state kept resident, the rest is paged out; unset: all of it."""
    file: str | None = None
    """File that holds the optimiser state beyond the budget."""

    @model_validator(mode="after")
    def _file_needs_budget(self) -> "OptimSection":
        if self.file is not None and self.budget is None:
            raise _contradiction("file only acts with a budget; add optim.budget=2GiB or drop file")
        return self


class EngineSection(Section):
    engine: Literal["sweep", "plain"] = "sweep"
    """How layers are differentiated: swept tile by tile, or plain gradient checkpointing."""
    fused: Literal["auto", "none", "liger"] = "auto"
    """Norms, rotary embedding and SwiGLU on a card: liger-kernel where it can (auto), insisted on, or torch (none)."""
    tile: Tokens | None = None
    """Tokens the sweep handles at once; unset: chosen by the engine."""
    saved_attention: Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)] | None = None
    """Bytes of attention outputs saved for backward instead of computed again; unset: 512MiB on a CPU, else none."""
    saved_products: Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)] = 0
    """Bytes of results of linear layers saved in the same way: up to a fifth less time for memory to spare."""
    offload: Literal["device", "ram", "pinned", "file"] = "device"
    """Where layer inputs wait for backward: on the device, in host memory (ram; pinned: CUDA only), or in a file."""
    offload_folder: str | None = None
    """Folder of that file, on a real disk; unset: the system's folder for temporary files."""
    stream: Literal["none", "ram", "file"] = "none"
    """Where frozen weights wait, to be brought in a layer ahead: nowhere, in host memory (CUDA), or in a file."""
    stream_folder: str | None = None
    """Folder of that file, on a real disk; unset: the system's folder for temporary files."""

    @model_validator(mode="after")
    def _settings_need_what_they_act_on(self) -> "EngineSection":
        if self.engine == "plain" and (
            self.tile is not None or self.offload != "device" or self.saved_attention is not None or self.saved_products
        ):
            raise _contradiction("tile, offload and saved_* only act with engine sweep; drop them")
        if self.engine == "plain" and self.stream != "none":
            raise _contradiction("stream only acts with engine sweep; drop it")
        for name in ("offload", "stream"):
            if getattr(self, f"{name}_folder") is not None and getattr(self, name) != "file":
                text = "{name}_folder only acts with {name} file; add engine.{name}=file or drop it"
                raise _contradiction(text, name=name)
        return self


class ParallelSection(Section):
    devices: int | None = Field(default=None, ge=1)
    """Processes to start on this machine, one a device; unset: this process, or those that torchrun has started."""
    data: int | None = Field(default=None, ge=1)
    """Windows trained at once; unset: devices / sequence."""
    sequence: int = Field(default=1, ge=1)
    """Devices that share one window, each with a stretch of its tokens."""
    shard: int = Field(default=1, ge=1)
    """Devices that share one copy of the weights (FSDP2); 1: each has a whole copy."""
    timeout: float = Field(default=60.0, ge=1)
    """Seconds without a sign of life or work after which a process is given up, and with it the run."""


class OutputSection(Section):
    run_dir: str | None = None
    """Directory of the run; unset: the first free one below runs/."""
    track: list[Literal["tensorboard", "trackio", "wandb"]] = []
    """Trackers that read the run's metrics, each in a process of its own that cannot stop or slow the run."""


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection,
    "context": ContextSection,
    "adapter": AdapterSection,
    "data": DataSection,
    "train": TrainSection,
    "optim": OptimSection,
    "engine": EngineSection,
    "parallel": ParallelSection,
    "output": OutputSection,
}


def known_keys() -> list[str]:
    """Return every dotted key, in order."""
    return [f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields]


def meaning(key: str) -> str:
    """Return the documentation of a dotted key."""
    section, _, name = key.partition(".")
    field: Any = SECTIONS[section].model_fields[name]
    return field.description or ""
