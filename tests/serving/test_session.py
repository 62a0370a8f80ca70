"""Sessions: suffixes, forks, files, forgetting; each against the plain forward pass over all tokens."""

import json

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from megatron_dla.adapters.config import DeltaMemConfig
from megatron_dla.adapters.memory import MemoryControl, MemoryInputs
from megatron_dla.errors import CheckpointError, UserError
from megatron_dla.serving.chat import render_chat
from megatron_dla.serving.decode import draw, generate_batch
from megatron_dla.serving.hf_model import attach
from megatron_dla.serving.session import Session
from megatron_dla.serving.session_file import load_session, save_session
from tests.support.tiny_hf import CONFIGS, build_adapted, build_base, build_tokenizer, tokens

ROW = tokens(1, 30)[0].tolist()
NUMBERS = [-1] * 4 + [0] * 9 + [1] * 10 + [2] * 7
CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo!"},
    {"role": "user", "content": "and?"},
]


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return build_adapted(CONFIGS[request.param])


@pytest.fixture(scope="module")
def tsw():
    return build_adapted()


def forward(model, ids, numbers, states=None):
    """Last logits and states of one plain call."""
    with torch.no_grad():
        message = torch.tensor([numbers]) if model.config.write == "message" else None
        out = model(torch.tensor([ids]), states=states, inputs=MemoryInputs(message=message))
        return out.logits[0, -1], out.states


def same_states(a, b, exact=True) -> bool:
    def parts(states):
        return [x for _, s in sorted(states.items()) for x in (s.S, *(vars(s.pending).values() if s.pending else ()))]

    pairs = list(zip(parts(a), parts(b), strict=True))
    return all(torch.equal(x, y) if exact else torch.allclose(x, y, rtol=0, atol=1e-5) for x, y in pairs)


def fed(model, ids=ROW, numbers=NUMBERS, cut=17) -> Session:
    session = Session(model, build_tokenizer())
    session.append(ids[:cut], numbers[:cut])
    session.append(ids[cut:], numbers[cut:])
    return session


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


def test_replies_go_on_from_what_was_generated(tsw):
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


# ---- files (acceptance 13)


