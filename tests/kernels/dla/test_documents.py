"""Document starts of packed rows."""

import torch

from megatron_dla.kernels.dla.documents import document_starts


def test_rows_and_documents_start() -> None:
    ends = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    want = torch.tensor([[1, 0, 0, 1], [1, 0, 0, 0]], dtype=torch.bool)
    found = document_starts(ends, 2, 4)
    assert torch.equal(found, want)
    found.fill_(False)  # a caller's own tensor: the next one does not see it
    assert torch.equal(document_starts(ends, 2, 4), want)
    assert torch.equal(document_starts(torch.tensor([0, 3, 8]), 2, 4)[1], want[1])  # a row starts without being named
    assert not document_starts(None, 2, 4).any()


def test_borders_on_the_host_are_never_read_from_a_device() -> None:
    ends = torch.tensor([0, 3, 4, 8])
    found = document_starts(ends, 2, 4, "meta")
    assert found.device.type == "meta" and found.shape == (2, 4) and found.dtype == torch.bool
    assert document_starts(ends.to("meta"), 2, 4, "meta").shape == (2, 4)  # without asking for its values, either
