"""What a chat template puts around messages, read off its own renderings.

A template is a program, but most do the same for every message: a role's beginning, the content, a role's end. Rendered
with marked contents these parts show, and a rendering put together from them must equal the template's own for a longer
conversation; a template that does more (rewrites history, adds a date) has no such format, which is an answer too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from longfit.data.template import choose_template

SYSTEM, USER, ANSWER = "\x02system\x02", "\x02user\x02", "\x02answer\x02"


@dataclass(frozen=True)
class ChatFormat:
    """What stands before and behind a message of each role.

    Attributes:
        begin: before a conversation without a system message: a begin token, a system message of the template's own.
        system: with all that stands before it; None if the template takes no system message.
    """

    begin: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]

    def render(self, messages: list[dict[str, str]]) -> str:
        """A conversation, up to where the next answer begins."""
        parts = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        text = "".join(parts[m["role"]][0] + m["content"] + parts[m["role"]][1] for m in messages)
        begin = "" if messages[0]["role"] == "system" else self.begin
        return begin + text + self.assistant[0]


def chat_format(tokenizer: Any) -> ChatFormat | None:
    """The format of a tokenizer's chat template; None if there is no template, or none that parts explain."""

    if not isinstance(tokenizer.chat_template, str):
        return None
    template = choose_template(tokenizer)

    def render(*contents: str, prompt: bool = False) -> str:
        roles = {SYSTEM: "system", USER: "user", ANSWER: "assistant"}
        messages = [{"role": roles[content], "content": content} for content in contents]
        return template.render(messages, add_generation_prompt=prompt)

    try:
        before, asked, answered, asked_again = _cut(render(USER, ANSWER, USER, prompt=True))
        user_end = _begun(asked, render(USER).split(USER)[1], tokenizer.eos_token)
        answer_end = _begun(answered, render(USER, ANSWER).split(ANSWER)[1], tokenizer.eos_token)
    except Exception:  # a template may raise anything; then it has no format
        return None
    user, assistant = (answered[len(answer_end) :], user_end), (asked[len(user_end) :], answer_end)
    if asked != asked_again or not before.endswith(user[0]):
        return None
    found = ChatFormat(before[: len(before) - len(user[0])], None, user, assistant)
    found = replace(found, system=_system(found, render))
    return found if _explains(found, render) else None


def _cut(talk: str) -> tuple[str, str, str, str]:
    """What stands around two users' messages and the answer between them."""
    first, rest = talk.split(ANSWER)
    before, asked = first.split(USER)
    answered, asked_again = rest.split(USER)
    return before, asked, answered, asked_again


def _system(found: ChatFormat, render: Any) -> tuple[str, str] | None:
    try:
        head, tail = render(SYSTEM, USER, prompt=True).split(SYSTEM)
    except Exception:  # as above: Gemma's template takes none
        return None
    expected = found.user[0] + USER + found.user[1] + found.assistant[0]
    return (head, tail[: len(tail) - len(expected)]) if tail.endswith(expected) else None


def _explains(found: ChatFormat, render: Any) -> bool:
    """Whether the parts, put together, give what the template gives."""
    plain = (USER, ANSWER, USER, ANSWER, USER)
    talks: list[tuple[str, ...]] = [plain] if found.system is None else [plain, (SYSTEM, *plain)]
    roles = {SYSTEM: "system", USER: "user", ANSWER: "assistant"}
    return all(
        found.render([{"role": roles[content], "content": content} for content in talk]) == render(*talk, prompt=True)
        for talk in talks
    )


def _begun(text: str, end: str, eos_token: str | None) -> str:
    """How a text begins with the end of a message; some templates put the end of all texts behind the last one."""
    if not text.startswith(end) and eos_token:
        end = end.removesuffix(eos_token)
    same = [ours == theirs for ours, theirs in zip(text, end, strict=False)]
    return text[: same.index(False) if False in same else len(same)]
