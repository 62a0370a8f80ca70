"""`dla bench data`: tokenising and reading text, beside other libraries on the same text with the same vocabulary.

Tokenising is from JSONL to tokens on disk, the median of some rounds. Reading is what one rank does in its only
process, after it has read for a while. Both are given by wall time and by the processor time of all processes, which
depends less on what else runs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_dla.data import TokenLoader
from megatron_dla.data_prep.shards import build_shards
from megatron_dla.data_prep.sources import DocumentSource
from megatron_dla.data_prep.tokenizer import train_tokenizer
from megatron_dla.errors import UserError
from megatron_dla.shard_index import TOKENIZER_CONFIG, TOKENIZER_JSON, ShardIndex

from . import data_peers
from .report import environment, write_json
from .timing import seconds

DOCUMENTS = {"short": 220, "long": 4400}  # characters: about 50 and 1,000 tokens
SEQ_LEN, RANKS, ROWS, STREAMS, PREFETCH = 2048, 32, 4, 4, 64  # rows, streams: of a rank (each step)
END = data_peers.END
TRAINED_ON, PIECE = 4_000_000, 4000  # characters of text that the tokenizers are trained on, and of a piece of it
LONG_WAIT_S = 0.01
Record = dict[str, Any]


def generated_text(characters: int, seed: int = 0) -> str:
    """Words of random letters, the nth as often as 1 / n."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgk", k=rng.randint(2, 9))) for _ in range(20_000)]
    weights = list(itertools.accumulate(1 / n for n in range(1, len(words) + 1)))
    return " ".join(rng.choices(words, cum_weights=weights, k=characters // 4))[:characters]


def read_text(paths: Sequence[Path], characters: int) -> str:
    """So many characters of the documents, from the beginning again where there are too few."""
    parts, size = [], 0
    while size < characters:
        before = size
        for document in DocumentSource(paths).documents():
            parts.append(document.text)
            size += len(document.text)
            if size >= characters:
                break
        if size == before:
            raise UserError(f"--input {paths[0]}: no text in it")
    return "".join(parts)[:characters]


def write_documents(path: Path, text: str, size: int) -> int:
    """Write JSONL with documents of `size` characters; returns their bytes of UTF-8."""
    written = 0
    with open(path, "w") as file:
        for start in range(0, len(text), size):
            document = text[start : start + size]
            written += len(document.encode())
            file.write(json.dumps({"text": document}) + "\n")
    return written


def train_tokenizers(text: str, vocab_size: int, place: Path) -> dict[str, Path | str]:
    """A sentencepiece model and a tokenizer.json with as many tokens, by name; a str says why there is none."""
    sample = place / "sample.jsonl"
    write_documents(sample, text[:TRAINED_ON], PIECE)
    made: dict[str, Path | str] = {"sentencepiece": train_tokenizer([sample], place / "sentencepiece", vocab_size).path}
    try:
        import tokenizers as tk
    except ImportError as error:
        return made | {"tokenizers": str(error)}
    core = tk.Tokenizer(tk.models.BPE())
    core.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tk.decoders.ByteLevel()
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator((text[i : i + PIECE] for i in range(0, min(len(text), TRAINED_ON), PIECE)), trainer)
    (place / "tokenizers").mkdir()
    (place / "tokenizers" / TOKENIZER_CONFIG).write_text(json.dumps({"eos_token": END}))
    core.save(str(path := place / "tokenizers" / TOKENIZER_JSON))
    return made | {"tokenizers": path}


@contextlib.contextmanager
def clock() -> Iterator[dict[str, float]]:
    """Fills in `wall_s` and `cpu_s`, the latter of this process and of those that it has waited for."""

    def cpu() -> float:
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in usage)

    times: dict[str, float] = {}
    wall, used = time.perf_counter(), cpu()
    yield times
    times |= {"wall_s": time.perf_counter() - wall, "cpu_s": cpu() - used}


def reading_speed(counts: Iterator[int], budget_s: float) -> dict[str, float]:
    """Tokens a second of an iterator that reads endlessly and gives the tokens of each item."""
    tokens = 0
    until = time.perf_counter() + budget_s / 2
    while time.perf_counter() < until:
        next(counts)
    with clock() as times:
        until = time.perf_counter() + budget_s
        while time.perf_counter() < until:
            tokens += next(counts)
    return {"tokens_s": tokens / times["wall_s"], "tokens_cpu_s": tokens / times["cpu_s"]}


def steps_of_a_rank(directory: Path, prefetch_rows: int) -> Iterator[int]:
    """Tokens of each step."""
    loader = TokenLoader(
        directory, "train", seq_len=SEQ_LEN, global_batch_size=ROWS, micro_batch_size=ROWS, num_streams=STREAMS,
        prefetch_rows=prefetch_rows,
    )  # fmt: skip
    try:
        while True:
            yield sum(batch.tokens.numel() for batch in loader.next_step())
    finally:
        loader.close()


def repeat_shards(directory: Path, place: Path, count: int) -> None:
    """A data directory of `count` shards: those of `directory`, linked again and again under other names."""
    index = ShardIndex.load(directory)
    (place / "train").mkdir(parents=True)
    stored = list(itertools.islice(itertools.cycle(index.split("train")), count))
    index.shards = [replace(shard, name=f"{i:06d}.tar") for i, shard in enumerate(stored)]
    for old, new in zip(stored, index.shards, strict=True):
        os.link(directory / old.path, place / new.path)
    index.save(place)


def waiting_steps(directory: Path, prefetch_rows: int, steps: int, step_s: float) -> dict[str, float]:
    """The share of steps in which at least one of RANKS data-parallel ranks waits for over 10 ms.

    All ranks are in this process, a stream each, and begin at different places of their shards; a step takes `step_s`,
    and the first one is not counted.
    """
    loaders = [
        TokenLoader(
            directory, "train", seq_len=SEQ_LEN, global_batch_size=RANKS * ROWS, micro_batch_size=ROWS,
            num_streams=RANKS, dp_rank=rank, dp_size=RANKS, prefetch_rows=prefetch_rows,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    (reader,) = loaders[0].readers.values()
    shard_steps = sum(shard.tokens for shard in reader.shards) / len(reader.shards) / (ROWS * SEQ_LEN)
    for rank, loader in enumerate(loaders):
        for _ in range(round(shard_steps * rank / RANKS)):
            loader.next_step()
    waits = []
    for _ in range(steps + 1):
        for loader in loaders:
            loader.next_step()
        waits.append(max(loader.last_wait_s for loader in loaders) > LONG_WAIT_S)
        time.sleep(step_s)
    for loader in loaders:
        loader.close()
    return {"share": sum(waits[1:]) / steps}


class Bench:
    """Runs every measurement, prints a line for each, and keeps them as `records`.

    A record has `what` ("tokenise", "read" or "wait"), `name`, `documents` ("short" or "long"), the number of
    `processes`, and its results; or `missing`, the reason why there are none.
    """

    def __init__(self, args: argparse.Namespace, place: Path, report: Callable[[], object]) -> None:
        self.args, self.place, self.report = args, place, report
        self.records: list[Record] = []

    def add(self, what: str, name: str, documents: str, measure: Callable[[], Record], **facts: Any) -> None:
        record = {"what": what, "name": name, "documents": documents, **facts, **_tried(measure)}
        self.records.append(record)
        print(line(record), flush=True)
        self.report()

    def run(self, text: str, tokenizers: dict[str, Path | str]) -> None:
        for documents, size in DOCUMENTS.items():
            path = self.place / f"{documents}.jsonl"
            n_bytes = write_documents(path, text, size)
            self._tokenise(documents, path, n_bytes, tokenizers)
            self._read(documents)
            if self.args.steps:
                self._wait(documents)

    def _tokenise(self, documents: str, path: Path, n_bytes: int, tokenizers: dict[str, Path | str]) -> None:
        def speed(times: dict[str, float]) -> Record:
            return {"mb_s": n_bytes / 1e6 / times["wall_s"], "mb_cpu_s": n_bytes / 1e6 / times["cpu_s"]}

        def build(name: str, processes: int) -> Record:
            with clock() as times:
                build_shards(
                    [path], _there(tokenizers[name]), self.place / documents / name, workers=processes,
                    val_fraction=0, min_train_shards=STREAMS, overwrite=True,
                )  # fmt: skip
            return speed(times)

        def peer(processes: int) -> Record:
            tokenizer = _there(tokenizers["tokenizers"])
            with clock() as whole:
                data = data_peers.load_text(path, Path(tempfile.mkdtemp(dir=self.place)))  # nothing cached
                with clock() as mapped:
                    data_peers.map_tokens(data, tokenizer, processes)
            return {**speed(whole), **{f"map_{key}": value for key, value in speed(mapped).items()}}

        for n in self.args.workers:
            measures = {f"dla data shards, {name}": partial(build, name, n) for name in tokenizers}
            measures["datasets.map, tokenizers"] = partial(peer, n)
            # in turn, so that a slow minute of the machine does not decide between two of them
            rounds = [
                {name: _tried(measure) for name, measure in measures.items()} for _ in range(self.args.repeats)
            ]  # fmt: skip
            for name in measures:
                found = middle([one[name] for one in rounds])
                self.add("tokenise", name, documents, partial(dict, found), processes=n)

    def _read(self, documents: str) -> None:
        built, budget_s = self.place / documents / "sentencepiece", self.args.budget

        def ours(prefetch_rows: int) -> dict[str, float]:
            return reading_speed(steps_of_a_rank(built, prefetch_rows), budget_s)

        def others(name: str) -> dict[str, float]:
            place = self.place / documents / name.partition(",")[0]
            return reading_speed(data_peers.READERS[name](built, place, SEQ_LEN), budget_s)

        for rows in (0, PREFETCH):
            self.add("read", f"TokenLoader, prefetch_rows {rows}", documents, partial(ours, rows))
        for name in data_peers.READERS:
            self.add("read", name, documents, partial(others, name))

    def _wait(self, documents: str) -> None:
        place, steps, step_s = self.place / documents / "ranks", self.args.steps, self.args.step_seconds
        repeat_shards(self.place / documents / "sentencepiece", place, RANKS)
        for rows in (0, PREFETCH):
            self.add(
                "wait", f"{RANKS} ranks, prefetch_rows {rows}", documents,
                partial(waiting_steps, place, rows, steps, step_s), steps=steps, step_seconds=step_s,
            )  # fmt: skip


def _tried(measure: Callable[[], Record]) -> Record:
    """What it found, or `missing`: whatever other libraries raise must not end the run."""
    try:
        return measure()
    except UserError:
        raise
    except Exception as error:
        return {"missing": f"{type(error).__name__}: {error}".splitlines()[0]}


def middle(rounds: list[Record]) -> Record:
    """The median of each number, and `mb_s_range`, or the first that is `missing`."""
    for one in rounds:
        if "missing" in one:
            return one
    speeds = [one["mb_s"] for one in rounds]
    medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return {**medians, "mb_s_range": [min(speeds), max(speeds)]}


def _there(tokenizer: Path | str) -> Path:
    if isinstance(tokenizer, str):
        raise ImportError(tokenizer)
    return tokenizer


def line(record: Record) -> str:
    """A row of the table."""
    start = f"{record['what']:8s} | {record['name']:36s} | {record['documents']:5s} | "
    if "missing" in record:
        return start + record["missing"]
    if record["what"] == "tokenise":
        low, high = record["mb_s_range"]
        speed = f"{record['mb_s']:6.2f} MB/s ({low:.2f} to {high:.2f})"
        cells = f"{record['processes']} processes | {speed} | {record['mb_cpu_s']:6.2f} MB a CPU s"
        return start + cells + (f" | map alone {record['map_mb_s']:.2f} MB/s" if "map_mb_s" in record else "")
    if record["what"] == "read":
        return start + f"{record['tokens_s'] / 1e6:7.2f}M tokens/s | {record['tokens_cpu_s'] / 1e6:7.2f}M a CPU s"
    return start + f"{record['share']:.1%} of {record['steps']} steps of {record['step_seconds']:g} s wait over 10 ms"


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for a wrong argument."""
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {str(args.out)!r} is a file: give a directory")
    seconds(args.budget)
    if not 0 < args.mb < float("inf"):
        raise UserError(f"--mb {args.mb:g}: want megabytes, more than 0")
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: want at least 1")
    if min(args.workers) < 1:
        raise UserError(f"--workers {min(args.workers)}: want at least 1")


def bench_data(args: argparse.Namespace) -> int:
    """Print and write every number; exit code 0. Raises UserError for a wrong argument."""
    check_arguments(args)
    characters = round(args.mb * 1e6)
    text = read_text(args.input, characters) if args.input else generated_text(characters)
    # as many threads as processes, in all libraries alike
    torch.set_num_threads(1)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    facts = environment(torch.device("cpu")) | data_peers.versions()
    facts |= {"cores": len(os.sched_getaffinity(0)), "characters": len(text), "vocab_size": args.vocab_size}
    path = args.out / "data.json"
    with tempfile.TemporaryDirectory(dir=args.work) as place:
        tokenizers = train_tokenizers(text, args.vocab_size, Path(place))
        bench = Bench(args, Path(place), lambda: write_json(path, facts | {"records": bench.records}))
        bench.run(text, tokenizers)
    print(f"wrote {path}")
    return 0
