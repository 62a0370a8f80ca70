"""The file formats and options of the project: how a case of each is made, and the command that reads it."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.fuzz.mutate import HOSTILE, mutate_bytes, mutate_json, mutate_tar, mutate_tensors, mutate_value

OLD = Path(__file__).parents[1] / "fixtures/62bb8a7"
CONFIGS = Path(__file__).parents[2] / "configs"
TRAINED = OLD / "trained/gdn"


@dataclass
class Case:
    """One command line. refused: its input cannot mean anything, so exit code 0 would be a fault too."""

    argv: list[str]
    refused: bool = False
    about: list[str] = field(default_factory=list)


def _copy(source: Path, to: Path) -> Path:
    """A directory with links to the files of another one."""
    shutil.copytree(source, to, copy_function=lambda a, b: Path(b).symlink_to(Path(a).resolve()))
    return to


def _replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


GENERATE = ["--prompt", "hello you", "--max-new-tokens", "2"]


def _config_text(rng: random.Random, values: dict) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(rng, yaml.safe_dump(values).encode())
    return yaml.safe_dump(mutate_value(rng, values), allow_unicode=True).encode(errors="surrogatepass")


def config(rng: random.Random, tmp: Path) -> Case:
    name = rng.choice(("gdn", "mamba2", "adapter"))
    values = yaml.safe_load((OLD / f"{name}.yaml").read_text())
    root = str(OLD)
    for section, key in (("data", "dir"), ("backbone", "dir"), ("episodes", "train"), ("episodes", "valid")):
        if section in values and values[section].get(key):
            values[section][key] = f"{root}/{values[section][key]}"
    values["run"] = {"name": "fuzz", "dir": str(tmp)}
    (tmp / "c.yaml").write_bytes(_config_text(rng, values))
    return Case(["train", str(tmp / "c.yaml"), "--dry-run", "--world-size", "2"])


def override(rng: random.Random, tmp: Path) -> Case:
    from megatron_dla.config import AdapterRunConfig, RunConfig, to_dict

    plain = to_dict(rng.choice((RunConfig, AdapterRunConfig))())
    section = rng.choice(sorted(plain))
    key = rng.choice(sorted(plain[section]))
    value = rng.choice(HOSTILE)
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.replace("\0", "\\0")[:2000]
    config = CONFIGS / rng.choice(("demo_cpu.yaml", "dla_gdn_1b3.yaml", "delta_mem_recall.yaml"))
    return Case(["train", str(config), f"run.dir={tmp}", f"{section}.{key}={text}", "--dry-run"])


def profile(rng: random.Random, tmp: Path) -> Case:
    values = {
        "partition": "gpu", "account": "a1", "time": "1:00:00", "gpus_per_node": 8, "cpus_per_node": 96, "memory": "0",
        "spare_nodes": 1, "save_seconds": 600, "hang_timeout": 1800, "requeue": True, "env": {"A": "1"},
        "srun_args": ["--x=y"], "exec_prefix": ["apptainer", "exec"], "sbatch_args": ["--exclusive"],
        "exclude": "n[1-3]",
    }  # fmt: skip
    (tmp / "p.yaml").write_bytes(_config_text(rng, values))
    config = [str(OLD / "gdn.yaml"), f"data.dir={OLD / 'data'}", f"run.dir={tmp}"]
    return Case(["submit", *config, "--profile", str(tmp / "p.yaml"), "--nodes", "1", "--dry-run"])


def _read_data(rng: random.Random, data: Path, tmp: Path) -> list[str]:
    return rng.choice((
        ["data", "verify", str(data)],
        ["data", "stats", str(data)],
        ["data", "show", str(data), "1"],
        ["data", "show", str(data), "0", "--row", "--seq-len", "96"],
        ["data", "merge", str(data), "--output", str(tmp / "merged")],
        ["train", str(OLD / "gdn.yaml"), "--dry-run", f"run.dir={tmp}", f"data.dir={data}"],
    ))  # fmt: skip


def index(rng: random.Random, tmp: Path) -> Case:
    data = _copy(OLD / "data", tmp / "data")
    _replace(data / "index.json", mutate_json(rng, (OLD / "data/index.json").read_bytes()))
    return Case(_read_data(rng, data, tmp))


def shard(rng: random.Random, tmp: Path) -> Case:
    """With the checksum of the changed file in the index, so that it is read."""
    data = _copy(OLD / "data", tmp / "data")
    values = json.loads((data / "index.json").read_text())
    entry = rng.choice(values["shards"])
    path = data / entry["split"] / entry["name"]
    content = mutate_tar(rng, path.read_bytes())
    _replace(path, content)
    if rng.random() < 0.9:
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        _replace(data / "index.json", json.dumps(values).encode())
    return Case(_read_data(rng, data, tmp))


def tokenizer(rng: random.Random, tmp: Path) -> Case:
    name = rng.choice(("tokenizer.model", "tokenizer.json", "tokenizer_config.json"))
    if name == "tokenizer.model":
        made = tmp / name
        made.write_bytes(mutate_bytes(rng, (OLD / "data/tokenizer.model").read_bytes()))
    else:
        made = tmp / "tokenizer"
        made.mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            content = (OLD / "backbone" / file).read_bytes()
            (made / file).write_bytes(mutate_json(rng, content) if file == name else content)
    (tmp / "c.jsonl").write_text('{"text": "a text"}\n' * 4)
    out = ["--output", str(tmp / "out"), "--workers", "1", "--val-docs", "1"]
    return Case(["data", "shards", "--input", str(tmp / "c.jsonl"), "--tokenizer", str(made), *out])


def corpus(rng: random.Random, tmp: Path) -> Case:
    name = rng.choice(("c.jsonl", "c.json", "c.txt", "c.jsonl.gz", "c.jsonl.zst", "c.parquet", "c.npy"))
    lines = [json.dumps(mutate_value(rng, {"text": "a text", "n": 1})) for _ in range(3)]
    content = "\n".join(lines).encode(errors="surrogatepass")
    (tmp / name).write_bytes(mutate_bytes(rng, content) if rng.random() < 0.5 else content)
    out = ["--output", str(tmp / "out"), "--workers", "1", "--val-docs", "1"]
    tokens = str(OLD / "data/tokenizer.model")
    return Case(["data", "shards", "--input", str(tmp / name), "--tokenizer", tokens, *out])


def adapter(rng: random.Random, tmp: Path) -> Case:
    made, refused = _copy(OLD / "adapter", tmp / "adapter"), False
    if rng.random() < 0.6:
        path = made / "adapter_config.json"
        _replace(path, mutate_json(rng, path.read_bytes()))
    else:
        path = made / "adapter_model.safetensors"
        content, refused = mutate_tensors(rng, path.read_bytes(), tmp / "scratch")
        _replace(path, content)
    if rng.random() < 0.5:
        return Case(["generate", str(OLD / "backbone"), "--adapter", str(made), *GENERATE], refused)
    out = [str(tmp / "out"), "--format", rng.choice(("safetensors", "upstream"))]
    return Case(["convert", "adapter", str(made), *out], False)


def hf_dir(rng: random.Random, tmp: Path) -> Case:
    kind, refused = rng.choice(("backbone", "export")), False
    made = _copy(OLD / kind, tmp / "hf")
    files = [path.name for path in made.iterdir() if path.suffix in (".json", ".safetensors", ".model")]
    path = made / rng.choice(["config.json"] * 3 + ["model.safetensors"] * 3 + sorted(files))
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        content, refused = mutate_tensors(rng, content, tmp / "scratch")
    else:
        content = (mutate_json if path.suffix == ".json" else mutate_bytes)(rng, content)
    _replace(path, content)
    if rng.random() < 0.4:
        return Case(["convert", "from-hf", str(made), str(tmp / "step_0")], refused)
    more = ["--adapter", str(OLD / "adapter")] if kind == "backbone" else []
    return Case(["generate", str(made), *more, *GENERATE], refused)


def session(rng: random.Random, tmp: Path) -> Case:
    path = tmp / "s.safetensors"
    content, refused = mutate_tensors(rng, (OLD / "session.safetensors").read_bytes(), tmp / "scratch")
    path.write_bytes(content)
    base = ["generate", str(OLD / "backbone"), "--adapter", str(OLD / "adapter"), "--session", str(path)]
    return Case([*base, *GENERATE], refused)


def checkpoint(rng: random.Random, tmp: Path) -> Case:
    run = _copy(TRAINED, tmp / "run")
    step = run / "checkpoints/step_3"
    path = step / rng.choice(("complete.json", "layout.json", "complete.json", "weights/tp_00.safetensors"))
    refused = False
    if path.suffix == ".json":
        content = mutate_json(rng, path.read_bytes())
    else:
        content, refused = mutate_tensors(rng, path.read_bytes(), tmp / "scratch")
    _replace(path, content)
    if rng.random() < 0.3 and not refused:
        config = [str(OLD / "gdn.yaml"), f"data.dir={OLD / 'data'}", f"run.dir={tmp}", "run.name=run"]
        return Case(["train", *config, "--dry-run"])
    # this checkpoint is older than the checksums that tell other shapes and steps apart
    return Case(["convert", "to-hf", str(rng.choice((run, step))), str(tmp / "hf")])


def _mutate_lines(rng: random.Random, data: bytes) -> bytes:
    """A JSON-lines file with one of its objects changed, or its bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutate_json(rng, lines[at])
    return b"\n".join(lines) + b"\n"


