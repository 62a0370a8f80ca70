"""Tokenizer: nothing is lost, bytes add up, training repeats exactly, errors name the way out."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dla.data_prep.encoders import WINDOW
from megatron_dla.data_prep.tokenizer import Tokenizer, _pieces, _sample, train_tokenizer
from megatron_dla.errors import DataError

WORDS = [
    "hello",
    "world",
    "tab\tq",
    "foo  bar",
    "x\u2581y",
    "\xe9t\xe9",
    "12345",
    "\n",
    "\r\n",
    "  in",
    "out  ",
    "\U0001f600",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_bytes(" ".join(rng.choice(WORDS) for _ in range(3000)).encode())
    return path


@pytest.fixture(scope="module")
def tokenizer(corpus, tmp_path_factory):
    return train_tokenizer([corpus], tmp_path_factory.mktemp("tok"), 330)


CASES = [
    "", " ", "   ", "  lead", "trail  ", "a \t b\t\t", "\n", "\r\n", "a\r\nb\rc\n\n", "\x00", "\x01\x1b\x7f\x85\u2028",
    "\u2581", "a\u2581b \u2581\u2581 ", "\u2585\u2047", "\U0001f600\U0001f468\u200d\U0001f469",
    "e\u0301\xe9\u3000\xa0\ufeff",
    "<s></s><unk><0x0A>", "\U0010ffff\ue000", "12345 x=6.7e-8", "\u4f60\u597d \u0645\u0631\u062d\u0628\u0627",
]  # fmt: skip


@pytest.mark.parametrize("text", CASES)
def test_round_trip_of_hard_texts(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from([*WORDS, " ", "\u2581"])), max_size=12).map("".join))
def test_round_trip_and_bytes_of_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())
    assert not {0, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_long_text_is_encoded_in_windows_without_loss(tokenizer):
    for text in ("hello world\n" * 12000, "x" * (2 * WINDOW + 5), "\u2581" * 3 + " " * (WINDOW + 1)):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_token_bytes_shape_and_specials(tokenizer):
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,) == (330,) and sizes.dtype == np.int32
    assert sizes[:3].tolist() == [0, 0, 0] and (sizes[3:] > 0).all()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_training_repeats_exactly_and_loads_again(tokenizer, corpus, tmp_path):
    again = train_tokenizer([corpus], tmp_path, 330)
    assert again.sha256 == tokenizer.sha256 == Tokenizer(tmp_path).sha256
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
    sampled = [train_tokenizer([corpus], tmp_path / str(i), 300, input_sentence_size=2, seed=5).sha256 for i in (1, 2)]
    assert sampled[0] == sampled[1]


def test_training_pieces_lose_nothing_and_stay_short():
    text = "line\n\n" * 2000 + "\U0001f600" * 5000 + " end"
    pieces = list(_pieces(text))
    assert "".join(pieces) == text and max(len(piece.encode()) for piece in pieces) <= 4000
    kept, total = _sample((str(i) for i in range(1000)), 50, seed=1)
    assert total == 1000 and len(set(kept)) == 50 and sum(int(i) >= 500 for i in kept) > 10


def test_vocabulary_too_large_names_the_largest(corpus, tmp_path):
    with pytest.raises(DataError, match=r"vocab_size = 9000: .* at most \d+") as caught:
        train_tokenizer([corpus], tmp_path, 9000)
    largest = int(str(caught.value).split("at most ")[1].split(";")[0])
    assert train_tokenizer([corpus], tmp_path, largest).vocab_size == largest


def test_other_training_errors(corpus, tmp_path):
    with pytest.raises(DataError, match=r"vocab_size = 262: .* \d+; raise --vocab-size"):
        train_tokenizer([corpus], tmp_path, 262)
    with pytest.raises(DataError, match=r"vocab_size = 100: .* 260"):
        train_tokenizer([corpus], tmp_path, 100)
    empty = tmp_path / "e.txt"
    empty.write_text("")
    with pytest.raises(DataError, match=r"e.txt: "):
        train_tokenizer([empty], tmp_path, 300)
    assert not (tmp_path / "tokenizer.model").exists()
    train_tokenizer([corpus], tmp_path, 300)
    with pytest.raises(DataError, match="--overwrite"):
        train_tokenizer([corpus], tmp_path, 300)


@pytest.mark.parametrize("text", ["\0" * 9, "\u2581" * 9])
def test_text_of_characters_that_sentencepiece_ignores(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": text}))
    with pytest.raises(DataError, match="no text in these inputs"):
        train_tokenizer([str(tmp_path / "x.jsonl")], str(tmp_path / "out"), vocab_size=400)
    assert not (tmp_path / "out").exists()


def test_loading_errors(tmp_path, corpus):
    import sentencepiece

    with pytest.raises(DataError, match=r"none.model: "):
        Tokenizer(tmp_path / "none.model")
    for content in (b"not a model", b"", b"\0" * 64):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(DataError, match=r"tokenizer.model: .*dla data tokenizer"):
            Tokenizer(tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "endless"), vocab_size=60, model_type="bpe", eos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"endless.model: .*dla data tokenizer"):
        Tokenizer(tmp_path / "endless.model")
    (tmp_path / "tokenizer.model").unlink()
    for content in ("", "{}", "[]", "junk", '{"model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizer.json"):
            Tokenizer(tmp_path)


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(DataError, match="character 1 "):
        tokenizer.encode("a\ud800")


def words(path, lines):
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def random_lines(alphabet, length, count, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choice(alphabet) for _ in range(length)) for _ in range(count)]


HANZI = [chr(0x4E00 + i) for i in range(600)]


@pytest.mark.parametrize(
    ("alphabet", "length", "vocab_size", "spaced"),
    [("ACGT", 80, 320, 0), (HANZI, 100, 1000, 0), (HANZI, 100, 1000, 20_000), (["\u3042", "\u30ab"], 60, 320, 0)],
)
def test_text_without_spaces(tmp_path, alphabet, length, vocab_size, spaced):
    lines = random_lines(alphabet, length, 400)
    if spaced:
        lines[::spaced] = [line + " " + line for line in lines[::spaced]]
    made = train_tokenizer([words(tmp_path / "c.jsonl", lines)], tmp_path, vocab_size)
    for text in (" ", "a b", lines[0] + " " + lines[1]):
        assert made.decode(made.encode(text)) == text
    assert made.losses == () and len(made.encode(" ")) == 1
    assert len(made.encode(lines[1])) < len(lines[1].encode()) / 1.5


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("character", ["\u2585", "\u2581", "\x00", "\u2047", "<unk>", "</s>", "\t"])
def test_characters_that_sentencepiece_reserves(tmp_path, capsys, character, share):
    lines = [f"hello {character} w{character}orld" if i % share == 0 else f"same words {i % 9}" for i in range(500)]
    made = train_tokenizer([words(tmp_path / "c.jsonl", lines)], tmp_path, 270 + 6 * share)
    assert made.decode(made.encode(lines[0])) == lines[0] and made.losses == ()
    pieces = " ".join(made.decode([i]) for i in range(259, made.vocab_size))
    assert "el" in pieces or "wo" in pieces or "or" in pieces  # the lines were not dropped
    noted = "U+2581 or U+2585" in capsys.readouterr().err
    assert noted == (character in "\u2581\u2585")
