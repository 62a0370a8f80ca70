"""`dla generate`: text from an exported model, printed as it is generated."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_dla.errors import UserError
from megatron_dla.hf.load import load_export, load_export_tokenizer


@dataclass
class Generation:
    """Text after the prompt, and what it cost (`seconds` include the prefill; `cache_bytes` at the end)."""

    text: str
    tokens: int
    seconds: float
    cache_bytes: int

    def __str__(self) -> str:
        rate = self.tokens / max(self.seconds, 1e-9)
        return f"{self.tokens} tokens, {rate:.1f} tokens/s, cache {self.cache_bytes / 1e6:.2f} MB"


class Streamer:
    """Prints the text of each token immediately, but of an incomplete character only when its last byte is there."""

    def __init__(self, tokenizer: Any, out: TextIO) -> None:
        self.tokenizer, self.out = tokenizer, out
        self.ids: list[int] = []
        self.text, self.prompt = "", True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:  # generate() puts the prompt first
            self.prompt = False
            return
        self.ids += value.flatten().tolist()
        self._print(final=False)

    def end(self) -> None:
        self._print(final=True)

    def _print(self, final: bool) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not final:
            text = text.rstrip("\ufffd")
        self.out.write(text[len(self.text) :])
        self.out.flush()
        self.text = text


def check_options(prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Raises UserError naming the option with a bad value."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError("--prompt is not valid UTF-8 text: check the terminal's encoding") from error
    if not prompt:
        raise UserError("--prompt is empty: give at least one character")
    if not (math.isfinite(temperature) and 0 <= seed < 2**63):
        raise UserError(f"--temperature {temperature}, --seed {seed}: want finite numbers, the seed in [0, 2^63)")
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: want at least 1")
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"--temperature {temperature} --top-p {top_p}: want at least 0, and in (0, 1]")


def generate(
    hf_dir: str | Path,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    out: TextIO | None = None,
) -> Generation:
    """Continue `prompt`; streams the text to `out` (standard output) and a line of statistics to standard error.

    Args:
        temperature: 0 = greedy. top_p: nucleus sampling, the share of the probability that is sampled from.
        seed: of the sampling. device: `cpu` or `cuda`.

    Raises:
        UserError: a bad value, no exported model, no such device.
    """
    check_options(prompt, max_new_tokens, temperature, top_p, seed)
    model, tokenizer = load_export(hf_dir, device=device), load_export_tokenizer(hf_dir)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    out = sys.stdout if out is None else out
    out.write(prompt)
    streamer = Streamer(tokenizer, out)
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    begin = time.perf_counter()
    result = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=streamer,
        return_dict_in_generate=True, **sampling,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    out.write("\n")
    done = Generation(
        text=streamer.text, tokens=result.sequences.shape[1] - ids.shape[1], seconds=seconds,
        cache_bytes=result.past_key_values.nbytes,
    )  # fmt: skip
    print(done, file=sys.stderr, flush=True)
    return done
