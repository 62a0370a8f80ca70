"""`make demo-delta-mem`: does a δ-mem state keep what was written once the text is removed? With a user's commands.

1. The mechanism: a small full-attention model, pretrained here, learns to recall words of its context. Adapters of
   three seeds are trained on it, frozen, and asked without the context: with the state kept, zeroed, another episode's,
   with the correction off, and beside an adapter without memory; and what text of the base's own kind pays.
2. A real model: SmolLM2-135M-Instruct, one fact in a sentence, the same table, by a short form of the recipe that
   `make delta-mem-smollm2` runs. Whatever it says is the result.

Every adapter is evaluated on the plain transformers model, from its exported directory. The results are in
runs/demo_delta_mem/.
"""

from __future__ import annotations

import shutil
import sys
import time

from megatron_dla import demo_smollm2
from megatron_dla.demo import dla
from megatron_dla.demo_adapter import RUN, adapter
from megatron_dla.evaluation.recall import ProfileTask, write_documents, write_stories
from megatron_dla.files import parse_json
from megatron_dla.metrics.meters import clock

SEEDS = (1, 2, 3)
PROFILE = ProfileTask()
STEPS = 100  # of SmolLM2's short recipe


def small_model() -> None:
    """Pretrain the base on texts, in which the questions follow their context."""
    text = RUN / "profile_text.jsonl"
    write_documents(text, PROFILE, 6000, seed=0, bare=0.1)
    dla("data", "tokenizer", "--input", str(text), "--output", str(RUN / "tokenizer"), "--vocab-size", "560")
    dla("data", "shards", "--input", str(text), "--tokenizer", str(RUN / "tokenizer"), "--output", str(RUN / "data"),
        "--val-fraction", "0.02", "--min-train-shards", "8")  # fmt: skip
    dla("train", "configs/delta_mem_base.yaml")
    dla("convert", "to-hf", str(RUN / "base"), str(RUN / "base_hf"), "--plain")


def mechanism() -> bool:
    """Whether the kept state beats the zeroed and the shuffled one beyond the 95 % interval, over all seeds."""
    small_model()
    base = RUN / "base_hf"
    for name, split, count in (("episodes", "train", 6000), ("validation", "validation", 64)):
        write_stories(RUN / f"profile_{name}.jsonl", PROFILE, count, seed=1, split=split)
    text = {name: RUN / f"{name}_text.jsonl" for name in ("ordinary", "held_out")}
    for seed, (path, count) in enumerate(zip(text.values(), (1500, 400), strict=True), 2):
        write_documents(path, PROFILE, count, seed=seed, bare=0.1)
    parts = (RUN / "profile_episodes.jsonl", text["ordinary"])
    (RUN / "profile_train.jsonl").write_text("".join(part.read_text() for part in parts))
    adapters = [adapter("configs/delta_mem_recall.yaml", f"recall_{seed}", base, f"run.seed={seed}") for seed in SEEDS]
    static = adapter("configs/delta_mem_recall.yaml", "recall_static", base, "delta_mem.memory=static")
    out = RUN / "recall_eval"
    dla(
        *("eval", str(base), "--adapter", *map(str, adapters), "--static", str(static), "--controls"),
        *("--tasks", "recall,ppl", "--text", str(text["held_out"]), "--window", "40", "--windows", "300"),
        *("--out", str(out)),
    )
    table = parse_json((out / "eval.json").read_bytes())["tasks"][0]
    lows = {
        row["second"]: row["low"]
        for row in table["differences"]
        if row["first"] == "kept" and row["metric"] == "choice"
    }
    return all(lows[control] > 0 for control in ("zeroed", "shuffled"))


def main() -> int:
    """Exit code 0 if the mechanism check holds and both adapters reproduce their numbers on transformers."""
    started = time.monotonic()
    if RUN.exists():
        print(f"removing the earlier {RUN}")
        shutil.rmtree(RUN)
    RUN.mkdir(parents=True)
    carried = mechanism()
    real = demo_smollm2.short(STEPS)
    print(f"\n{clock(time.monotonic() - started)}; see {RUN}/recall_eval/ and {real}/")
    if not carried:
        print("the kept state does not beat its controls: something is wrong with this build", file=sys.stderr)
        return 1
    print("mechanism check passed: the kept state beats the zeroed and the shuffled one beyond the 95 % interval")
    return 0


if __name__ == "__main__":
    sys.exit(main())
