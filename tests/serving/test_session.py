"""Sessions: suffixes, forks, files, forgetting; each against the plain forward pass over all tokens."""

import pytest
import torch

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.memory import MemoryControl
from megatron_dla.serving.chat import render_chat
from megatron_dla.serving.session import Session
from tests.support.sessions import CHAT, NUMBERS, ROW, fed, forward, same_states
from tests.support.tiny_hf import CONFIGS, build_adapted, build_base, build_tokenizer

# ---- tokens


def test_pieces_are_the_whole(model):
    session = fed(model)
    logits, states = forward(model, ROW, NUMBERS)
    torch.testing.assert_close(session.logits, logits, rtol=0, atol=3e-5)
    assert same_states(session.states, states, exact=False) and session.ids == ROW and session.tokens_seen == 30


def test_generation_is_step_by_step_forward(model):
    """Against whole passes without a cache; the answer is one message."""
    session = fed(model)
    got = list(session.generate(6, stop=[]))
    ids, numbers = list(ROW), list(NUMBERS)
    for token in got:
        logits, _ = forward(model, ids, numbers)
        assert token == int(logits.argmax())
        ids, numbers = [*ids, token], [*numbers, 3]
    assert session.ids == ids and same_states(session.states, forward(model, ids, numbers)[1], exact=False)
    assert len(set(got)) > 1


def test_a_stop_token_is_neither_fed_nor_returned(tsw):
    session = fed(tsw)
    free = list(session.fork().generate(5, stop=[]))
    ends = next(at for at, token in enumerate(free) if at and token not in free[:at])
    assert list(session.generate(5, stop=[free[ends]])) == free[:ends]
    assert session.ids == ROW + free[:ends]


def test_only_the_last_position_reaches_the_vocabulary(tsw):
    sizes = []
    hook = tsw.base.lm_head.register_forward_hook(lambda m, args, out: sizes.append(out.shape[1]))
    fed(tsw)
    hook.remove()
    assert sizes == [1, 1]


def test_two_sessions_and_their_forks_do_not_touch_each_other(model):
    alone = [fed(model, ROW[i:], NUMBERS[i:], 10) for i in (0, 5)]
    want = [list(session.fork().generate(5, stop=[])) for session in alone]
    turns, got = [session.fork().generate(5, stop=[]) for session in alone], [[], []]
    for _ in range(5):
        for at, turn in enumerate(turns):
            got[at].append(next(turn))
    assert got == want and want[0] != want[1]
    assert [session.ids for session in alone] == [ROW, ROW[5:]]
    assert list(alone[0].generate(5, stop=[])) == want[0]  # the forked one was left as it was


def test_an_interrupted_call_leaves_the_session_as_it_was(model):
    session, want = fed(model), fed(model)
    hook = model.base.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.append([1, 2, 3], [3, 3, 3])
    hook.remove()
    assert session.ids == ROW
    assert torch.equal(session.append([1, 2], 3), want.append([1, 2], 3)) and same_states(session.states, want.states)


def test_reset_is_a_new_session(model):
    session = fed(model)
    session.reset()
    assert session.tokens_seen == 0 and session.nbytes.cache == 0
    assert torch.equal(session.append(ROW, NUMBERS), Session(model).append(ROW, NUMBERS))
    with pytest.raises(ValueError, match="append something"):
        next(Session(model).generate(1))
    with pytest.raises(ValueError, match="no tokens"):
        session.append([])


def test_messages_need_their_numbers(tsw):
    session = Session(build_adapted(CONFIGS["SSW"]))
    with pytest.raises(ValueError, match="message number"):
        session.append(ROW)
    for session in (
        Session(build_adapted(CONFIGS["SSW"])),
        Session(tsw),
    ):  # also where they are not used: they are saved
        for numbers in ([], [0], [0] * 4):
            with pytest.raises(ValueError, match=f"3 ids and {len(numbers)} message numbers: give one"):
                session.append([1, 2, 3], numbers)
        assert session.ids == session.message_ids == []


@pytest.mark.parametrize("token", [260, -1])
def test_tokens_of_another_vocabulary_are_refused(tsw, token):
    session = fed(tsw)
    with pytest.raises(ValueError, match=f"token {token} is outside the model's vocabulary of 260"):
        session.append([1, token])
    assert session.ids == ROW and session.nbytes.cache == fed(tsw).nbytes.cache


