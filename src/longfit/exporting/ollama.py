"""A Modelfile for Ollama: the model, its chat template in Ollama's own language, where to stop, the context."""

from __future__ import annotations

from typing import Any

from longfit.exporting.chat_format import ChatFormat, chat_format


def modelfile(gguf_name: str, tokenizer: Any, *, context: int) -> tuple[str, list[str]]:
    """The text of a Modelfile.

    Args:
        gguf_name: of the file beside it.
        tokenizer: of the run.
        context: tokens.
    Returns: the text, and what the user should know.
    """
    found = chat_format(tokenizer)
    lines, warnings = [f"FROM ./{gguf_name}"], []
    if found is not None:
        lines.append(f'TEMPLATE """{go_template(found)}"""')
    elif tokenizer.chat_template:
        warnings.append(
            "the chat template does more than put text around messages; the Modelfile has none, and Ollama will look "
            "for one that it knows in the file"
        )
    else:
        warnings.append("the tokenizer has no chat template: Ollama will give the model plain text")
    lines += [f'PARAMETER stop "{_quoted(stop)}"' for stop in stops(found, tokenizer)]
    lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n", warnings


def go_template(found: ChatFormat) -> str:
    """A chat format as a Go template over Ollama's ``.Messages``; the begin token is Ollama's own affair."""
    system = _role("system", found.system) if found.system is not None else ""
    roles = system + _role("user", found.user) + _role("assistant", found.assistant)
    begin = (
        f'{{{{- if ne (index .Messages 0).Role "system" }}}}{_escaped(found.begin)}{{{{- end }}}}'
        if found.begin
        else ""
    )
    return f"{begin}{{{{- range .Messages }}}}{roles}{{{{- end }}}}{_escaped(found.assistant[0])}"


def _role(role: str, around: tuple[str, str]) -> str:
    before, after = (_escaped(part) for part in around)
    return f'{{{{- if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{- end }}}}'


def _escaped(text: str) -> str:
    """Text as a Go string in an action, so that no trimming marker beside it eats its line breaks."""
    if not text:
        return ""
    return "{{ " + _go_string(text) + " }}"


def _go_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def stops(found: ChatFormat | None, tokenizer: Any) -> list[str]:
    """Texts that end an answer: what the template puts behind it, and the end token."""
    ends = [found.assistant[1].strip() if found is not None else "", tokenizer.eos_token or ""]
    return list(dict.fromkeys(end for end in ends if end))


def _quoted(text: str) -> str:
    return text.replace('"', '\\"')
