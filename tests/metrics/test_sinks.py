"""metrics.jsonl, the log line, the meters, and the names that TensorBoard and W&B get."""

import errno
from pathlib import Path

import pytest
import torch

from megatron_dla.errors import UserError
from megatron_dla.gpus import GPUS, find_gpu
from megatron_dla.masking import mask_command, mask_environment, mask_text, mask_values
from megatron_dla.metrics.meters import MemoryMeter, StepMeter
from megatron_dla.metrics.names import shown
from megatron_dla.metrics.sinks import JsonlSink, console_line, read_metrics


def test_lines_of_repeated_steps_and_lines_cut_short_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 9}\n{"loss": 2}\n[1]\n{"step": 3')
    sink = JsonlSink(path, 2)
    assert sink.last_step == 9
    sink.write({"step": 3, "loss": float("nan")})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": None}]
    JsonlSink(path, None)
    assert path.read_text() == ""


def test_a_line_that_was_cut_short_by_a_full_disk_is_taken_back(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", None)
    sink.write({"step": 1})
    with sink.path.open("a") as file:  # as far as the disk had room
        file.write('{"step": 2, "lo')
    sink.write({"step": 3})
    assert [m["step"] for m in read_metrics(sink.path)] == [1, 3]


def test_full_disk_is_an_error_of_the_sink() -> None:
    sink = JsonlSink.__new__(JsonlSink)
    sink.path, sink._size = Path("/dev/full"), 0
    with pytest.raises(OSError) as caught:
        sink.write({"step": 1})
    assert caught.value.errno in (errno.ENOSPC, errno.EINVAL)


def test_speed_is_that_of_the_steps_since_the_last_reading() -> None:
    meter = StepMeter(10, 20, devices=4, flops_per_token=2e9, peak=1e12)
    meter.add(4000, 1.5, 0.5)
    meter.add(4000, 0.5, 0.0)
    found = meter.read()
    assert found["tokens_per_s"] == 4000 and found["tokens_per_s_per_device"] == 1000
    assert (found["step_s"], found["data_wait_share"]) == (1.0, 0.25)
    assert found["tflops"] == 2.0 and found["mfu"] == 2.0  # 1000 tokens/s x 2e9
    assert set(meter.read().values()) == {0.0}
    assert StepMeter(0, 1).read().keys() == {"tokens_per_s", "tokens_per_s_per_device", "step_s", "data_wait_share"}
    assert MemoryMeter(torch.device("cpu")).read() == {} and MemoryMeter(torch.device("cpu")).peak_gb() > 0


@pytest.mark.parametrize(
    "name, key",
    [
        ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090", None), ("", None),
    ],
)  # fmt: skip
def test_gpus_are_known_by_their_name(name: str, key: str | None) -> None:
    assert find_gpu(name) == (GPUS[key] if key else None)


LOGGED = {
    "step": 30, "time": 1.0, "loss": 2.5, "grad_norm": None, "lr": 1e-3, "tokens": 960, "tokens_per_s": 400.0,
    "tokens_per_s_per_device": 100.0, "step_s": 2.0, "data_wait_share": 0.25, "tflops": 3.0, "mfu": 0.2,
    "memory_gb": 3.0, "memory_active_gb": 1.073741824, "memory_active_share": 0.5, "eta_s": 5.0, "alloc_retries": 2.0,
    "val_loss": 2.0, "val_bpb": 1.5, "val_loss_by_source": {"web": 1.0},
    "val_bpb_by_position": {"0-15": 2.5}, "mix": {"web": 0.75}, "data_crc32": 7, "data_wait_s": 0.1,
    "boundary_rate": 0.3, "boundary_rate_by_head": [[0.1, 0.3], [None, 0.4]], "epoch": 0.5,
    "gate_by_layer": [0.1, None],
}  # fmt: skip


def test_names_and_units_are_those_of_torchtitan() -> None:
    found = shown(LOGGED)
    assert found == {
        "loss_metrics/global_avg_loss": 2.5, "lr": 1e-3, "n_tokens_seen": 960, "tokens_per_s": 400.0,
        "throughput(tps)": 100.0, "time_metrics/end_to_end(s)": 2.0, "time_metrics/data_loading(%)": 25.0,
        "time_metrics/data_loading(s)": 0.5, "tflops": 3.0, "mfu(%)": 20.0, "memory/peak(GB)": 3.0,
        "memory/max_active(GiB)": 1.0, "memory/max_active(%)": 50.0, "memory/num_alloc_retries": 2.0,
        "validation_metrics/loss": 2.0, "validation_metrics/bits_per_byte": 1.5, "validation_metrics/loss/web": 1.0,
        "validation_metrics/bits_per_byte/0-15": 2.5,
        "mix/web": 0.75, "boundary_rate": 0.3, "boundary_rate/layer_00": 0.2, "boundary_rate/layer_01": 0.4,
        "epoch": 0.5, "gate/layer_00": 0.1,
    }  # fmt: skip


def test_log_line_has_mfu_on_known_gpus_and_the_wait_for_data() -> None:
    line = console_line(LOGGED, 100)
    assert all(part in line for part in ("400 tok/s", "MFU 20.0%", "data 25.0%", "3.00 GB"))
    assert "MFU" not in console_line({key: x for key, x in LOGGED.items() if key != "mfu"}, 100)


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"step": "3"}'])
def test_a_damaged_line_of_the_metrics_is_named(tmp_path, line) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_secrets_are_masked_wherever_texts_go() -> None:
    url = "https://me:pw@host/a?X-Amz-Signature=ab12&part=3"
    assert mask_text(url) == "https://me:***@host/a?X-Amz-Signature=***&part=3"
    assert mask_environment({"HF_TOKEN": "x", "A": "9"}) == {"HF_TOKEN": "***", "A": "9"}
    words = "apptainer exec --env HF_TOKEN=hf_x,A=1,GITHUB_PAT=p data.tokenizer=/t tokenizer=/t KEY_DIM=8 image.sif"
    masked = words.replace("hf_x", "***").replace("PAT=p", "PAT=***").replace("DIM=8", "DIM=***")
    assert mask_command(words) == masked == mask_environment({"DLA_EXEC_PREFIX": words})["DLA_EXEC_PREFIX"]
    kept = {"PATH": "/bin", "COMPASS": "n", "TOKENIZERS_PARALLELISM": "false"}
    assert mask_environment(kept | {"DB_PASS": "x", "MY_PAT": "y"}) == kept | {"DB_PASS": "***", "MY_PAT": "***"}
    nested = {"model": {"key_dim": 8}, "data": {"sources": ("s3://u:pw@h/x", 1)}}
    assert mask_values(nested) == {"model": {"key_dim": 8}, "data": {"sources": ["s3://u:***@h/x", 1]}}