@pytest.mark.parametrize("cache", [True, False])
def test_a_saved_session_goes_on_bit_for_bit(model, tmp_path, cache):
    session = fed(model, ROW[:12], NUMBERS[:12], 5)
    session.forget_context()
    session.append(ROW, NUMBERS)
    session.history = CHAT
    save_session(session, tmp_path / "s", cache=cache)
    with safe_open(tmp_path / "s", framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
        assert file.get_tensor("state.S").dtype == torch.float32
    assert any(name.startswith("cache.") for name in names) == cache
    assert metadata["tokens_seen"] == "42" and json.loads(metadata["config"]) == json.loads(
        json.dumps(model.config.to_dict())
    )
    again = load_session(tmp_path / "s", model, build_tokenizer())
    assert same_states(again.states, session.states) and same_states(again.origin, session.origin)
    assert (again.ids, again.message_ids, again.tokens_seen) == (session.ids, session.message_ids, 42)
    assert again.history == CHAT and again.nbytes == session.nbytes
    got, want = again.append([5, 6], 3), session.append([5, 6], 3)
    assert torch.equal(got, want) if cache else torch.allclose(got, want, rtol=0, atol=3e-5)
    assert list(again.generate(4, stop=[])) == list(session.generate(4, stop=[]))


def test_a_new_session_and_a_model_without_adapter_are_saved_too(tmp_path):
    model = build_adapted(DeltaMemConfig(layers_to_transform=()))
    save_session(Session(model), tmp_path / "s")
    again = load_session(tmp_path / "s", model)
    assert again.tokens_seen == 0 and torch.equal(again.append(ROW), Session(model).append(ROW))


def test_sessions_of_others_are_refused(tsw, tmp_path):
    save_session(fed(tsw), tmp_path / "s")
    for other in (build_adapted(DeltaMemConfig(alpha=8.0)), build_adapted(CONFIGS["MSW"])):
        with pytest.raises(CheckpointError, match="another adapter"):
            load_session(tmp_path / "s", other)
    moved = build_adapted()
    with torch.no_grad():
        moved.memories["2"].beta_bias[3] += 1e-3
    with pytest.raises(CheckpointError, match="another adapter"):
        load_session(tmp_path / "s", moved)
    with pytest.raises(CheckpointError, match="belongs to the base model"):
        load_session(tmp_path / "s", build_adapted(base=build_base(seed=1)))


@pytest.mark.parametrize("name", ["TSW", "SSW"])
def test_every_byte_that_is_read_back_is_checked(tmp_path, name):
    """Flipped bytes at both ends and in the middle of every tensor, and every metadata field edited, added, removed."""
    path, model = tmp_path / "s", build_adapted(CONFIGS[name])
    session = fed(model)
    session.history = CHAT
    save_session(session, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    raw, tensors = path.read_bytes(), {key: x.clone() for key, x in load_file(path).items()}  # the file is mapped
    size = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:size])
    places = [size + at for begin, end in
              (entry["data_offsets"] for key, entry in header.items() if key != "__metadata__")
              for at in (begin, (begin + end) // 2, end - 1)]  # fmt: skip
    assert len(places) == 3 * len(tensors) >= 30 and max(places) == len(raw) - 1
    for place in places:
        damaged = bytearray(raw)
        damaged[place] ^= 0x01
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"checksum.*take an intact copy, or begin a new session"):
            load_session(path, model)
    save_file(tensors, path, metadata=metadata)
    assert load_session(path, model).history == CHAT
    for key, value in metadata.items():
        for edited in ({key: value + " "}, {key: "7"}, {key + "_2": value}):
            save_file(tensors, path, metadata=metadata | edited)
            with pytest.raises(CheckpointError, match=r"(checksum|of this version).*take an intact copy"):
                load_session(path, model)
        save_file(tensors, path, metadata={k: v for k, v in metadata.items() if k != key})
        with pytest.raises(CheckpointError, match="take an intact copy"):
            load_session(path, model)


def test_a_bf16_cache_is_saved_checked_and_continued(tmp_path):
    base = build_base(dtype=torch.bfloat16)
    model = attach(base, DeltaMemConfig(), seed=1)
    session = fed(model)
    save_session(session, tmp_path / "s")
    again = load_session(tmp_path / "s", model)
    assert again.cache.layers[0].keys.dtype == torch.bfloat16
    assert torch.equal(again.append([5, 6]), session.append([5, 6]))


@pytest.mark.parametrize("damage", ["cut", "pickle", "other", "state", "ids", "cache", "gone", "missing"])
def test_damaged_sessions_are_refused(tsw, tmp_path, damage):
    path = tmp_path / "s"
    save_session(fed(tsw), path)
    tensors = {name: x.clone() for name, x in load_file(path).items()}  # the file is mapped
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "pickle":
        torch.save(tensors, path)
    elif damage == "other":
        save_file(tensors, path)
    elif damage == "missing":
        path.unlink()
    else:
        if damage == "state":
            tensors["state.S"][1, 0, 2, 3] += 1e-4
        elif damage == "ids":
            tensors["ids"] = tensors["ids"][:-1]
        elif damage == "cache":
            tensors["cache.1.keys"] = tensors["cache.1.keys"][:, :, 1:].contiguous()
        else:
            del tensors["origin.S"]
        save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=str(path)):
        load_session(path, tsw)


# ---- batches, drawing


def test_a_batch_of_prompts_is_each_prompt_alone(model):
    prompts, numbers = [ROW, ROW[3:11], ROW[20:21]], [NUMBERS, NUMBERS[3:11], [0]]
    alone = []
    for ids, number in zip(prompts, numbers, strict=True):
        session = Session(model)
        session.append(ids, number)
        alone.append(list(session.generate(5, stop=[])))
    stop = [alone[1][2]]
    want = [row[: next((i for i, t in enumerate(row) if t in stop), 5)] for row in alone]
    ids = numbers if model.config.write == "message" else None
    got, states = generate_batch(model, prompts, 5, stop=stop, messages=ids)
    assert got == want and len(want[1]) <= 2
    session = Session(model)  # a row that ended early: its states are of what it fed
    session.append([*prompts[1], *got[1]], [*numbers[1], *[max(numbers[1]) + 1] * len(got[1])])
    assert torch.allclose(states[0].S[1], session.states[0].S[0], rtol=0, atol=1e-5)


def test_drawing_follows_the_probabilities():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05])).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    share = torch.bincount(draw(logits, 1.0, 1.0, generator), minlength=4) / 4000
    assert (share - torch.tensor([0.5, 0.3, 0.15, 0.05])).abs().max() < 0.03
    share = torch.bincount(draw(logits, 1.0, 0.6, generator), minlength=4) / 4000
    assert (share - torch.tensor([0.625, 0.375, 0.0, 0.0])).abs().max() < 0.03
    share = torch.bincount(draw(logits, 0.5, 1.0, generator), minlength=4) / 4000
    assert abs(share[0] - 0.25 / 0.365) < 0.03
    assert set(draw(logits, 0.0).tolist()) == {0}