RECORDS = {
    "attempt": {"attempt": "7.0", "host": "n1", "pid": 1, "started": 5, "released": True},
    "heartbeat.json": {"step": 3, "doing": "step", "time": 1e9, "attempt": "7.0", "host": "n1", "pid": 1},
    "done": {"step": 3, "time": 1e9, "attempt": "7.0"},
    "ranks/7.0/rank0.json": {"rank": 0, "host": "n1", "pid": 1, "time": 1e9},
    "exits/7.0/rank0.json": {"rank": 0, "exitcode": 1, "message": "it failed", "host": "n1", "pid": 1, "time": 1e9},
    "exits/7.0/hang.json": {"step": 2, "time": 1e9, "silent_s": 130.0, "ranks": [{"rank": 0, "host": "n1", "pid": 1,
                                                                                 "at": "train (a.py:1)"}]},
    "command.json": {"argv": ["dla"], "world_size": 1, "host": "n1", "devices": [], "versions": {"torch": "2.13.0"}},
    "anomalies.jsonl": {"step": 3, "kind": "loss", "loss": None, "grad_norm": 0.5, "limit": None, "action": "skip",
                        "batch": 2, "rows": [[0, 1], [2, 3]], "data": {}},
    "events.jsonl": {"event": "start", "step": 0, "attempt": "7.0", "time": 1e9, "host": "n1", "processes": 1,
                     "last_logged": -1},
    "submissions.jsonl": {"jobs": ["7"], "argv": ["sbatch"], "environment": {"A": "1"}, "git": None, "versions": {}},
}  # fmt: skip


