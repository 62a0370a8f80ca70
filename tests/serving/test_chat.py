"""Chats as tokens, with the number of the message of each."""

import pytest

from megatron_dla.errors import UserError
from megatron_dla.serving.chat import render_chat
from tests.support.sessions import CHAT
from tests.support.tiny_hf import build_tokenizer


def test_chat_tokens_and_their_messages():
    tokenizer = build_tokenizer()
    ids, numbers = render_chat(tokenizer, CHAT)
    assert ids == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    pairs = list(zip(ids, numbers, strict=True))
    texts = [tokenizer.decode([token for token, n in pairs if n == number]) for number in range(3)]
    assert texts == [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT[1:]]
    head, tail = numbers.index(0), len(numbers) - numbers[::-1].index(2)
    assert set(numbers[:head]) == {-1} and tokenizer.decode(ids[tail:]) == "<|im_start|>assistant\n"
    assert render_chat(tokenizer, CHAT, numbered=False) == (ids, [-1] * len(ids))


def test_system_text_of_the_template_itself_belongs_to_no_message():
    tokenizer = build_tokenizer()
    ids, numbers = render_chat(tokenizer, CHAT[1:], generation_prompt=False)
    unnumbered = tokenizer.decode([i for i, n in zip(ids, numbers, strict=True) if n == -1])
    assert unnumbered == "<|im_start|>system\nbe kind<|im_end|>\n" and set(numbers) == {-1, 0, 1, 2}


def test_templates_that_do_not_serve_are_refused():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content if loop.last else '' }}.{% endfor %}"
    with pytest.raises(UserError, match="writes by token"):
        render_chat(tokenizer, CHAT)
    assert render_chat(tokenizer, CHAT, numbered=False)[0]
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        render_chat(tokenizer, CHAT)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        render_chat(tokenizer, CHAT)
