"""Answers of the model while it trains, in ``samples.jsonl``: a loss that falls says nothing of how a model talks.

Greedy, with exact attention (shifted attention acts only in train mode), from the model as it is. A prompt is rendered
with the chat template where there is one. A document that all prompts are about is read once a sample.
"""

import json
from pathlib import Path
from typing import Any

import torch

from longfit.data.template import choose_template
from longfit.engine.model_state import preserve_modes
from longfit.errors import RunError
from longfit.files.reading import reading
from longfit.files.writing import append_lines, write_text, writing

READ_TOKENS = 2048  # of a document at a time


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, *, document: str | None = None, max_new_tokens: int = 64) -> str:
    """What the model says to a prompt, the likeliest token each time."""
    from transformers import DynamicCache

    ids = torch.tensor([_prompt_ids(tokenizer, prompt, document)], device=model.device)
    ends = _end_tokens(model, tokenizer)
    made: list[int] = []
    with preserve_modes(model.modules()):
        model.eval()
        cache = DynamicCache()
        for start in range(0, ids.shape[1], READ_TOKENS):
            part = ids[:, start : start + READ_TOKENS]
            logits = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        while len(made) < max_new_tokens:
            token = int(logits[0, -1].argmax())
            if token in ends:
                break
            made.append(token)
            step = torch.tensor([[token]], device=ids.device)
            logits = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return str(tokenizer.decode(made, skip_special_tokens=True))


def write_samples(path: Path, step: int, answers: dict[str, str]) -> None:
    """Append the answers of a step."""
    lines = [{"step": step, "prompt": prompt, "answer": text} for prompt, text in answers.items()]
    append_lines(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def keep_samples_until(path: Path, step: int) -> None:
    """Drop what a resumed run will write again, and a torn last line."""
    if not path.is_file():
        return
    with reading(path, "the run's samples", RunError, do="delete it: the run does not need it"):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        kept = [line for line in lines if line and json.loads(line)["step"] <= step]
    with writing(path):
        write_text(path, "".join(line + "\n" for line in kept))


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The answers of a run, in order."""
    if not path.is_file():
        return []
    with reading(path, "the run's samples", RunError, do="delete it: the run does not need it"):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]


def _prompt_ids(tokenizer: Any, prompt: str, document: str | None) -> list[int]:
    text = prompt if document is None else f"{document}\n\n{prompt}"
    if tokenizer.chat_template:
        said = choose_template(tokenizer).render([{"role": "user", "content": text}], add_generation_prompt=True)
        return list(tokenizer(said, add_special_tokens=False).input_ids)
    ids = list(tokenizer(text).input_ids)
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    found = getattr(model.generation_config, "eos_token_id", None)
    ends = set(found if isinstance(found, list) else [found])
    return {int(end) for end in ends | {tokenizer.eos_token_id} if end is not None}