def _run_directory(tmp: Path) -> Path:
    """A finished run with everything that its attempts write."""
    run = Path(shutil.copytree(TRAINED, tmp / "run"))  # no links: a run writes there
    data = json.loads((run / "checkpoints/step_3/data_state.json").read_text()) | {"steps": 2}
    for name, values in RECORDS.items():
        values = values | {"data": data} if "data" in values else values
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((json.dumps(values) + "\n") * (2 if name.endswith("l") else 1))
    return run


def records(rng: random.Random, tmp: Path) -> Case:
    """What a run writes about itself."""
    run = _run_directory(tmp)
    name = rng.choice((*RECORDS, "metrics.jsonl", "metrics.jsonl", "config.yaml"))
    change = _mutate_lines if name.endswith("l") else mutate_json
    if name == "config.yaml":
        _replace(run / name, _config_text(rng, yaml.safe_load((run / name).read_text())))
    else:
        _replace(run / name, change(rng, (run / name).read_bytes()))
    config = [str(OLD / "gdn.yaml"), f"data.dir={OLD / 'data'}", f"run.dir={tmp}", "run.name=run"]
    return Case(rng.choice((
        ["plot", str(run)],
        ["report", str(run)],
        ["logs", str(run)],
        ["jobs", "--runs", str(tmp)],
        ["cancel", str(run)],
        ["checkpoint", "list", str(run)],
        ["checkpoint", "prune", str(run), "--dry-run"],
        ["convert", "to-hf", str(run), str(tmp / "hf")],
        ["train", *config, "--dry-run"],
        ["submit", *config, "--profile", "cpu", "--nodes", "1", "--dry-run"],
    )), about=[name])  # fmt: skip


def episodes(rng: random.Random, tmp: Path) -> Case:
    """Training and held-out episodes of a δ-mem, which a plan reads."""
    lines = (OLD / "train.jsonl").read_text().splitlines()[:3]
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "it is red"},
            {"role": "user", "content": "which colour?"}, {"role": "assistant", "content": "red"}]  # fmt: skip
    lines += [json.dumps({"messages": chat}), json.dumps({"text": "a text of some words " * 4})]
    rng.shuffle(lines)
    name, other = rng.sample(("train", "valid"), 2)
    path = tmp / "e.jsonl"
    path.write_bytes(_mutate_lines(rng, "\n".join(lines).encode()))
    good = tmp / "good.jsonl"
    good.write_text((OLD / "train.jsonl").read_text())
    sections = [f"backbone.dir={OLD / 'backbone'}", f"run.dir={tmp}", f"episodes.{name}={path}",
                f"episodes.{other}={good}", "distillation.weight=1", "episodes.in_prompt=0.5"]  # fmt: skip
    return Case(["train", str(OLD / "adapter.yaml"), *sections, "--dry-run"])


