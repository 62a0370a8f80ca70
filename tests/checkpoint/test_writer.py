"""A save beside training takes a small share of a processor, until somebody waits for it: `checkpoint.writer`."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from megatron_dla import files
from megatron_dla.checkpoint import writer
from megatron_dla.checkpoint.manager import _is_finite
from megatron_dla.checkpoint.writer import CROWDED_SHARE, Files, Pace, background_share
from megatron_dla.files import file_sha256

MB = 1 << 20


@pytest.fixture
def content(monkeypatch) -> Files:
    monkeypatch.setattr(files, "CHUNK", MB)
    return Files({"x.safetensors": {"x": torch.arange(4 * MB, dtype=torch.int32)}}, {"y": b"y"})


def test_a_paced_save_takes_its_share_and_writes_the_same(content, tmp_path) -> None:
    (tmp_path / "plain").mkdir()
    want = content.write(tmp_path / "plain")
    found = {}

    def work() -> None:
        began = time.monotonic()
        found["records"] = content.write(tmp_path, Pace(0.1))
        found["share"] = time.thread_time() / (time.monotonic() - began)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found["records"] == want
    assert want["x.safetensors"]["sha256"] == file_sha256(tmp_path / "x.safetensors")
    assert 0.02 < found["share"] < 0.2


def test_a_save_that_is_waited_for_makes_no_more_pauses(content, tmp_path) -> None:
    pace = Pace(1e-6)
    thread = threading.Thread(target=content.write, args=(tmp_path, pace))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    pace.hurry()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("ranks,threads,cpus,share", [(2, 1, 2, CROWDED_SHARE), (2, 1, 3, CROWDED_SHARE), (2, 1, 4, 1)])
def test_only_a_crowded_machine_is_written_slowly(monkeypatch, ranks, threads, cpus, share) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(writer, "usable_cpus", lambda: cpus)
    assert background_share() == share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_weights_whose_sum_is_not(dtype) -> None:
    large = torch.full((64,), 3e38, dtype=dtype)
    assert _is_finite(large) and _is_finite(-large) and _is_finite(torch.ones(3, dtype=dtype))
    for bad in (torch.inf, -torch.inf, torch.nan):
        assert not _is_finite(torch.cat([large, torch.tensor([bad], dtype=dtype)]))
    assert not _is_finite(torch.tensor([torch.inf, -torch.inf], dtype=dtype))
