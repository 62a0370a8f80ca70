"""A chat as tokens: by the tokenizer's template or as bare texts, with the number of the message of each token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from megatron_dla.errors import UserError

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""
_PROBE = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]


def render_chat(
    tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool = True, numbered: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of a chat, and for each the number of its message.

    Messages other than system messages are numbered from 0, their template tokens included; -1 stands for system
    messages (also one that the template adds by itself) and for the generation prompt at the end. Where the template
    wants roles to alternate (Mistral's), adjacent messages of a role are one message (`merge_turns`).

    Args:
        numbered: False = all numbers -1, for adapters that write by token, with any template and tokenizer.

    Raises:
        UserError: no template, one that rejects these messages, or one from which no message's tokens can be found.
    """
    messages = merge_turns(tokenizer, messages)
    text = _render(tokenizer, messages, generation_prompt)
    if not numbered:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids, [-1] * len(ids)
    if not getattr(tokenizer, "is_fast", False):
        raise UserError("writes by message need a fast tokenizer (tokenizer.json), to find the tokens of each message")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = _spans(tokenizer, messages, text)
    numbers = []
    for start, _ in found["offset_mapping"]:
        numbers.append(next((number for begin, end, number in spans if begin <= start < end), -1))
    return found["input_ids"], numbers


def merge_turns(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """The messages, adjacent ones of a role joined by a blank line if the chat template refuses them apart."""
    roles = [message["role"] for message in messages]
    if all(a != b for a, b in pairwise(roles)) or not _alternates(tokenizer):
        return list(messages)
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1]["role"] == message["role"]:
            merged[-1] = {**message, "content": f"{merged[-1]['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    return merged


def _alternates(tokenizer: Any) -> bool:
    """Whether the template takes one user message, but not two in a row."""
    try:
        _render(tokenizer, _PROBE[:1], False)
    except UserError:
        return False
    try:
        _render(tokenizer, _PROBE[:1] * 2, False)
    except UserError:
        return True
    return False


def user_turn(tokenizer: Any) -> tuple[str, str]:
    """How the chat template writes a user message, with {} in the place of its text, and opens the answer.

    Without the system message or the bos token that the template puts before the first message.

    Raises:
        UserError: no chat template, or one that changes the text of a message.
    """
    message = {"role": "user", "content": "{}"}
    turn = _render(tokenizer, [message], False)
    opening = _render(tokenizer, [message], True)
    begin = _preamble(tokenizer, message)
    bos = getattr(tokenizer, "bos_token", None) or ""
    if not begin and bos and turn.startswith(bos):
        begin = len(bos)
    if turn[begin:].count("{}") != 1 or not opening.startswith(turn):
        raise UserError("the model's chat template changes the text of a message: use style=text")
    return turn[begin:], opening[len(turn) :]


def check_chat(tokenizer: Any, where: str, *, numbered: bool) -> None:
    """Check, before a model is loaded, that questions and answers can be rendered.

    Args:
        where: the tokenizer, for the message. numbered: as of `render_chat`.

    Raises:
        UserError: see `render_chat`.
    """
    try:
        render_chat(tokenizer, _PROBE, numbered=numbered)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _render(tokenizer: Any, messages: Sequence[Message], generation_prompt: bool) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the tokenizer has no chat template: use an instruction-tuned model, put its chat_template.jinja beside "
            "the tokenizer, or use `dla generate`"
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
    except TemplateError as error:
        raise UserError(f"the model's chat template rejects these messages: {error}") from error


def _spans(tokenizer: Any, messages: Sequence[Message], text: str) -> list[tuple[int, int, int]]:
    """(begin, end, number) in characters of every message that is written."""
    spans, begin, number = [], 0, 0
    if messages and messages[0]["role"] != "system":
        begin = _preamble(tokenizer, messages[0])
    for count, message in enumerate(messages, 1):
        head = _render(tokenizer, messages[:count], False)
        if not text.startswith(head):
            raise UserError(
                f"writes by message: this chat template renders the first {count} messages differently when others "
                "follow, so that a message's tokens change: use an adapter that writes by token"
            )
        if message["role"] != "system":
            spans.append((begin, len(head), number))
            number += 1
        begin = len(head)
    return spans


def _preamble(tokenizer: Any, first: Message) -> int:
    """Number of characters that the template adds before the first message, found by rendering the message twice."""
    once = _render(tokenizer, [first], False)
    try:
        twice = _render(tokenizer, [first, first], False)
    except UserError:  # a template that wants roles to alternate
        return 0
    own = twice[len(once) :]
    return len(once) - len(own) if own and twice.startswith(once) and once.endswith(own) else 0


class PlainText:
    """A tokenizer without its chat template; texts are joined without added spaces."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return encode(self._tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)


def render(
    tokenizer: Any, messages: Sequence[Message], *, generation_prompt: bool, numbered: bool, follows: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of messages, and the message number of each token.

    They are rendered by the chat template, or, for a tokenizer without one, as texts with one space between them
    (`follows`: also before the first; `PlainText`: none).

    Raises:
        UserError: see `render_chat`.
    """
    if getattr(tokenizer, "chat_template", None):
        return render_chat(tokenizer, messages, generation_prompt=generation_prompt, numbered=numbered)
    ids: list[int] = []
    numbers: list[int] = []
    space = "" if isinstance(tokenizer, PlainText) else " "
    for number, message in enumerate(messages):
        part = encode(tokenizer, (space if follows or number else "") + message["content"])
        ids += part
        numbers += [number if numbered else -1] * len(part)
    return ids, numbers


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, nothing added."""
    if callable(tokenizer):  # transformers
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.encode(text)


def render_context(
    tokenizer: Any, context: Sequence[Message], *, numbered: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids and message numbers of what the memory reads before a question (an episode's write segment)."""
    return render(tokenizer, context, generation_prompt=False, numbered=numbered)


def render_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a question (an episode's read segment) up to the start of the answer to its last message."""
    return render(tokenizer, messages, generation_prompt=True, numbered=False, follows=True)[0]


def system_message(text: str) -> list[Message]:
    """The system message as the start of a chat; nothing for an empty text."""
    return [{"role": "system", "content": text}] if text else []
