"""The exported tokenizer gives the ids that the training data was made with, and loses nothing."""

import io
import pickle
import random
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from megatron_dla.hf.fast_tokenizer import write_tokenizer
from megatron_dla.serving.stream import TextStream

TEXTS = [
    "", " ", "  lead", "trail  ", "a \t b\t\t", "\n", "\r\n", "\x00", "\x01\x1b\x7f\x85\u2028", "\u2581",
    "a\u2581b \u2581\u2581 ", "\u2585\u2047", "\U0001f600\U0001f468\u200d\U0001f469", "e\u0301\xe9\u3000\xa0\ufeff",
    "<s></s><unk><pad><0x0A>", "\U0010ffff\ue000\ufdd0", "12345 x=6.7e-8", "hello world the quick brown fox\n" * 3,
    " </s> ", "a</s>", "x <pad>y",
]  # fmt: skip
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def hf(exported):
    """A fresh tokenizer of an export."""
    return AutoTokenizer.from_pretrained(exported("mamba2").directory, trust_remote_code=True)


@pytest.fixture(scope="module")
def exported_tokenizer(exported):
    return AutoTokenizer.from_pretrained(exported("mamba2").directory, trust_remote_code=True)


def same(hf, tokenizer, text):
    """The ids of the shards where special tokens are not read out of the text; no text is lost either way."""
    ids = hf(text, split_special_tokens=True)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert hf.decode(ids) == text
    assert hf.decode(hf(text)["input_ids"]) == text
    assert hf.convert_tokens_to_ids(hf.convert_ids_to_tokens(ids)) == ids


@pytest.mark.parametrize("text", TEXTS)
def test_ids_of_hard_texts(exported_tokenizer, tokenizer, text):
    same(exported_tokenizer, tokenizer, text)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(["hello", " ", "\u2581", "</s>"]))).map("".join))
def test_ids_of_any_text(exported_tokenizer, tokenizer, text):
    same(exported_tokenizer, tokenizer, text)


def test_long_text_is_cut_where_the_data_tools_cut_it(exported_tokenizer, tokenizer):
    same(exported_tokenizer, tokenizer, "hello world " * 6000 + "x" * 70_000)
    same(exported_tokenizer, tokenizer, "hello\n" * 30 + "x" * 65_000 + " hello" * 20_000)
    same(exported_tokenizer, tokenizer, "x" + "he" * 70_000)  # "he" is a token: cut through the middle
    same(exported_tokenizer, tokenizer, "\n" + "x" * 20_000 + "\nx" + "he" * 40_000)


def test_special_tokens(hf, tokenizer):
    assert (hf.unk_token_id, hf.bos_token_id, hf.eos_token_id, hf.pad_token_id) == (None, None, 2, 300)
    assert hf.is_fast and hf.vocab_size == tokenizer.vocab_size == len(hf) - 1
    ids = [*tokenizer.encode("hello"), hf.eos_token_id]
    assert hf.decode(ids) == "hello</s>" and hf.decode(ids, skip_special_tokens=True) == "hello"
    assert hf("hello</s>")["input_ids"] == ids and hf.decode(2) == "</s>"


def test_offsets(hf):
    text = "hello \U0001f600 world"
    batch = hf(text, return_offsets_mapping=True)
    covered = {i for a, b in batch["offset_mapping"] for i in range(a, b)}
    assert covered == set(range(len(text)))
    words = hf(["hello", "world", "the"], is_split_into_words=True).word_ids()
    assert sorted(set(words)) == [0, 1, 2]


def test_batches_are_padded_on_the_left(hf):
    batch = hf(["hello", "hello world 1"], padding=True, return_tensors="pt")
    length = len(hf("hello")["input_ids"])
    assert batch["attention_mask"][0].tolist()[-length:] == [1] * length
    assert batch["attention_mask"][0, 0] == 0 and batch["input_ids"][0, 0] == hf.pad_token_id


def test_a_collator_keeps_the_labels_of_eos(hf):
    """With pad = eos, no model would ever learn to stop."""
    rows = [hf(text + hf.eos_token) for text in ("hello", "hello world 1")]
    labels = DataCollatorForLanguageModeling(hf, mlm=False)(rows)["labels"]
    assert labels[:, -1].tolist() == [2, 2] and int(labels[0, 0]) == -100


