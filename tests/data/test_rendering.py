"""A template that loops, multiplies or recurses is ended, named, and the next chat is rendered all the same."""

import os

import pytest

from longfit.data import template_process
from longfit.data.template import CHATML, ChatTemplate
from longfit.data.template_process import TemplateProcess
from longfit.errors import ConfigError, DataError

CHAT = [{"role": "user", "content": "hello"}]
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def render(source: str) -> str:
    return ChatTemplate(source, {"eos_token": "</s>"}).render(CHAT)


@pytest.mark.parametrize(
    ("source", "kind", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", ConfigError, "characters"),
        ("{{ 'x' * 99999999999 }}", ConfigError, "memory"),
        ("{% set x = '%9999999999d' | format(1) %}", ConfigError, "memory"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", DataError, "calls itself"),
        ("{{ messages.__class__.__mro__ }}", DataError, "unsafe"),
        ("{{ 1 / 0 }}", DataError, r"line 1\): division by zero"),
        ("{% if", ConfigError, "not a Jinja template"),
    ],
)
def test_what_a_template_may_not_do_is_named(source: str, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        render(source)
    assert render(CHATML).startswith("<|im_start|>user")


def test_a_template_that_loops_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    process = TemplateProcess(limit_s=1)
    assert process.render(LOOPS, date=None, variables={}) == {"slow": True}
    assert process.render("{{ x }}", date=None, variables={"x": 1})["text"] == "1"
    monkeypatch.setattr("longfit.data.template.template_process", lambda: process)
    with pytest.raises(ConfigError, match="loops for ever"):
        render(LOOPS)


def test_memory_is_limited_where_the_system_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    process = TemplateProcess()
    monkeypatch.setattr(template_process, "MEMORY_BYTES", 64 << 20)  # of what the parent looks at
    hungry = "{% set x = ('x' * 300000000) %}" + LOOPS
    assert process.render(hungry, date=None, variables={}) == {"memory": True}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_starts_its_own() -> None:
    expected, process = render(CHATML), template_process.template_process()
    parents = process._process
    child = os.fork()
    if not child:
        os._exit(0 if render(CHATML) == expected and process._process is not parents else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert render(CHATML) == expected
