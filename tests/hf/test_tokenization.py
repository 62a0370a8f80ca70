"""The exported tokenizer gives the ids that the training data was made with, and loses nothing."""

import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

TEXTS = [
    "", " ", "  lead", "trail  ", "a \t b\t\t", "\n", "\r\n", "\x00", "\x01\x1b\x7f\x85\u2028", "\u2581",
    "a\u2581b \u2581\u2581 ", "\u2585\u2047", "\U0001f600\U0001f468\u200d\U0001f469", "e\u0301\xe9\u3000\xa0\ufeff",
    "<s></s><unk><0x0A>", "\U0010ffff\ue000", "12345 x=6.7e-8", "hello world the quick brown fox\n" * 3,
]  # fmt: skip


@pytest.fixture(scope="module")
def exported_tokenizer(exported):
    return AutoTokenizer.from_pretrained(exported("mamba2").directory, trust_remote_code=True)


def same(exported_tokenizer, tokenizer, text):
    ids = exported_tokenizer(text)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert exported_tokenizer.decode(ids) == text
    assert exported_tokenizer.convert_tokens_to_ids(exported_tokenizer.tokenize(text)) == ids


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_hard_texts(exported_tokenizer, tokenizer, text):
    same(exported_tokenizer, tokenizer, text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(["hello", " ", "\u2581", "</s>"]))).map("".join))
def test_ids_of_any_text(exported_tokenizer, tokenizer, text):
    same(exported_tokenizer, tokenizer, text)


def test_long_text_is_cut_where_the_data_tools_cut_it(exported_tokenizer, tokenizer):
    same(exported_tokenizer, tokenizer, "hello world " * 6000 + "x" * 70_000)


def test_special_tokens(exported_tokenizer, tokenizer):
    hf = exported_tokenizer
    assert (hf.unk_token_id, hf.bos_token_id, hf.eos_token_id, hf.pad_token_id) == (0, 1, 2, 2)
    assert hf.vocab_size == len(hf) == tokenizer.vocab_size
    ids = [*tokenizer.encode("hello"), hf.eos_token_id]
    assert hf.decode(ids) == "hello</s>" and hf.decode(ids, skip_special_tokens=True) == "hello"
    assert hf("</s>", split_special_tokens=False)["input_ids"] == [2]
    assert hf.decode(2) == "</s>"


def test_batches_are_padded_on_the_left(exported_tokenizer):
    batch = exported_tokenizer(["hello", "hello world 1"], padding=True, return_tensors="pt")
    length = len(exported_tokenizer("hello")["input_ids"])
    assert batch["attention_mask"][0].tolist()[-length:] == [1] * length
    assert batch["attention_mask"][0, 0] == 0 and batch["input_ids"][0, 0] == 2


def test_pickle_and_save(exported_tokenizer, tmp_path):
    text = "hello \u2581 </s>"
    again = pickle.loads(pickle.dumps(exported_tokenizer))
    exported_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    want = exported_tokenizer(text)["input_ids"]
    assert again(text)["input_ids"] == want and loaded(text)["input_ids"] == want


def test_what_is_not_text(exported_tokenizer):
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        exported_tokenizer("ab\ud800")
    with pytest.raises(ValueError, match="outside the vocabulary"):
        exported_tokenizer.decode([383])