def test_added_tokens_and_a_chat_template(hf):
    hf.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    hf.add_tokens(["DNA1"])
    assert hf("x<|im_start|>DNA1")["input_ids"][-2:] == [301, 303]
    hf.chat_template = CHATML
    ids = hf.apply_chat_template([{"role": "user", "content": "hello </s>"}])["input_ids"]
    assert [i for i in ids if i == 2 or i > 300] == [301, 2, 302]
    assert hf.decode(ids) == "<|im_start|>user\nhello </s><|im_end|>\n"


def test_pickle_and_save(exported_tokenizer, tmp_path):
    text = "hello \u2581 </s>"
    again = pickle.loads(pickle.dumps(exported_tokenizer))
    exported_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    want = exported_tokenizer(text)["input_ids"]
    assert again(text)["input_ids"] == want and loaded(text)["input_ids"] == want


def test_what_is_not_text(exported_tokenizer):
    with pytest.raises(TypeError):
        exported_tokenizer("ab\ud800")


def test_an_embedding_without_a_spare_row_pads_with_unk(tokenizer, tmp_path):
    tokens = write_tokenizer(tmp_path, tokenizer.path, tokenizer.vocab_size)
    assert (tokens.pad, tokens.unused) == (0, ())
    hf = AutoTokenizer.from_pretrained(tmp_path)
    assert hf.pad_token_id == 0 and hf.decode(hf(TEXTS[14])["input_ids"]) == TEXTS[14]


@pytest.mark.parametrize("resize", [None, 302, 400])
def test_only_ids_that_stand_for_nothing_are_suppressed(exported, resize):
    """A token that was added to the tokenizer can be generated after training, or after a resize."""
    model = exported("mamba2").load()
    rest = list(range(302, 384))
    assert model.generation_config.suppress_tokens == [300, 301, *rest]
    if resize:
        model.resize_token_embeddings(resize, pad_to_multiple_of=64)
        rest = list(range(resize, 320 if resize == 302 else 448))
    else:
        model.train()(torch.tensor([[5, 301]]), labels=torch.tensor([[-100, 301]]))
    assert model.generation_config.suppress_tokens == [300, *rest]


def test_a_stream_prints_each_character_once(exported_tokenizer):
    """A run of byte tokens decodes to nothing but replacement characters until its last character is whole."""
    out, text = io.StringIO(), "a\U0001f680\U0001f681\xe9 b\U0001f682"
    stream, printed = TextStream(exported_tokenizer, out), [""]
    for token in exported_tokenizer(text)["input_ids"]:
        stream.put(token)
        printed.append(out.getvalue())
        assert text.startswith(printed[-1]) and printed[-1].startswith(printed[-2])
    stream.end()
    assert out.getvalue() == stream.text == text


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_decodes_a_few_tokens_at_a_time(exported_tokenizer, seed):
    class Counting:
        def decode(self, ids, **options):
            longest.append(len(ids))
            return exported_tokenizer.decode(ids, **options)

    def joined(text):  # how many \ufffd a run of bytes gives depends on how much of it is decoded
        return re.sub("\ufffd+", "\ufffd", text)

    r, longest, want = random.Random(seed), [], ""
    text = " ".join("".join(r.choice("abchello \xe9\u2581\U0001f680  .") for _ in range(9)) for _ in range(40))
    ids = exported_tokenizer(text)["input_ids"]
    # end tokens, which are not shown, and bytes that are no character
    ids = [x for token in ids for x in ([token, r.choice([2, 2, 135])] if r.random() < 0.05 else [token])]
    stream = TextStream(Counting(), io.StringIO())
    for number, token in enumerate(ids, 1):
        stream.put(token)
        whole = exported_tokenizer.decode(ids[:number], skip_special_tokens=True).rstrip("\ufffd")
        want += whole[len(want) :]
        assert joined(stream.text) == joined(want)
    assert max(longest) < 40 < len(ids)
    stream.end()
    assert joined(stream.text) == joined(want + exported_tokenizer.decode(ids, skip_special_tokens=True)[len(want) :])