def resume(rng: random.Random, tmp: Path) -> Case:
    """A checkpoint's state of data, optimizer and random numbers, in the form without checksums; in a rank, since the
    run goes on from it for a step."""
    run = _run_directory(tmp)
    step = run / "checkpoints/step_3"
    optimizer = next((step / "optimizer").iterdir())
    path = rng.choice((
        *[step / "data_state.json"] * 3, *[optimizer] * 2, step / "random_00000.pt", run / "attempt", run / "done",
        run / "anomalies.jsonl", run / "metrics.jsonl",
    ))  # fmt: skip
    content, refused = path.read_bytes(), False
    if path == optimizer:
        content, refused = mutate_tensors(rng, content, tmp / "scratch")
    elif path.suffix == ".pt":
        content = mutate_bytes(rng, content)
    else:
        content = (_mutate_lines if path.suffix == ".jsonl" else mutate_json)(rng, content)
    _replace(path, content)
    config = [str(OLD / "gdn.yaml"), f"data.dir={OLD / 'data'}", f"run.dir={tmp}", "run.name=run"]
    if path.name == "anomalies.jsonl":
        return Case(["train", *config, "--replay"], about=[path.name])
    return Case(["train", *config, "training.steps=4", "training.save_every=0"], refused, [path.name])


def numbers(rng: random.Random, tmp: Path) -> Case:
    number = rng.choice(
        ("0", "-1", "1", "1e-300", "1e300", "nan", "inf", "-inf", "0.5", str(2**31), str(2**70), "x", "")
    )
    generate = ["generate", str(OLD / "export"), "--prompt", "hello you"]
    two = ["--max-new-tokens", "2"]
    run = [str(OLD / "gdn.yaml"), f"data.dir={OLD / 'data'}", f"run.dir={tmp}"]
    data = str(OLD / "data")
    tokens = ["data", "tokenizer", "--input", str(OLD / "train.jsonl"), "--output", str(tmp / "tok")]
    return Case(rng.choice((
        *([*generate, *two, option, number] for option in (
            "--temperature", "--top-p", "--top-k", "--repetition-penalty", "--seed", "--threads", "--batch-size",
        )),
        [*generate, "--max-new-tokens", number, "--stop", "e"],
        ["run", *run, "--dry-run", "--nproc", number],
        ["run", *run, "--dry-run", "--nproc", "1", "--hang-timeout", number],
        ["train", *run, "--dry-run", "--world-size", number],
        ["submit", *run, "--profile", "cpu", "--dry-run", "--nodes", number],
        ["submit", *run, "--profile", "cpu", "--dry-run", "--nodes", "1", "--chain", number],
        ["submit", *run, "--profile", "cpu", "--dry-run", "--nodes", "1", "--time", number],
        ["data", "stats", data, "--shards", number],
        ["data", "show", data, number],
        ["data", "show", data, "0", "--row", "--seq-len", number],
        ["data", "verify", data, "--workers", number],
        [*tokens, "--vocab-size", number],
        ["convert", "from-hf", str(OLD / "export"), str(tmp / "step_0"), "--tensor-parallel", number],
        ["convert", "from-hf", str(OLD / "export"), str(tmp / "step_0"), "--capacity", number],
        ["convert", "from-hf", str(OLD / "export"), str(tmp / "step_0"), "--tau", number],
        ["convert", "verify", str(TRAINED), str(OLD / "export"), "--tokens", number],
        ["convert", "verify", str(TRAINED), str(OLD / "export"), "--tokens", "8", "--tolerance", number],
        ["logs", str(TRAINED), "--lines", number],
    )))  # fmt: skip


FORMATS: dict[str, Callable[[random.Random, Path], Case]] = {
    made.__name__: made
    for made in (
        config,
        override,
        profile,
        index,
        shard,
        tokenizer,
        corpus,
        adapter,
        hf_dir,
        session,
        checkpoint,
        records,
        episodes,
        numbers,
    )
}
# their commands train: on a rank of its own
TRAINING = {"resume": resume}
