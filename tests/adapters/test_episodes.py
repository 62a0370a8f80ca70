"""Episodes: what the segments hold, files and their errors, packed rows, and one packed pass against two passes."""

import json
import lzma

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_dla.adapters.memory import MemoryInputs
from megatron_dla.errors import DataError, UserError
from megatron_dla.tasks.adapter.episodes import Episode, chat_episode, collate, question_episode, read_episodes
from megatron_dla.tasks.adapter.loader import EpisodeLoader
from tests.support.tiny_hf import CONFIGS, build_adapted, build_base, build_tokenizer

S = {"role": "system", "content": "s"}
CHAT = [
    S,
    {"role": "user", "content": "Tea, please."},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "More?"},
    {"role": "assistant", "content": "Yes."},
]
LENGTHS = {"write_length": 500, "read_length": 500}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def template(tokenizer, messages, prompt=False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def answers(tokenizer, episode) -> list[str]:
    """Text of each run of answer tokens."""
    flags = np.flatnonzero(np.diff(np.concatenate([[0], episode.answer.astype(int), [0]])))
    return [tokenizer.decode(episode.read_ids[a:b]) for a, b in flags.reshape(-1, 2)]


def test_chat(tokenizer):
    episode = chat_episode(tokenizer, CHAT, numbered=True, **LENGTHS)
    assert tokenizer.decode(episode.write_ids) == template(tokenizer, CHAT[:3])
    assert tokenizer.decode(episode.read_ids) == template(tokenizer, [S, *CHAT[3:]]).rstrip("\n")
    assert answers(tokenizer, episode) == ["Yes.<|im_end|>"]
    runs = [tokenizer.decode(episode.write_ids[episode.write_messages == number]) for number in (-1, 0, 1)]
    assert runs[0] == template(tokenizer, [S])
    assert runs[1:] == ["<|im_start|>user\nTea, please.<|im_end|>\n", "<|im_start|>assistant\nok<|im_end|>\n"]
    recent = chat_episode(tokenizer, CHAT, recent_messages=2, **LENGTHS)
    assert tokenizer.decode(recent.read_ids) == template(tokenizer, [S, *CHAT[2:]]).rstrip("\n")
    assert (recent.write_ids == episode.write_ids).all() and (recent.write_messages == -1).all()


def test_last_tokens_are_kept(tokenizer):
    whole = chat_episode(tokenizer, CHAT, **LENGTHS)
    cut = chat_episode(tokenizer, CHAT, write_length=10, read_length=9)
    assert (cut.write_ids == whole.write_ids[-10:]).all() and len(cut.write_messages) == 10
    assert (cut.read_ids == whole.read_ids[-9:]).all() and (cut.answer == whole.answer[-9:]).all()
    with pytest.raises(UserError, match="answers of 5 tokens do not fit read_length = 5"):
        chat_episode(tokenizer, CHAT, write_length=10, read_length=5)


def test_text_that_stays_in_the_prompt(tokenizer):
    episode = chat_episode(tokenizer, CHAT, numbered=True, in_prompt=True, recent_messages=2, **LENGTHS)
    assert tokenizer.decode(episode.write_ids) == template(tokenizer, CHAT[:-1], prompt=True)
    assert answers(tokenizer, episode) == ["Yes.<|im_end|>"] == [tokenizer.decode(episode.read_ids)]
    runs = [tokenizer.decode(episode.write_ids[episode.write_messages == number]) for number in (-1, 0, 1, 2)]
    assert runs[0] == template(tokenizer, [S]) and runs[3] == "<|im_start|>user\nMore?<|im_end|>\n"
    cut = chat_episode(tokenizer, CHAT, in_prompt=True, write_length=10, read_length=9)
    assert len(cut) == 19 and (cut.write_ids == episode.write_ids[-14:]).all() and cut.answer.all()
    with pytest.raises(UserError, match="answers of 5 tokens do not fit write_length \\+ read_length = 5"):
        chat_episode(tokenizer, CHAT, in_prompt=True, write_length=3, read_length=2)
    pairs = [{"question": "1?", "answer": "R"}, {"question": "2?", "answer": "B"}]
    two = question_episode(tokenizer, ["Red.", "Blue."], pairs, "s", in_prompt=True, **LENGTHS)
    users = [{"role": "user", "content": text} for text in ("Red.", "Blue.", "1?")]
    assert tokenizer.decode(two.write_ids) == template(tokenizer, [S, *users], prompt=True)
    assert answers(tokenizer, two) == ["R<|im_end|>", "B<|im_end|>"] and not two.answer.all()


def test_a_share_of_the_episodes_stays_in_the_prompt(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", *[PAIR] * 10)
    for share, count in ((0.0, 0), (0.25, 2), (0.5, 5), (1.0, 10)):
        found = [e.in_prompt for e in read_episodes(path, tokenizer, in_prompt=share, **LENGTHS)]
        assert sum(found) == count and (share != 0.5 or found == [False, True] * 5)
    digests = {EpisodeLoader(
        read_episodes(path, tokenizer, in_prompt=share, **LENGTHS), row_length=200, global_batch_size=1,
        micro_batch_size=1, seed=0,
    ).digest for share in (0.0, 0.5)}  # fmt: skip
    assert len(digests) == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_in_a_packed_row_is_one_call_that_writes(tokenizer, name):
    """Beside an episode without its text; all of a prompt writes by token, and all but its answer by message."""
    model = build_adapted(CONFIGS[name], base=build_base(dtype=torch.float64))
    prompt, other = (
        chat_episode(tokenizer, CHAT, numbered=True, in_prompt=x, write_length=200, read_length=200)
        for x in (True, False)
    )
    ids = torch.from_numpy(np.concatenate([prompt.write_ids, prompt.read_ids]))[None]
    numbers = torch.full_like(ids, -1)
    numbers[0, : len(prompt.write_ids)] = torch.from_numpy(prompt.write_messages)
    out = model(ids, inputs=MemoryInputs(message=numbers)).logits[0]
    batch = collate([[other, prompt]], 400)
    logits = packed_logits(model, batch)[0, len(other) : len(other) + len(prompt)]
    torch.testing.assert_close(logits, out, rtol=1e-8, atol=1e-10)
    labels = batch.labels[0][batch.loss_mask[0] > 0]
    assert tokenizer.decode(labels) == "Yes.<|im_end|>" * 2


def write(path, *records):
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records).encode()
    path.write_bytes(lzma.compress(text) if path.suffix == ".xz" else text)
    return path


def test_file(tokenizer, tmp_path):
    several = {"system": "s", "context": ["Red.", "Blue."],
               "questions": [{"question": "1?", "answer": "R"}, {"question": "2?", "answer": "B"}]}  # fmt: skip
    path = write(
        tmp_path / "a.jsonl", {"messages": CHAT}, "", {"context": "Red.", "question": "1?", "answer": "R"}, several
    )
    chat, one, two = read_episodes(path, tokenizer, numbered=True, **LENGTHS)
    assert answers(tokenizer, chat) == ["Yes.<|im_end|>"]
    assert answers(tokenizer, one) == ["R<|im_end|>"] and answers(tokenizer, two) == ["R<|im_end|>", "B<|im_end|>"]
    user = [{"role": "user", "content": text} for text in ("Red.", "Blue.", "1?", "2?")]
    assert tokenizer.decode(two.write_ids) == template(tokenizer, [S, *user[:2]])
    assert set(two.write_messages) == {-1, 0, 1}
    said = [S, user[2], {"role": "assistant", "content": "R"}, user[3]]
    assert tokenizer.decode(two.read_ids).startswith(template(tokenizer, said, prompt=True))


def test_tokenizer_without_template(tmp_path):
    class Letters:
        """The interface of data_prep's tokenizer."""

        def encode(self, text):
            return [ord(c) for c in text]

        def decode(self, ids):
            return "".join(map(chr, ids))

    record = {"context": ["a b", "c"], "questions": [{"question": "? x", "answer": "y"}] * 2}
    path = write(tmp_path / "a.jsonl.xz", record)
    (episode,) = read_episodes(path, Letters(), numbered=True, **LENGTHS)
    assert Letters().decode(episode.write_ids) == "a b c" and episode.write_messages.tolist() == [0, 0, 0, 1, 1]
    assert Letters().decode(episode.read_ids) == " ? x y ? x y" and answers(Letters(), episode) == [" y", " y"]


PAIR = {"context": "c", "question": "q", "answer": "a"}
BAD = {
    "{": "2: not JSON",
    "[1]": "2: want an object",
    '{"context": "c", "question": "q"}': '2: "answer" is missing',
    '{"context": "c", "questions": []}': '2: "questions" must be a list',
    '{"context": "c", "questions": [{"question": "q"}]}': r'2: "questions"\[0\] needs',
    '{"context": [], "question": "q", "answer": "a"}': '2: "context" must be a list',
    '{"context": "c", "question": " ", "answer": "a"}': '2: "question" must be text',
    '{"context": 3, "question": "q", "answer": "a"}': '2: "context" must be text',
    '{"context": "c", "question": "q", "answer": "a \\ud83d"}': r'2: "answer" holds .\\ud83d., half of',
    '{"messages": []}': '2: "messages" must be a list',
    '{"messages": [{"role": "tool", "content": "x"}]}': r'2: "messages"\[0\] needs a "role"',
    '{"messages": [{"role": "user"}]}': r'2: "messages"\[0\]: "content" must be text',
    json.dumps({"messages": [*CHAT[1:], S]}): r'2: "messages"\[4\]: only the first',
    json.dumps({"messages": CHAT[:4]}): "2: .*must end with a user message",
    json.dumps({"messages": [S, *CHAT[3:]]}): "2: nothing is told before the question",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_lines_are_named(tokenizer, tmp_path, line):
    path = write(tmp_path / "a.jsonl", PAIR, line)
    with pytest.raises(DataError, match=BAD[line]):
        read_episodes(path, tokenizer, **LENGTHS)


def test_bad_files_and_lengths_are_named(tokenizer, tmp_path):
    with pytest.raises(DataError, match="unknown format"):
        read_episodes(write(tmp_path / "a.txt", PAIR), tokenizer, **LENGTHS)
    with pytest.raises(DataError, match="holds no episode"):
        read_episodes(write(tmp_path / "b.jsonl"), tokenizer, **LENGTHS)
    (tmp_path / "c.jsonl.xz").write_bytes(b"no")
    with pytest.raises(DataError, match="damaged compression"):
        read_episodes(tmp_path / "c.jsonl.xz", tokenizer, **LENGTHS)
    for key in ("write_length", "read_length"):
        with pytest.raises(UserError, match=f"{key} = 1"):
            read_episodes(tmp_path / "b.jsonl", tokenizer, **{**LENGTHS, key: 1})
    with pytest.raises(UserError, match="recent_messages = 0"):
        read_episodes(tmp_path / "b.jsonl", tokenizer, recent_messages=0, **LENGTHS)


def test_template_that_rewrites_answers_is_refused(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*chat template"):
        read_episodes(write(tmp_path / "a.jsonl", PAIR), tokenizer, **LENGTHS)


def made(write, read, answer, first=1) -> Episode:
    ids = np.arange(first, first + write + read)
    flags = np.zeros(read, bool)
    flags[answer] = True
    return Episode(ids[:write], np.arange(write) // 2, ids[write:], flags)


def test_rows():
    a, b, c = made(3, 2, [1]), made(2, 4, [2, 3], 11), made(1, 2, [1], 21)
    rows = [[a, c], [b]]
    batch = collate(rows, 9, numbers=[4, 7])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 21, 22, 23, 0], [11, 12, 13, 14, 15, 16, 0, 0, 0]]
    where = batch.loss_mask.nonzero().tolist()
    assert where == [[0, 3], [0, 6], [1, 3], [1, 4]]
    assert [int(batch.labels[i, j]) for i, j in where] == [5, 23, 15, 16]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 6, 8, 9, 11, 15, 18] and batch.cu_seqlens.dtype == torch.int32
    assert batch.rows.tolist() == [4, 7]
    flags = batch.inputs
    assert flags.valid.sum(1).tolist() == [8, 6] and flags.reset.nonzero().tolist() == [[0, 0], [0, 5], [1, 0]]
    assert flags.write.int().tolist() == [[1, 1, 1, 0, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0]]
    assert flags.message.tolist() == [[0, 0, 1, -1, -1, 0, -1, -1, -1], [0, 0, -1, -1, -1, -1, -1, -1, -1]]
    assert collate(rows, multiple=5).tokens.shape == (2, 10)
    assert collate([[b]]).loss_mask.tolist() == [[0, 0, 0, 1, 1, 0]]  # the last token has no label
    with pytest.raises(ValueError, match="does not fit row_length = 7"):
        collate(rows, 7)


def packed_logits(model, batch):
    """Of one row, with attention inside its segments."""
    T = batch.tokens.shape[1]
    segment = torch.bucketize(torch.arange(T), batch.cu_seqlens[1:].long(), right=True)
    at = torch.arange(T) - batch.cu_seqlens.long()[segment]
    allowed = (segment[:, None] == segment) & (torch.arange(T)[:, None] >= torch.arange(T))
    mask = torch.where(allowed, 0.0, -torch.inf).double()[None, None]
    return model(batch.tokens, inputs=batch.inputs, attention_mask=mask, position_ids=at[None]).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_pass_is_two_passes(tokenizer, name):
    model = build_adapted(CONFIGS[name], base=build_base(dtype=torch.float64))
    episodes = [
        chat_episode(tokenizer, CHAT[:1] + CHAT[cut:], numbered=True, write_length=40, read_length=30 + cut)
        for cut in (1, 2)
    ]
    total, loss = sum(int(e.answer.sum()) for e in episodes), 0.0
    for e in episodes:
        told = MemoryInputs(message=torch.tensor(e.write_messages)[None])
        states = model(torch.tensor(e.write_ids)[None], inputs=told).states
        read = torch.tensor(e.read_ids)[None]
        silent = MemoryInputs(write=torch.zeros_like(read, dtype=torch.bool), message=torch.full_like(read, -1))
        logits = model(read, states=states, inputs=silent).logits[0, :-1]
        loss = loss + F.cross_entropy(logits[e.answer[1:]], read[0, 1:][e.answer[1:]], reduction="sum") / total
    wanted = torch.autograd.grad(loss, list(model.parameters()))

    batch = collate([episodes], 150)
    logits = packed_logits(model, batch)
    losses = F.cross_entropy(logits[0], batch.labels[0], reduction="none")
    packed = (losses * batch.loss_mask[0]).sum() / batch.loss_mask.sum()
    torch.testing.assert_close(packed, loss, rtol=1e-10, atol=0)
    for found, expected in zip(torch.autograd.grad(packed, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
