"""`make demo-delta-mem`: does a δ-mem state keep what was written once the text is removed? With a user's commands.

1. The mechanism: a small full-attention model, pretrained here, learns to recall words of its context. Adapters of
   three seeds are trained on it, frozen, and asked without the context: with the state kept, zeroed, another episode's,
   with the correction off, and beside an adapter without memory; and what text of the base's own kind pays.
2. A real model: SmolLM2-135M-Instruct, facts in sentences, the same table. Whatever it says is the result.

Every adapter is evaluated on the plain transformers model, from its exported directory. The results are in
runs/demo_delta_mem/.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from megatron_dla.demo import dla, speeches
from megatron_dla.evaluation.recall import FactsTask, ProfileTask, write_documents, write_stories
from megatron_dla.files import parse_json
from megatron_dla.metrics.meters import clock
from megatron_dla.metrics.sinks import read_metrics

RUN = Path("runs/demo_delta_mem")
SEEDS = (1, 2, 3)
PROFILE, FACTS = ProfileTask(), FactsTask(people=1, relations=4)
RELOADED = 1e-4  # relative difference of the held-out loss, Megatron against transformers


def small_model() -> None:
    """Pretrain the base on texts, in which the questions follow their context."""
    text = RUN / "profile_text.jsonl"
    write_documents(text, PROFILE, 6000, seed=0, bare=0.1)
    dla("data", "tokenizer", "--input", str(text), "--output", str(RUN / "tokenizer"), "--vocab-size", "560")
    dla("data", "shards", "--input", str(text), "--tokenizer", str(RUN / "tokenizer"), "--output", str(RUN / "data"),
        "--val-fraction", "0.02", "--min-train-shards", "8")  # fmt: skip
    dla("train", "configs/delta_mem_base.yaml")
    dla("convert", "to-hf", str(RUN / "base"), str(RUN / "base_hf"), "--plain")


def adapter(config: str, name: str, base: Path, *overrides: str) -> Path:
    """Train an adapter and export it; its held-out loss must come back from the plain model."""
    dla("run", config, "--nproc", "2", f"run.name={name}", *overrides)
    dla("convert", "adapter", str(RUN / name), str(RUN / f"{name}_adapter"))
    validated = [m for m in read_metrics(RUN / name / "metrics.jsonl") if "val_loss" in m][-1]
    trained = validated.get("val_answers", validated["val_loss"])
    reloaded = held_out_loss(base, RUN / f"{name}_adapter", RUN / name / "config.yaml")
    print(f"held-out loss in training {trained:.6f}, of the exported adapter on transformers {reloaded:.6f}")
    if abs(reloaded / trained - 1) > RELOADED:
        sys.exit(f"they differ by more than {RELOADED:.0e} of it: something is wrong with this build")
    return RUN / f"{name}_adapter"


def held_out_loss(base: Path, directory: Path, config_file: Path) -> float:
    """Mean loss over the answers of the run's held-out episodes, in two passes on the transformers model."""
    from megatron_dla.config import AdapterRunConfig, load_config
    from megatron_dla.serving.load import load_adapted
    from megatron_dla.tasks.adapter.task import AdapterTask
    from megatron_dla.tasks.adapter.two_pass import answer_loss

    config = load_config(config_file)
    assert isinstance(config, AdapterRunConfig)
    return answer_loss(load_adapted(base, directory), AdapterTask(config).held_out)


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


def real_model() -> None:
    """SmolLM2-135M-Instruct: train on facts about some people, ask about others; and what ordinary text pays."""
    base = RUN / "smollm2"
    dla("convert", "smollm2", str(base))
    for split, count in (("train", 2000), ("validation", 16)):
        write_stories(RUN / f"facts_{split}.jsonl", FACTS, count, seed=1, split=split)
    write_speeches(RUN / "speeches.jsonl", 500)  # for configs/ablation_smollm2.yaml
    parts = (RUN / "facts_train.jsonl", RUN / "speeches.jsonl")
    (RUN / "facts_and_text.jsonl").write_text("".join(part.read_text() for part in parts))
    directory = adapter("configs/delta_mem_smollm2.yaml", "smollm2_facts", base)
    text = RUN / "text.txt"
    text.write_text("\n\n".join(path.read_text() for path in sorted(Path("docs").glob("*.md"))))
    dla(
        *("eval", str(base), "--adapter", str(directory), "--tasks", "recall,ppl", "--controls", "--episodes", "60"),
        *("--set", f"people={FACTS.people}", f"relations={FACTS.relations}"),
        *("--text", str(text), "--window", "256", "--windows", "16", "--out", str(RUN / "smollm2_eval")),
    )


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


def main() -> int:
    """Exit code 0 if the mechanism check holds and both adapters reproduce their numbers on transformers."""
    started = time.monotonic()
    if RUN.exists():
        print(f"removing the earlier {RUN}")
        shutil.rmtree(RUN)
    RUN.mkdir(parents=True)
    carried = mechanism()
    real_model()
    print(f"\n{clock(time.monotonic() - started)}; see {RUN}/recall_eval/ and {RUN}/smollm2_eval/")
    if not carried:
        print("the kept state does not beat its controls: something is wrong with this build", file=sys.stderr)
        return 1
    print("mechanism check passed: the kept state beats the zeroed and the shuffled one beyond the 95 % interval")
    return 0


if __name__ == "__main__":
    sys.exit(main())
