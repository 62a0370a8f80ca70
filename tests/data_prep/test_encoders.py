"""Published tokenizers: sentencepiece models with a dummy prefix or normalisation, and tokenizer.json."""

import io
import itertools
import json
import random

import pytest
import sentencepiece
from tokenizers import Tokenizer as Core
from tokenizers import models

from megatron_dla.cli import main
from megatron_dla.data_prep import encoders
from megatron_dla.data_prep.bpe_form import export_note
from megatron_dla.data_prep.tokenizer import Tokenizer, train_tokenizer
from megatron_dla.errors import CheckpointError, DataError
from megatron_dla.hf.fast_tokenizer import write_tokenizer
from megatron_dla.shard_index import ShardIndex
from tests.support.byte_level import byte_level

RNG = random.Random(0)
WORDS = ["hello", "world", "\xe9t\xe9", "12345", "quick.\n", "brown", "  fox"]
LINES = [" ".join(RNG.choice(WORDS) for _ in range(12)) for _ in range(300)]
TEXTS = ["", " ", "a", " a", "  two  spaces ", "\n\ttab", *LINES[:20], "x</s><|endoftext|>y", "\U0001f600 \u4f60"]


def sentencepiece_model(**options):
    model = io.BytesIO()
    bytewise = options.get("model_type") != "unigram" and options.get("byte_fallback", True)
    fixed = dict(sentence_iterator=iter(LINES), model_writer=model, vocab_size=300 if bytewise else 33, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(**{**fixed, "model_type": "bpe", "byte_fallback": bytewise, **options})
    return model.getvalue()


# as in Llama 2 and Mistral
PREFIXED = dict(normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True)


def test_dummy_prefix_loses_nothing(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**PREFIXED))
    tokenizer, sp = (
        Tokenizer(tmp_path),
        sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")),
    )
    assert tokenizer.losses == () and not tokenizer.exact_bytes
    for text in [*TEXTS, "a\u2581b \u2581"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        if "\u2581" not in text:
            assert ids == sp.encode(text)
            assert tokenizer.token_bytes()[ids].sum() == len(text.encode()) + bool(text)
    long = "hello world\n" * 9000 + "x" * 2 * encoders.WINDOW
    assert tokenizer.decode(tokenizer.encode(long)) == long


def test_a_dummy_prefix_goes_into_exports(tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**PREFIXED))
    (tmp_path / "out").mkdir()
    tokens = write_tokenizer(tmp_path / "out", tmp_path / "tokenizer.model", 320)
    tokenizer, hf = Tokenizer(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    for text in TEXTS[:-2]:
        assert hf(text)["input_ids"] == tokenizer.encode(text) and hf.decode(hf(text)["input_ids"]) == text
    assert (tokens.eos, tokens.pad) == (2, 300) and export_note(tokenizer) == ""


NORMALISING = [{}, {"model_type": "unigram"}, {"byte_fallback": False}, {"add_dummy_prefix": False}]


@pytest.mark.parametrize("options", NORMALISING)
def test_normalisation_is_stated(tmp_path, options, capsys):
    """T5's: nmt_nfkc and single spaces; without bytes, unknown characters are lost as well."""
    model = sentencepiece_model(**options)
    (tmp_path / "tokenizer.model").write_bytes(model)
    tokenizer = Tokenizer(tmp_path)
    lost = dict(tokenizer.losses)
    assert not lost["trail  "].endswith(" ") and "" not in lost
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert all(tokenizer.encode(text) == sp.encode(text) for text in TEXTS)
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in ["clean", *LINES]))
    build = ["data", "shards", "--input", str(tmp_path / "c.jsonl"), "--tokenizer", str(tmp_path), "--workers", "1"]
    assert main([*build, "--output", str(tmp_path / "out")]) == 0
    changed = json.loads((tmp_path / "out" / "report.json").read_text())["changed_by_tokenizer"]
    assert 0 < changed == sum(sp.decode(sp.encode(line)) != line for line in ["clean", *LINES])
    printed = capsys.readouterr().err
    assert (
        f"{changed} of these documents" in printed and f"note: {tmp_path / 'tokenizer.model'} has no equal" in printed
    )
    (tmp_path / "export").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer.model'.*dla data tokenizer"):
        write_tokenizer(tmp_path / "export", tmp_path / "tokenizer.model", 320)
    assert main(["data", "verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("prefix", [False, True])
def test_tokenizer_json(tmp_path, prefix):
    core = byte_level(tmp_path, LINES, prefix)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.vocab_size == 281 and tokenizer.eos_id == 0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert 0 not in ids  # an end token that a text spells is text
        if "<|" not in text:
            assert ids == core.encode(text, add_special_tokens=False).ids
        if not prefix:
            assert tokenizer.decode(ids) == text
            assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert [probe for probe, _ in tokenizer.losses if "e\u0301" in probe] != []  # NFC
    long = "hello  world, 12345.\n" * 9000 + "end"
    assert tokenizer.encode(long) == core.encode(long, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_long_documents_are_encoded_in_parts(tmp_path, kind):
    if kind == "tokenizer.json":
        core = byte_level(tmp_path, LINES)
    else:
        (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
        train_tokenizer([tmp_path / "c.jsonl"], tmp_path, 290)
    tokenizer = Tokenizer(tmp_path / kind)
    text = "\u2581one two three.\n" * 15_000
    parts = list(tokenizer.parts(text))
    ids = list(itertools.chain(*parts))
    assert len(parts) > 3 and max(map(len, parts)) < len(ids) / 3 and tokenizer.decode(ids) == text
    if kind == "tokenizer.json":
        assert ids == core.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("between", ["\n\n", " ", "\r\n", ""])
def test_texts_without_a_line_to_cut_at_are_encoded_in_parts_too(tmp_path, monkeypatch, between):
    core = byte_level(tmp_path, LINES)
    monkeypatch.setattr(encoders, "WINDOW", 1000)
    monkeypatch.setattr(encoders, "_LONGEST", 4000)
    text = between.join(["quick brown fox" if between else "quickbrownfox"] * 2000)
    parts = list(Tokenizer(tmp_path / "tokenizer.json").parts(text))
    ids = list(itertools.chain(*parts))
    assert len(parts) >= len(text) // 4000 and core.decode(ids) == text
    if between:
        assert ids == core.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model", "dummy prefix"])
def test_short_texts_encoded_together_have_the_ids_of_each(tmp_path, kind):
    byte_level(tmp_path, LINES)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(**PREFIXED if kind == "dummy prefix" else {}))
    tokenizer = Tokenizer(tmp_path / (kind if "." in kind else "tokenizer.model"))
    texts = [*TEXTS, "\u2581 a", "x y\n" * 2000, "b"]
    together = [list(itertools.chain(*parts)) for parts in tokenizer.parts_of_each(texts)]
    assert together == [tokenizer.encode(text) for text in texts]


def test_the_end_of_a_document_is_that_of_the_directory(tmp_path):
    core = byte_level(tmp_path, LINES)
    core.add_special_tokens(["<|im_end|>", "<|stop|>"])
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": [282, 0]}')
    assert Tokenizer(tmp_path).eos_id == 282
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|im_end|>", "special": true}}')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.eos_id == core.token_to_id("<|im_end|>")
    for name, content in tokenizer.files().items():
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert Tokenizer(tmp_path / "copy").eos_id == tokenizer.eos_id
    for value in ('"<|im_ned|>"', "100000"):  # not taken for another one
        (tmp_path / "copy/tokenizer_config.json").write_text(f'{{"eos_token": {value}}}')
        with pytest.raises(DataError, match=r"tokenizer_config.json: eos_token = .*(im_ned|100000)"):
            Tokenizer(tmp_path / "copy")
    (tmp_path / "copy/tokenizer_config.json").unlink()
    core = Core(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    core.save(str(tmp_path / "copy" / "tokenizer.json"))
    with pytest.raises(DataError, match=r"tokenizer.json: .*tokenizer_config.json.*eos_token"):
        Tokenizer(tmp_path / "copy")


def test_shards_and_export_of_a_tokenizer_json(tmp_path, capsys):
    from transformers import AutoTokenizer

    byte_level(tmp_path / "hf", LINES)
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXTS))
    build = ["data", "shards", "--input", str(tmp_path / "c.jsonl"), "--tokenizer", str(tmp_path / "hf")]
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.model").write_bytes(b"of an earlier build")
    assert main([*build, "--output", str(out), "--workers", "2"]) == 0
    assert "to-hf" not in capsys.readouterr().err
    assert main(["data", "verify", str(out)]) == 0
    index, tokenizer = ShardIndex.load(out), Tokenizer(out)
    assert (index.tokenizer_sha256, index.vocab_size, index.eos_id) == (tokenizer.sha256, 281, 0)
    assert sorted(path.name for path in out.glob("tokenizer*")) == ["tokenizer.json", "tokenizer_config.json"]
    (tmp_path / "export").mkdir()
    tokens = write_tokenizer(tmp_path / "export", out / "tokenizer.json", 288)
    hf = AutoTokenizer.from_pretrained(str(tmp_path / "export"))
    for text in TEXTS[:-2]:
        assert hf(text)["input_ids"] == tokenizer.encode(text)
    assert (tokens.eos, tokens.pad, tokens.size) == (0, 281, 281) and hf.pad_token_id == 281


def test_a_vocabulary_of_words_without_an_unknown_token_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    Core(models.WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="[UNK]")).save(str(path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot encode every text .*unknown token"):
        Tokenizer(path)
