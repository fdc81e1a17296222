"""A tiny base model of single characters in a folder, texts to train it on, and the losses of a run."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from tests.model_folders import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longfit.training.metrics import Event

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,\n"


def save_tiny_model(folder: Path) -> Path:
    """Write a random two-layer Llama, three query heads a key head, and a tokenizer of single characters."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {
        character: 3 + index for index, character in enumerate(CHARACTERS)
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    shape = {"vocab_size": len(vocabulary), "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6}
    llama(dtype=torch.float32, bos_token_id=0, eos_token_id=1, **shape).save_pretrained(folder)
    return folder


def write_texts(folder: Path, *, num_files: int = 6) -> Path:
    """Write text files of different lengths, the longest beyond 128 tokens."""
    folder.mkdir()
    words = "the long road went on and on, past hills and rivers.\n"
    for index in range(num_files):
        (folder / f"text{index}.txt").write_text(
            words[index:] * (index % 3 + 1) + "abcdef"[index % 6] * index, encoding="utf-8"
        )
    return folder


def read_losses(run_dir: Path) -> list[float]:
    """Return the training losses of a run, exactly as written."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for line in lines if "loss" in (record := json.loads(line))]


def interrupt_at(step: int) -> Callable[[Event], None]:
    """Return a watcher of a run that interrupts it behind a step, as Ctrl-C does."""

    def on_event(event: Event) -> None:
        if event.kind == "step" and event.values["step"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_event
