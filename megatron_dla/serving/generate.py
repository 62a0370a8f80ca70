"""`dla generate`: text from an exported model, printed as it is generated, or a batch of prompts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from megatron_dla.errors import UserError
from megatron_dla.files import parse_json
from megatron_dla.hf.load import check_tokenizer, load_export, load_export_tokenizer
from megatron_dla.serving.decode import pad_left
from megatron_dla.serving.sampling import Sampling, check_prompt, cpu_threads
from megatron_dla.serving.stream import Rows, TextStream


@dataclass
class Generation:
    """The continuation of one prompt.

    Attributes:
        text: after the prompt. tokens: generated, an end token included.
        finish_reason: `stop` after an end token or a stop string, `length` at max_new_tokens.
    """

    prompt: str
    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]


@dataclass
class Cost:
    """Sums over a batch. The first token of each row counts as prefill, the others as decoding."""

    prompt_tokens: int
    tokens: int
    rows: int
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int

    def __str__(self) -> str:
        decoded = self.tokens - self.rows
        rates = [f"prefill {self.prompt_tokens / max(self.prefill_seconds, 1e-9):,.0f} tokens/s"]
        if decoded > 0:
            rates.append(f"decode {decoded / max(self.decode_seconds, 1e-9):,.1f} tokens/s")
        return f"{self.tokens} tokens, {', '.join(rates)}, cache {self.cache_bytes / 1e6:.2f} MB"


def read_prompts(path: str) -> list[str]:
    """Prompts of a file, `-` = standard input: one a line, or `{"prompt": "..."}` a line in a .jsonl file. Blank lines
    are skipped.

    Raises:
        UserError: no such file, bytes that are not UTF-8, a line that is not such an object, no prompt at all.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        lines = data.decode().splitlines()
    except OSError as error:
        raise UserError(f"--prompts {path}: {error.strerror}: give a file that can be read") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path}: byte {error.start} is not UTF-8: convert the file") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.endswith(".jsonl"):
            try:
                line = parse_json(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                line = ""
            if not isinstance(line, str) or not line:
                raise UserError(f'--prompts {path}:{number}: want a line such as {{"prompt": "text"}}')
        prompts.append(line)
    if not prompts:
        raise UserError(f"--prompts {path}: it holds no prompt")
    if blank := sum(not line.strip() for line in lines):
        print(f"--prompts {path}: {blank} blank line(s) skipped", file=sys.stderr)
    return prompts


def generate(
    hf_dir: str | Path,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    batch_size: int = 8,
    trust_remote_code: bool = False,
    out: TextIO | None = None,
) -> Iterator[tuple[list[Generation], Cost]]:
    """Continue `prompts`; yields the results of each batch of them, in order.

    Args:
        device: `cpu` or `cuda`. threads: see `cpu_threads`. batch_size: prompts that are decoded together.
        trust_remote_code: run the code beside the model instead of this package's.
        out: where a single prompt and its text are written as it is generated.

    Raises:
        UserError: a bad value, no exported model, no such device.
    """
    for prompt in prompts:
        check_prompt(prompt)
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: want at least 1")
    sampling = sampling or Sampling()
    check_tokenizer(hf_dir)
    model = load_export(hf_dir, device=device, trust_remote_code=trust_remote_code)
    tokenizer = load_export_tokenizer(hf_dir, trust_remote_code=trust_remote_code)
    torch.manual_seed(sampling.seed)
    with cpu_threads(model, threads):
        for first in range(0, len(prompts), batch_size):
            yield _generate_batch(model, tokenizer, prompts[first : first + batch_size], sampling, out)


def _generate_batch(
    model: Any, tokenizer: Any, prompts: Sequence[str], sampling: Sampling, out: TextIO | None
) -> tuple[list[Generation], Cost]:
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    ids, mask = pad_left(rows, fill=model.config.pad_token_id or 0, device=model.device)
    if out is not None:
        out.write("".join(prompts))
        out.flush()
    streams = [TextStream(tokenizer, out, sampling.stop) for _ in prompts]
    ends = model.generation_config.eos_token_id
    watch = Rows(streams, ends if isinstance(ends, list) else [ends])
    begin = time.perf_counter()
    result = model.generate(
        ids, attention_mask=mask, streamer=watch, stopping_criteria=[watch], return_dict_in_generate=True,
        **sampling.for_transformers(),
    )  # fmt: skip
    if out is not None:
        out.write("\n")
    done = [
        Generation(prompt, stream.text, len(stream.ids), "stop" if ended else "length")
        for prompt, stream, ended in zip(prompts, streams, watch.ended, strict=True)
    ]
    tokens = sum(x.tokens for x in done)
    cost = Cost(
        sum(map(len, rows)), tokens, len(rows), watch.first - begin, watch.last - watch.first,
        result.past_key_values.nbytes,
    )  # fmt: skip
    return done, cost


def _takes_unicode(stream: TextIO) -> bool:
    return (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")


def run(
    hf_dir: str | Path, prompts: Sequence[str], sampling: Sampling, *, as_json: bool = False, **options: Any
) -> None:
    """`generate` to standard output, with a line of rates a batch to standard error.

    Args:
        as_json: one object a prompt and line, with the fields of `Generation`, instead of text.
    """
    stream = sys.stdout if len(prompts) == 1 and not as_json else None
    for done, cost in generate(hf_dir, prompts, sampling, out=stream, **options):
        for one in done:
            if as_json:
                print(json.dumps(asdict(one), ensure_ascii=not _takes_unicode(sys.stdout)), flush=True)
            elif stream is None:
                print(one.prompt + one.text, flush=True)
        print(cost, file=sys.stderr, flush=True)
