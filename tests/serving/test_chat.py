"""Chats as tokens, with the number of the message of each."""

import pytest

from megatron_dla.errors import UserError
from megatron_dla.evaluation.scoring import encode_stories
from megatron_dla.evaluation.stories import Question, Story
from megatron_dla.serving.chat import merge_turns, render_chat
from megatron_dla.tasks.adapter.episodes import question_episode
from tests.support.sessions import CHAT
from tests.support.tiny_hf import MISTRAL, build_tokenizer


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


TWO = [{"role": "user", "content": text} for text in ("The sky is green.", "Grass is blue.")]


def test_adjacent_turns_are_one_where_the_template_wants_roles_to_alternate():
    tokenizer = build_tokenizer()
    apart = [*TWO, {"role": "assistant", "content": "I see."}, TWO[0]]
    assert merge_turns(tokenizer, apart) == apart
    tokenizer.chat_template = MISTRAL
    ids, numbers = render_chat(tokenizer, apart)
    text = "[INST] The sky is green.\n\nGrass is blue. [/INST] I see.<|im_end|>[INST] The sky is green. [/INST]"
    assert tokenizer.decode(ids) == text and sorted(set(numbers)) == [0, 1, 2]
    assert apart[0] == TWO[0] == {"role": "user", "content": "The sky is green."}
    with pytest.raises(UserError, match="must alternate"):
        render_chat(tokenizer, [{"role": "system", "content": "x"}, *apart])


def test_episodes_and_stories_of_such_a_model():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = MISTRAL
    pair = {"question": "Which colour has the sky?", "answer": "green"}
    episode = question_episode(tokenizer, [m["content"] for m in TWO], [pair], write_length=99, read_length=99)
    assert tokenizer.decode(episode.write_ids) == "[INST] The sky is green.\n\nGrass is blue. [/INST]"
    assert tokenizer.decode(episode.read_ids[episode.answer]).strip() == "green<|im_end|>"
    context = tuple(m["content"] for m in TWO)
    story = Story(context, (Question("Which?", "green", ("green", "red"), "It is", "."),))
    (row,), (one,) = encode_stories(tokenizer, [story], numbered=True)
    assert set(row.messages) == {0} and tokenizer.decode(one.full.ids).count("[INST]") == 1