def test_controls_hold_for_the_whole_session(tsw):
    plain = Session(build_adapted(DeltaMemConfig(layers_to_transform=()), base=build_base()))
    off, frozen = (Session(tsw, control=control) for control in (MemoryControl(scale=0.0), MemoryControl(freeze=True)))
    for session in (plain, off, frozen):
        session.append(ROW[:9])
    assert torch.equal(off.append(ROW[9:]), plain.append(ROW[9:]))
    assert torch.equal(frozen.append(ROW[9:]), plain.logits)  # nothing written, nothing read
    assert off.states[0].S.any() and not frozen.states[0].S.any() and not plain.states


# ---- memory without context


def test_the_state_keeps_its_size_while_the_cache_grows(tsw):
    session = Session(tsw)
    sizes = []
    for token in ROW:
        session.append([token])
        sizes.append(session.nbytes)
    assert {size.state for size in sizes} == {3 * 8 * 8 * 4}
    assert [size.cache for size in sizes] == [n * 3 * 2 * 12 * 4 for n in range(1, 31)]  # layers, k and v, 2 heads of 6


def test_forgetting_drops_the_context_and_keeps_the_state(model):
    """What follows is a fresh pass, positions from 0, from the states with the open message written: a new message
    of the same number does not continue it."""
    numbers = [-1] * 4 + [0] * 26
    session = fed(model, ROW, numbers)
    _, states = forward(model, ROW, numbers)
    session.forget_context()
    assert session.nbytes.cache == 0 and session.ids == [] and session.tokens_seen == 30
    got = session.append(ROW[:8], [0] * 8)
    want, after = forward(model, ROW[:8], [0] * 8, model.finish(states))
    torch.testing.assert_close(got, want, rtol=0, atol=3e-5)
    assert same_states(session.states, after, exact=False)
    fresh, _ = forward(model, ROW[:8], [0] * 8)
    assert (got - fresh).abs().max() > 1e-2


# ---- chat


def test_a_chat_is_fed_by_its_suffix(model):
    session, tokenizer = Session(model, build_tokenizer()), build_tokenizer()
    fed_tokens = []
    hook = model.base.model.embed_tokens.register_forward_hook(lambda m, args, out: fed_tokens.append(out.shape[1]))
    session.feed(CHAT[:2], generation_prompt=False)
    session.feed(CHAT)
    hook.remove()
    ids, numbers = render_chat(tokenizer, CHAT)
    assert sum(fed_tokens) == len(ids) and len(fed_tokens) == 2
    logits, states = forward(model, ids, numbers)
    torch.testing.assert_close(session.logits, logits, rtol=0, atol=3e-5)
    assert same_states(session.states, states, exact=False)


def test_a_changed_history_is_built_again_from_where_the_context_began(model):
    tokenizer = build_tokenizer()
    session = fed(model)
    session.forget_context()
    kept = session.states
    session.feed(CHAT)
    other = [CHAT[0], {"role": "user", "content": "ho"}, *CHAT[2:]]
    got = session.feed(other)
    ids, numbers = render_chat(tokenizer, other)
    want, states = forward(model, ids, numbers, kept)
    torch.testing.assert_close(got, want, rtol=0, atol=3e-5)
    assert session.ids == ids and same_states(session.states, states, exact=False)
    assert session.message_ids == (numbers if session.writes_messages else [-1] * len(ids))
    assert torch.equal(session.feed(other), got)  # nothing new: nothing is fed


def test_replies_continue_the_generated_tokens(tsw):
    """Text that comes back as the tokens that were drawn is not fed again."""
    session = Session(tsw, build_tokenizer())
    letters = torch.full((260,), -torch.inf)
    letters[build_tokenizer()("abcdefgh")["input_ids"]] = 0
    hook = tsw.base.lm_head.register_forward_hook(lambda m, args, out: out + letters)  # printable answers
    fed_tokens = []
    count = tsw.base.model.embed_tokens.register_forward_hook(lambda m, args, out: fed_tokens.append(out.shape[1]))
    answer = list(session.reply("hi", 4))
    list(session.reply("more", 4))
    hook.remove()
    count.remove()
    assert len(answer) == 4 and [m["role"] for m in session.history] == ["user", "assistant"] * 2
    assert session.history[1]["content"] == build_tokenizer().decode(answer)
    assert sum(fed_tokens) == len(session.ids)
    ids, _ = render_chat(build_tokenizer(), session.history[:3], numbered=False)
    assert session.ids == [*ids, *session.ids[len(ids) :]] and len(session.ids) == len(ids) + 4
