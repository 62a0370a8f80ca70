"""δ-mem on SmolLM2-135M-Instruct: facts about some people, asked about others when the text is gone.

`make demo-delta-mem` calls `short`. `make delta-mem-smollm2` runs this module: the whole recipe, and what it gives
beside other means, over the number of facts, the changes of topic and the abilities of MemoryAgentBench. Arguments are
question files of `dla eval lm`, answered with the adapter on and off.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from megatron_dla.demo import dla, speeches
from megatron_dla.demo_adapter import RUN, adapter
from megatron_dla.evaluation.recall import FactsTask, write_stories
from megatron_dla.metrics.meters import clock

CONFIG = "configs/delta_mem_smollm2.yaml"
BASE = RUN / "smollm2"
TOLD = (1, 2, 4)  # facts of a training episode: one is learned first, and opens the way to four
ASKED = TOLD[-1]
BESIDE = ("window=16", "bm25=1", "summary=24", "lora=20")
SWEEPS = ("people=1,2,4", "shifts=0,1,2,4", "updates=0,1,2", "filler=0,5,20")


def prepare() -> None:
    """The model, and training data: facts, and beginnings of speeches as ordinary text."""
    if not BASE.exists():
        dla("convert", "smollm2", str(BASE))
    for seed, relations in enumerate(TOLD, 1):
        told = FactsTask(people=1, relations=relations)
        write_stories(RUN / f"facts_{relations}.jsonl", told, 3000, seed=seed)
        write_stories(RUN / f"facts_{relations}_validation.jsonl", told, 32, seed=1, split="validation")
    write_speeches(RUN / "speeches.jsonl", 1500)
    names = [f"facts_{relations}" for relations in TOLD]
    _join("facts_train", *names)
    _join("facts_and_text", *names, "speeches")
    _join("one_fact_and_text", names[0], "speeches")
    _join("four_facts_and_text", names[-1], "speeches")  # for configs/ablation_smollm2.yaml
    pages = sorted(Path("docs").glob("*.md"))
    (RUN / "text.txt").write_text("\n\n".join(path.read_text() for path in pages))


def _join(name: str, *parts: str) -> None:
    texts = [(RUN / f"{part}.jsonl").read_text() for part in parts]
    (RUN / f"{name}.jsonl").write_text("".join(texts))


def write_speeches(path: Path, count: int) -> None:
    """Beginnings of paragraphs of speeches as JSONL, each about as long as an episode."""
    found = [
        paragraph[:400].rsplit(" ", 1)[0]
        for speech in sorted(speeches().iterdir())
        for paragraph in speech.read_text(encoding="utf-8").split("\n")
        if len(paragraph) > 400
    ]
    with path.open("w") as file:
        for i in np.random.default_rng(0).permutation(len(found))[:count]:
            file.write(json.dumps({"text": found[i]}) + "\n")


def precision() -> str:
    """bf16 where this CPU multiplies in it, four times as fast as in fp32; else fp32."""
    import torch

    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def controls(directory: Path, out: Path, relations: int, episodes: int) -> None:
    """The adapter with its controls, told so many facts; and what it costs on ordinary text."""
    dla(
        *("eval", str(BASE), "--adapter", str(directory), "--tasks", "recall,ppl", "--controls"),
        *("--set", "people=1", f"relations={relations}"),
        *("--episodes", str(episodes), "--text", str(RUN / "text.txt"), "--window", "256", "--windows", "16"),
        *("--out", str(out)),
    )


def short(steps: int) -> Path:
    """One fact at a time, in fewer and smaller steps, with its controls; returns the place of the results."""
    prepare()
    changes = (
        f"episodes.train={RUN}/one_fact_and_text.jsonl", f"episodes.valid={RUN}/facts_1_validation.jsonl",
        f"training.steps={steps}", "training.global_batch_size=4", "training.micro_batch_size=2",
    )  # fmt: skip
    directory = adapter(CONFIG, "smollm2_short", BASE, *changes, precision=precision())
    controls(directory, RUN / "smollm2_short_eval", 1, 100)
    return RUN / "smollm2_short_eval"


def main() -> int:
    """Exit code 0 when all is done; stopped, the training goes on where it was."""
    started = time.monotonic()
    RUN.mkdir(parents=True, exist_ok=True)
    prepare()
    directory = adapter(CONFIG, "smollm2_facts", BASE, precision=precision())
    out = RUN / "smollm2_eval"
    controls(directory, out, ASKED, 60)
    asked = ("eval", str(BASE), "--adapter", str(directory), "--controls", "--episodes", "20")
    told = ("--set", "people=1", f"relations={ASKED}")
    dla(*asked, *told, "--beside", *BESIDE, "--out", f"{out}_beside")
    for sweep in SWEEPS:
        key = sweep.partition("=")[0]
        others = [word for word in told if not word.startswith(key)]
        dla(*asked, *others, "--sweep", sweep, "--out", f"{out}_{key}")
    for task in ("labels", "most"):
        dla(*asked, "--recall-task", task, "--out", f"{out}_{task}")
    if questions := sys.argv[1:]:
        dla(*("eval", "lm", f"base={BASE}", "--adapter", f"delta_mem={directory}", "--questions", *questions),
            *("--limit", "200", "--out", f"{out}_ability"))  # fmt: skip
    print(f"\n{clock(time.monotonic() - started)}; see {out}*")
    return 0


if __name__ == "__main__":
    sys.exit(main())
