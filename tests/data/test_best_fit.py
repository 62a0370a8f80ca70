"""Best-fit packing: nothing that fits is cut, nothing is lost or doubled, few positions are padding."""

import numpy as np
import pytest

from megatron_dla.data import ShardReader, TokenStream
from megatron_dla.data.best_fit import BestFitStream, best_fit
from tests.support.rows import ROWS, STREAMS, T, global_steps, loader, ranks

EOS = 2


def random_ends(seed, seq_len):
    rng = np.random.default_rng(seed)
    sizes = rng.choice([1, 2, seq_len // 3 + 1, seq_len, seq_len + 1, seq_len + 2, 2 * seq_len + 1, 5 * seq_len], 60)
    return np.cumsum(np.maximum(1, sizes - rng.integers(0, 3, 60)))


def plain_rows(sizes, space):
    """Best-fit decreasing by search: the least space left of every row."""
    left = []
    for size in sorted(sizes, reverse=True):
        fitting = [n for n in left if n >= size]
        if fitting:
            left[left.index(min(fitting))] -= size
        else:
            left.append(space - size)
    return sorted(left)


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16])
def test_pieces_cover_each_document_once_and_fit(seq_len):
    for seed in range(20):
        ends = random_ends(seed, seq_len)
        starts = np.concatenate([[0], ends[:-1]])
        packed = best_fit(ends, seq_len)
        sizes = packed.stops - packed.starts
        used = np.add.reduceat(sizes, packed.edges[:-1])
        assert used.max() <= seq_len + 1 and sizes.min() >= 1 and packed.edges[-1] == len(sizes)
        pieces = sorted(zip(packed.starts.tolist(), packed.stops.tolist(), packed.cut.tolist(), strict=True))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            mine = [piece for piece in pieces if start <= piece[0] < end]
            assert mine[0][0] == start and mine[-1][1] == end
            assert [piece[2] for piece in mine] == [False] * (len(mine) - 1) + [len(mine) > 1]
            assert (len(mine) == 1) == (end - start <= seq_len + 1)
            for (_, stop, _), (first, _, _) in zip(mine, mine[1:], strict=False):
                assert stop == first + 1  # the label of one row is the first token of the next
        rests = [end - start for start, end, cut in pieces if cut or end in ends]
        full = len(packed.edges) - 1 - len(plain := plain_rows(rests, seq_len + 1))
        assert sorted((seq_len + 1 - used).tolist()) == sorted([0] * full + plain)


def read_epoch(stream):
    rows = []
    while not stream.ended:
        rows.append(stream.next_row())
    assert stream.next_row() is None
    return rows


def documents_of(row):
    """The tokens of each segment of a row with the last label, without padding."""
    real = int(np.flatnonzero(row.labels).max()) + 1 if row.labels.any() else 0
    tokens = np.concatenate([row.tokens[:real], row.labels[real - 1 : real]])
    cuts = [start for start in row.document_starts if 0 < start < real]  # at `real`, padding begins
    return np.split(tokens, cuts)


def test_an_epoch_has_every_document_once_and_the_next_another_order(made):
    reader = ShardReader(made, "train")
    stored = [document for shard in reader.shards for document in reader.read(shard).split()]
    whole = sorted(tuple(document.tolist()) for document in stored if len(document) <= T + 1)
    seen = []
    for j in range(STREAMS):
        stream = BestFitStream(reader, j, STREAMS, seq_len=T, seed=0, max_epochs=1)
        seen += (rows := read_epoch(stream))
        again = BestFitStream(reader, j, STREAMS, seq_len=T, seed=0, max_epochs=2)
        assert [row.tokens.tolist() for row in read_epoch(again)[len(rows) :]] != [row.tokens.tolist() for row in rows]
    found = [tuple(part.tolist()) for row in seen for part in documents_of(row)]
    assert sorted(document for document in found if document in set(whole)) == whole
    labels = sum(int(row.loss_mask.sum()) for row in seen)
    assert labels == sum(len(document) - 1 for document in stored)  # each token but a document's first, once


def test_the_rows_of_a_shard_have_another_order_in_each_epoch_and_with_each_seed(made):
    def rows_of_shards(seed):
        """Of each shard and epoch, the padding of its rows: another order of its documents leaves the set the same."""
        stream = BestFitStream(ShardReader(made, "train"), 0, 1, seq_len=T, seed=seed, max_epochs=2)
        rows, before = {}, 0
        while not stream.ended:
            key = int(stream.reader.order(seed, stream.epoch)[stream.shard]), stream.epoch
            stream.next_row()
            rows.setdefault(key, []).append(stream.padding - before)
            before = stream.padding
        return rows

    rows, others = rows_of_shards(0), rows_of_shards(1)
    for again in ({shard: rows[shard, 1] for shard, _ in rows}, {shard: others[shard, 0] for shard, _ in rows}):
        assert all(sorted(part) == sorted(rows[shard, 0]) for shard, part in again.items())
        assert any(part != rows[shard, 0] for shard, part in again.items())


def test_counts_are_those_of_the_rows(made):
    reader = ShardReader(made, "train")
    stored = [len(document) for shard in reader.shards for document in reader.read(shard).split()]
    packed = BestFitStream(reader, 0, 1, seq_len=T, seed=0, max_epochs=1)
    rows = read_epoch(packed)
    assert packed.documents == len(stored) and packed.tokens == sum(stored)
    assert packed.cut == sum(size > T + 1 for size in stored) > 0
    assert packed.padding == sum(T - max(0, sum(map(len, documents_of(row))) - 1) for row in rows)
    joined = TokenStream(reader, 0, 1, seq_len=T, seed=0)
    windows = [joined.next_row() for _ in range(sum(stored) // T)]
    tokens = np.concatenate([row.tokens for row in windows])
    ends = np.flatnonzero(tokens == EOS)
    first = np.concatenate([[0], ends[:-1] + 1])
    assert joined.documents == len(ends) and joined.padding == 0 and joined.tokens == len(tokens)
    assert joined.cut == sum(first // T != ends // T) > packed.cut


def test_resume_at_any_row(made):
    reader = ShardReader(made, "train")
    stream = BestFitStream(reader, 1, STREAMS, seq_len=T, seed=0)
    states, rows = [], []
    while stream.epoch < 2:
        states.append(stream.state_dict())
        rows.append(stream.next_row())
    for i, state in enumerate(states):
        resumed = BestFitStream(reader, 1, STREAMS, seq_len=T, seed=0)
        resumed.load_state_dict(state)
        for got, want in zip([resumed.next_row() for _ in range(2)], rows[i : i + 2], strict=False):
            assert all(np.array_equal(x, y) for x, y in zip(got, want, strict=True))


def test_global_rows_do_not_depend_on_the_number_of_ranks(made):
    want = global_steps(ranks(made, 1, packing="best_fit"), 30)
    assert want.equal(global_steps(ranks(made, 4, packing="best_fit", prefetch_rows=8), 30))
    one = loader(made, packing="best_fit")
    global_steps([one], 30)
    report = one.report(one.counts())
    documents, cut, padding = (
        sum(getattr(stream.sources["data"], name) for stream in one.streams.values())
        for name in ("documents", "cut", "padding")
    )
    assert report == {"padding_share": padding / (30 * ROWS * T), "cut_share": cut / documents}
    one.load_state_dict(loader(made, packing="best_fit").state_dict())
    global_steps([one], 30)
    assert one.report(one.counts()) == report
