"""Mixtures as training reads them: the share of each source in 10M tokens of real rows, and inside every stage."""

import json
import random

import numpy as np
import pytest

from megatron_dla.data import TokenLoader
from megatron_dla.data_prep.shards import build_shards
from megatron_dla.data_prep.tokenizer import Tokenizer, train_tokenizer

# digits, each a token, that tell the source of a row; and how many a document has
DIGITS = {"a": "012", "b": "345", "c": "678"}
LENGTHS = {"a": (1, 9), "b": (100, 500), "c": (5_000, 20_000)}
SEQ_LEN, ROWS, STREAMS, TOTAL = 2048, 32, 8, 10**7
MIX = {"a": 0.5, "b": 0.15, "c": 0.35}
EVEN, LAST = {"a": 1, "b": 1, "c": 1}, {"b": 7, "c": 3}
STAGES = [(0, MIX), (4 * 10**6, EVEN), (7 * 10**6, LAST)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("letters"), random.Random(0)
    for letter, (least, most) in LENGTHS.items():
        left, documents = 200_000, []
        while left > 0:
            documents.append("".join(rng.choices(DIGITS[letter], k=rng.randint(least, most))))
            left -= len(documents[-1])
        (root / f"{letter}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    train_tokenizer([root / f"{letter}.jsonl" for letter in LENGTHS], root / "tok", 269)
    for letter in LENGTHS:
        build_shards(
            [root / f"{letter}.jsonl"], root / "tok", root / letter, workers=1, min_train_shards=8, val_fraction=0
        )
    return {letter: root / letter for letter in LENGTHS}


def shares(tokens):
    return {letter: tokens[letter] / sum(tokens.values()) for letter in LENGTHS}


@pytest.mark.parametrize(("packing", "stages"), [("concat", [(0, MIX)]), ("concat", STAGES), ("best_fit", STAGES)])
def test_realised_mix_of_real_rows(sources, packing, stages):
    """Within 0.5 % of the weights after 10M tokens, and inside every stage."""
    tokenizer = Tokenizer(next(iter(sources.values())))
    letter_of = np.full(tokenizer.vocab_size, "", dtype="U1")
    for letter, digits in DIGITS.items():
        letter_of[[tokenizer.encode("0" + digit)[-1] for digit in digits]] = letter
    loaders = [
        TokenLoader(
            sources, seq_len=SEQ_LEN, global_batch_size=ROWS, micro_batch_size=8, num_streams=STREAMS, dp_rank=rank,
            dp_size=2, packing=packing, stages=stages, prefetch_rows=64, verify="size",
        )
        for rank in range(2)
    ]  # fmt: skip
    counted = [dict.fromkeys(LENGTHS, 0) for _ in stages]
    while loaders[0].tokens_seen < TOTAL:
        tokens = counted[sum(start <= loaders[0].tokens_seen for start, _ in stages) - 1]
        for batch in (batch for one in loaders for batch in one.next_step()):
            for row in batch.tokens.numpy():
                (letter,) = set(letter_of[np.unique(row)]) - {""}
                tokens[letter] += int((row != 0).sum())  # 0: padding
    for (_, weights), tokens in zip(stages, counted, strict=True):
        want = {letter: weights.get(letter, 0) / sum(weights.values()) for letter in LENGTHS}
        assert shares(tokens) == pytest.approx(want, abs=0.005)
    report = loaders[0].report(np.sum([one.counts() for one in loaders], axis=0).tolist())
    assert report["mix"] == pytest.approx(shares(counted[-1]), abs=1e-3)
    for one in loaders:
        one.close()
