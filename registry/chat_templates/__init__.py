"""Chat templates of well-known models, for copies of them that carry none: one `.jinja` file each.

A template is written into the model's `chat_template` when the operator picks it, so that a later change
of the library changes no model. Each is rendered by a test against the text that the model's authors give.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_FOLDER = Path(__file__).parent

# Which one a name tells of; the first that fits. A base model has no chat format, so some ask for more.
_FITS = (
    ("vicuna", re.compile(r"vicuna|longchat", re.IGNORECASE)),
    ("alpaca", re.compile(r"alpaca", re.IGNORECASE)),
    ("llama-2", re.compile(r"llama-?2\b.*chat|codellama.*instruct", re.IGNORECASE)),
    ("llama-3", re.compile(r"llama-?3.*instruct", re.IGNORECASE)),
    ("chatglm2", re.compile(r"chatglm-?2", re.IGNORECASE)),
    ("zephyr", re.compile(r"zephyr", re.IGNORECASE)),
    ("mistral-instruct", re.compile(r"(?:mistral|mixtral).*instruct", re.IGNORECASE)),
    ("gemma", re.compile(r"gemma-?[1-3]?.*-it\b", re.IGNORECASE)),
    ("phi-2", re.compile(r"phi-?2\b", re.IGNORECASE)),
    ("phi-3", re.compile(r"phi-?3.*instruct", re.IGNORECASE)),
    ("openchat", re.compile(r"openchat", re.IGNORECASE)),
    ("deepseek-llm", re.compile(r"deepseek-llm.*chat", re.IGNORECASE)),
    ("tulu", re.compile(r"tulu-?2", re.IGNORECASE)),
    (
        "chatml",
        re.compile(
            r"qwen.*(?:chat|instruct)|yi-.*chat|openhermes|dolphin|chatml|smollm.*instruct", re.IGNORECASE
        ),
    ),
)


@cache
def names() -> tuple[str, ...]:
    """All templates there are, sorted."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.jinja")))


@cache
def read(name: str) -> str:
    """The template's text. Raises KeyError for a name that is not in `names()`."""
    if name not in names():
        raise KeyError(name)
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def name_of(template: str) -> str | None:
    """Which one of the library this text is, if any."""
    return next((name for name in names() if read(name).strip() == template.strip()), None)


def suggested(*named: str) -> str | None:
    """The template for a model with such a name, source or folder; None when nothing tells."""
    for text in named:
        for name, pattern in _FITS:
            if pattern.search(text):
                return name
    return None


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; transformers knows it too."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_SYNTAX = ImmutableSandboxedEnvironment(extensions=[_Generation, "jinja2.ext.loopcontrols"], autoescape=True)


def problem_of(template: str) -> str | None:
    """What is wrong with a template's syntax, in a sentence; None when it can be rendered.

    What it does is bounded where it runs, in the engine (`inference.engines.transformers.rendering`).
    """
    try:
        _SYNTAX.parse(template)
    except TemplateError as error:
        return f"line {getattr(error, 'lineno', 1)}: {error.message or 'it cannot be read'}"
    except RecursionError:
        return "it is nested too deep."
    return None
