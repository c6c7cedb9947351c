"""Chat templates: a conversation as one prompt, byte for byte as transformers renders it.

Templates come from the model or the operator, never from a request. They are downloaded code all
the same, so they run in jinja2's immutable sandbox, see plain data only, and their output is
bounded. `optimized=False` because the optimizer folds constants at compile time, where a template
of 36 characters can take gigabytes.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxserve.errors import RequestError
from jaxserve.frontend.chat_messages import plain_data, plain_messages, plain_objects

MAX_PROMPT_CHARS = 1 << 24  # of a rendered conversation
_RESERVED = """
    messages tools documents add_generation_prompt continue_final_message tokenize chat_template
    conversation
"""
RESERVED_KWARGS = frozenset(_RESERVED.split())
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    special_tokens: Mapping[str, str] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation.

    Args:
        template: Jinja source; None: the model has none.
        messages: At least one, each with a role; content is a string or a list of text parts.
        tools: JSON schemas of functions.
        add_generation_prompt: End with the header of the assistant's answer.
        continue_final_message: End inside the last message, so that the model continues it.
        special_tokens: bos_token, eos_token, ... for the template.
        template_kwargs: Further variables, e.g. enable_thinking.

    Raises:
        RequestError: There is no template, the messages are malformed, or the template refuses.
    """
    if template is None:
        raise RequestError(
            "the model has no chat template; pass one with chat_template (--chat-template FILE), "
            "or send a plain prompt",
            param="messages",
        )
    if add_generation_prompt and continue_final_message:
        raise RequestError(
            "add_generation_prompt and continue_final_message exclude each other; set the first "
            "to false to continue the last message",
            param="continue_final_message",
        )
    kwargs = dict(template_kwargs or {})
    if reserved := sorted(RESERVED_KWARGS & kwargs.keys()):
        raise RequestError(
            f"chat_template_kwargs may not set {', '.join(reserved)}; use the field of that name",
            param="chat_template_kwargs",
        )
    chat = plain_messages(messages, keep_parts=_loops_over_content(template))
    final = _mark_final(template, chat) if continue_final_message else ""
    variables = dict(special_tokens or {}) | {name: plain_data(v) for name, v in kwargs.items()}
    variables["messages"] = chat
    variables["tools"] = None if tools is None else plain_objects("tools", tools)
    variables["documents"] = None if documents is None else plain_objects("documents", documents)
    variables["add_generation_prompt"] = add_generation_prompt
    text = _run(template, variables)
    return _cut_at_mark(text, final) if continue_final_message else text


def _run(template: str, variables: dict[str, Any]) -> str:
    pieces: list[str] = []
    num_chars = 0
    try:
        for piece in _compile(template).generate(variables):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > MAX_PROMPT_CHARS:
                raise RequestError(
                    f"the chat template wrote more than {MAX_PROMPT_CHARS} characters; send a "
                    "shorter conversation",
                    param="messages",
                )
    except RequestError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"the chat template is not valid Jinja (line {error.lineno}: {error.message}); pass "
            "another with chat_template (--chat-template FILE)",
            param="messages",
        ) from None
    except jinja2.TemplateError as error:  # what raise_exception and the sandbox raise
        raise RequestError(
            f"the chat template refuses these messages: {error}", param="messages"
        ) from None
    except Exception as error:  # the template runs on the user's data; any Python error can come
        raise RequestError(
            "the chat template cannot be applied to these messages "
            f"({type(error).__name__}: {str(error)[:200]}); check their roles and contents",
            param="messages",
        ) from None
    return "".join(pieces)


# --- The environment ---


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it from the class

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope, as the block that transformers makes of it has.
        return nodes.Scope(body, lineno=line)


class _Dict:
    """`dict(...)` in a template, without the class's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes <, > and & for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        extensions=[_Generation, loopcontrols],
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    env.globals["dict"] = _Dict()
    return env


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=16)
def _loops_over_content(template: str) -> bool:
    """Whether the template itself walks through a message's content parts."""
    try:
        tree = _environment().parse(template)
    except jinja2.TemplateError:
        return False  # reported when it is rendered
    names = {
        node.target.name
        for node in tree.find_all(nodes.Assign)
        if isinstance(node.target, nodes.Name) and _is_content(node.node)
    }
    for node in tree.find_all(nodes.For):
        source = node.iter
        while isinstance(source, nodes.Filter) and source.node is not None:
            source = source.node
        if _is_content(source) or (isinstance(source, nodes.Name) and source.name in names):
            return True
    return False


def _is_content(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return (
        isinstance(node, nodes.Getitem)
        and isinstance(node.arg, nodes.Const)
        and node.arg.value == "content"
    )


# --- continue_final_message ---


def _mark_final(template: str, chat: list[dict[str, Any]]) -> str:
    """Put a mark at the end of the last message; returns its text."""
    content = chat[-1].get("content")
    if not isinstance(content, str) and not (isinstance(content, list) and content):
        raise RequestError(
            "continue_final_message is set, but the last message has no text to continue",
            param="continue_final_message",
        )
    if "content" not in template:
        raise RequestError(
            "continue_final_message is set, but the chat template does not use content",
            param="continue_final_message",
        )
    if isinstance(content, str):
        chat[-1]["content"] = content + _TAG
        return content
    final = content[-1]["text"]
    content[-1]["text"] = final + _TAG
    return final


def _cut_at_mark(text: str, final: str) -> str:
    where = text.rfind(_TAG.strip())
    if where < 0 or final.strip() not in text:
        raise RequestError(
            "continue_final_message is set, but the chat template leaves out the last message",
            param="continue_final_message",
        )
    kept = text[:where]
    # Without the space of the mark the template strips messages, so strip here, too.
    return kept if text[where : where + len(_TAG)] == _TAG else kept.rstrip()
