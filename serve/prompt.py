"""From a conversation to the one text that the models continue.

The default template, `plain`, is the contents of all messages in order, joined by an empty line: the form that the
routers are trained on, and for a single question exactly its text. A Jinja chat template (a file or inline, in the
dialect of Hugging Face tokenizers) serves models that were tuned on one. Templates run in Jinja's immutable sandbox;
they are the operator's, and what clients send is data to them, never template source.

What a client can forge. Engines read the rendered text with their tokenizer, which takes `<|im_start|>` for the special
token wherever it stands, so such text in a message could end the turn and speak in another role. Escaping would change
what was said, so a message that holds one of the template's own marks, or one of `special_tokens`, is refused with a
400. Marks are found in the template's literal text: `<...>`, words like `[INST]`, and the values of its variables
(bos_token). A template that marks roles in plain words ("User:") cannot be guarded, since nobody can tell such a line
from a quotation; nor can `plain`, which has no roles: whoever writes any message writes the prompt. Do not treat a
system message as a border of trust there. Earlier thinking (`<think>`) that a template marks must be left out of
what is handed back, as such templates do themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from roro_ray.errors import ConfigError, did_you_mean
from serve.problems import bad_request
from serve.schema import Message

PLAIN = "plain"
_SEPARATOR = "\n\n"
_MARK = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Za-z_]{2,32}\]")
_MAX_REASON_CHARS = 300


class ChatTemplate:
    """A template, compiled once, and the marks that no message may hold."""

    def __init__(
        self, source: str, variables: Mapping[str, str] | None = None, special_tokens: Iterable[str] = ()
    ) -> None:
        self._variables = dict(variables or {})
        self._template = None
        marks = {*special_tokens, *self._variables.values()}
        if source != PLAIN:
            environment = _make_environment()
            try:
                tree = environment.parse(source)
                self._template = environment.from_string(source)
            except TemplateSyntaxError as error:
                message = f"the chat template does not parse at line {error.lineno}: {error.message}"
                raise ConfigError(message) from error
            marks |= _find_marks(tree)
        self._knows_developer = "developer" in source
        self.marks = tuple(sorted(filter(None, marks)))

    def render(self, messages: Sequence[Message], continues: bool = False) -> str:
        """The prompt of a conversation; where it `continues`, the last message is no part of it, but checked too.

        Raises:
            ApiError: 400 where a message holds a mark, where the template refuses or fails, or nothing is left.
        """
        for index, message in enumerate(messages):
            for mark in self.marks:
                if mark in message.content:
                    param = f"messages[{index}].content"
                    text = f"{param} holds {mark!r}, a control mark of the models' prompt. Leave it out."
                    raise bad_request(text, param, "control_mark")
        messages = messages[:-1] if continues else messages
        if self._template is None:
            text = _SEPARATOR.join(message.content for message in messages).rstrip()
        else:
            text = self._render_template(messages)
        if not text.strip():
            raise bad_request("The conversation holds no text. Say something.", "messages")
        return text

    def _render_template(self, messages: Sequence[Message]) -> str:
        assert self._template is not None
        turns = [{"role": self._name_role(message.role), "content": message.content} for message in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._variables)
        except TemplateError as error:
            reason = error.message or type(error).__name__
        # A template can fail in any way that Python can, on conversations that its author did not think of.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        text = f"The models' chat template refuses this conversation: {reason[:_MAX_REASON_CHARS]}"
        raise bad_request(text, "messages", "chat_template")

    def _name_role(self, role: str) -> str:
        # The official schema's successor of `system`; templates older than it know only that.
        return "system" if role == "developer" and not self._knows_developer else role


def load_template(
    option: str, variables: Mapping[str, str] | None = None, special_tokens: Iterable[str] = ()
) -> ChatTemplate:
    """Read a template option: `plain`, inline Jinja (it holds `{{` or `{%`), or the path of a file.

    Args:
        variables: what the template may use beside the messages, such as `bos_token`.
        special_tokens: texts that the models' tokenizers take for special tokens; no message may hold one.

    Raises:
        ConfigError: no such file, or the template does not parse.
    """
    if option == PLAIN or "{{" in option or "{%" in option:
        return ChatTemplate(option, variables, special_tokens)
    try:
        source = Path(option).read_text("utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        hint = did_you_mean(option, [PLAIN])
        message = f"chat template {option[:200]!r}{hint}: expected 'plain', a readable file or inline Jinja"
        raise ConfigError(message) from error
    if source.strip() == PLAIN:
        source = PLAIN
    return ChatTemplate(source, variables, special_tokens)


def render_conversation(
    messages: Sequence[Message], template: str | ChatTemplate = PLAIN, continues: bool = False
) -> str:
    """The text that the models continue; where the conversation `continues`, without its last message.

    Raises:
        ApiError: 400, see `ChatTemplate.render`.
        ConfigError: the option names no usable template.
    """
    compiled = template if isinstance(template, ChatTemplate) else _load_cached(template)
    return compiled.render(messages, continues)


@lru_cache(maxsize=16)
def _load_cached(option: str) -> ChatTemplate:
    return load_template(option)


class _Generation(Extension):
    """`{% generation %}` blocks, by which training finds the assistant's tokens: here their content as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _make_environment() -> Environment:
    """The environment that transformers renders chat templates in, without its training tools."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    to_json: Callable[..., str] = _to_json
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _find_marks(tree: nodes.Template) -> set[str]:
    """The control marks in a template's literal text, those put together from strings included."""
    literals = [data.data for data in tree.find_all(nodes.TemplateData)]
    literals += [const.value for const in tree.find_all(nodes.Const) if isinstance(const.value, str)]
    return {mark for literal in literals for mark in _MARK.findall(literal)}
