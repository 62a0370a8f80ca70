"""Packing: rows overlap by one, documents are kept apart, padding never counts."""

import numpy as np
import torch

from megatron_dla.data.packing import make_batch, pack_row, pad_row

EOS = 2


def test_row_positions_and_mask():
    row = pack_row(np.array([5, 6, EOS, 7, EOS, 8, 9], dtype=np.uint16), EOS)
    assert row.tokens.tolist() == [5, 6, EOS, 7, EOS, 8] and row.labels.tolist() == [6, EOS, 7, EOS, 8, 9]
    assert row.tokens.dtype == row.labels.dtype == np.int64 and row.loss_mask.dtype == np.float32
    assert row.document_starts.tolist() == [0, 3, 5]
    assert row.loss_mask.tolist() == [1, 1, 0, 1, 0, 1]  # the end is predicted, the next document's start is not


def test_eos_at_the_row_border_starts_nothing_outside_the_row():
    row = pack_row(np.array([5, EOS, 6]), EOS)
    assert row.document_starts.tolist() == [0] and row.loss_mask.tolist() == [1, 0]
    row = pack_row(np.array([EOS, 6, EOS]), EOS)
    assert row.document_starts.tolist() == [0, 1] and row.loss_mask.tolist() == [0, 1]


def test_every_label_in_the_loss_belongs_to_the_document_of_its_input():
    rng = np.random.default_rng(0)
    stream = np.where(rng.random(401) < 0.2, EOS, rng.integers(3, 50, 401))
    document = np.concatenate([[0], np.cumsum(stream == EOS)[:-1]])
    for start in range(0, 400, 20):
        row = pack_row(stream[start : start + 21], EOS)
        same = document[start : start + 20] == document[start + 1 : start + 21]
        assert (row.loss_mask.astype(bool) == same).all()
        segment = np.searchsorted(row.document_starts, np.arange(20), side="right")
        ids = document[start : start + 20]
        assert (segment == ids - ids[0] + 1).all()


def test_batch_flattens_borders():
    windows = [np.array([5, EOS, 6, 7, 8]), np.array([5, 6, 7, EOS, 8])]
    batch = make_batch([pack_row(window, EOS) for window in windows], [3, 7])
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (2, 4)
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 8] and batch.cu_seqlens.dtype == torch.int32
    assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (torch.int64, torch.int64, torch.float32)
    assert batch.rows.tolist() == [3, 7]
    assert batch.positions(documents=True).tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]
    assert batch.positions(documents=False).tolist() == [[0, 1, 2, 3]] * 2


def test_padding_is_outside_the_loss_and_its_own_segment():
    row = pad_row(np.array([5, EOS, 6, 7]), EOS, 6)
    assert row.tokens.tolist() == [5, EOS, 6, 7, 0, 0] and row.loss_mask.tolist() == [1, 0, 1, 0, 0, 0]
    assert row.document_starts.tolist() == [0, 2, 3]
    empty = pad_row(np.empty(0, dtype=np.int64), EOS, 6)
    assert empty.loss_mask.sum() == 0 and empty.document_starts.tolist() == [0] and empty.tokens.shape == (6,)
    full = pad_row(np.arange(3, 10), EOS, 6)
    assert full.loss_mask.tolist() == [1] * 6 and full.document_starts.tolist() == [0]
