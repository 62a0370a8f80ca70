"""`dla eval`: command-line arguments and the sequence of tasks."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_dla.errors import UserError
from megatron_dla.evaluation.alternatives import KINDS, parse_alternatives
from megatron_dla.files import check_out, parse_json

TASKS = ("recall", "ppl", "locomo")


def add_eval_parser(subparsers: Any) -> None:
    """Add `eval` to an argparse subparsers object; `func(args)` gives the exit code."""
    text = (
        "Evaluate a δ-mem adapter against its controls, paired: the same questions with the full context; with the "
        "context removed and the state kept, zeroed or swapped for another story's; and with the corrections off. "
        "Also perplexity on plain text, and LoCoMo. Without --adapter: the plain model."
    )
    parser = subparsers.add_parser("eval", help="evaluate a δ-mem adapter with its controls", description=text)
    parser.add_argument("model", metavar="HF_DIR", help="Hugging Face directory of the backbone")
    parser.add_argument(
        "--adapter",
        nargs="+",
        default=[],
        metavar="DIR",
        help="adapter directories; several (training seeds) give one joint table",
    )
    parser.add_argument("--static", metavar="DIR", help="control: an adapter trained with delta_mem.memory=static")
    parser.add_argument(
        "--any-base", action="store_true", help="accept adapters that were trained on another base model"
    )
    parser.add_argument("--tasks", default="recall", help=f"out of {','.join(TASKS)} (default: recall)")
    parser.add_argument("--controls", action="store_true", help="add the zeroed, shuffled and full_adapter conditions")
    recall = parser.add_argument_group("recall")
    recall.add_argument(
        "--recall-task", choices=("profile", "facts", "labels", "most"),
        help="profile: single words; facts: sentences; labels: of examples; most: the most frequent colour (default: "
        "facts if there is a chat template, else profile)",
    )  # fmt: skip
    recall.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="task settings, such as people=2")
    recall.add_argument(
        "--sweep", metavar="KEY=V,V,...", help="a table for each value of a task setting, and a curve over them"
    )
    recall.add_argument(
        "--beside", nargs="+", default=[], metavar="KIND=N",
        help="the same questions by other means, and what each costs: "
        + "; ".join(f"{name}=N: {text}" for name, text in KINDS.items()),
    )  # fmt: skip
    recall.add_argument("--episodes", type=int, default=200, help="default: 200")
    ppl = parser.add_argument_group("ppl")
    ppl.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help='plain text, or .jsonl with {"text": ...}, each on its own',
    )
    ppl.add_argument("--window", type=int, default=512, help="tokens a window (default: 512)")
    ppl.add_argument("--windows", type=int, default=64, help="default: 64")
    locomo = parser.add_argument_group("locomo")
    locomo.add_argument("--locomo", metavar="FILE", help="locomo10.json (CC BY-NC 4.0, not shipped)")
    locomo.add_argument(
        "--context", type=int, default=1024, help="tokens of the conversation in the context (default: 1024)"
    )
    locomo.add_argument(
        "--context-window", choices=("evidence", "last"), default="evidence",
        help="turns around the annotated evidence, or the last turns (default: evidence)",
    )  # fmt: skip
    locomo.add_argument("--questions", type=int, default=0, help="a random subset; 0 = all (default)")
    parser.add_argument("--batch", type=int, default=16, help="batch size (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="seed of questions, windows and bootstrap (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write eval.json and eval.png")
    parser.set_defaults(func=_eval)


def _eval(args: argparse.Namespace) -> int:
    tasks = _check(args)
    from megatron_dla.adapters.files import read_adapter
    from megatron_dla.evaluation.report import write_report
    from megatron_dla.evaluation.table import join_tables
    from megatron_dla.hf.directory import fingerprint
    from megatron_dla.hf.load import load_backbone, load_tokenizer
    from megatron_dla.serving.load import attach_adapter

    adapters = [read_adapter(directory) for directory in args.adapter]
    static = read_adapter(args.static) if args.static else None
    if static is not None and static.config.memory != "static":
        raise UserError(f"--static {args.static}: this adapter has delta_mem.memory = {static.config.memory!r}")
    # reports bad files before the model is loaded
    runs = [run for name in tasks for run in _prepare(name, args, load_tokenizer(args.model))]
    base = load_backbone(args.model, device=args.device)
    control = attach_adapter(base, static, any_base=args.any_base) if static is not None else None
    tables = []
    for run in runs:
        found = []
        for number in range(max(1, len(adapters))):
            model = _put(base, adapters[number] if adapters else None, args.any_base)
            found.append(run(model, control, args.seed + number))
            model.detach()
        table = found[0] if len(found) == 1 else join_tables(found)
        print(f"\n{table.text(args.seed)}", flush=True)
        tables.append(table)
    _print_layers(tables)
    if args.out is not None:
        about = {"model": args.model, "model_sha256": fingerprint(base).sha256, "adapters": args.adapter,
                 "static": args.static, "seed": args.seed}  # fmt: skip
        for path in write_report(args.out, tables, about, args.seed):
            print(path)
    return 0


def _check(args: argparse.Namespace) -> list[str]:
    """The task names in the order given. Raises UserError for invalid or conflicting arguments."""
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not tasks or (unknown := sorted(set(tasks) - set(TASKS))):
        raise UserError(
            f"--tasks {args.tasks}: {repr(unknown[0]) if tasks else 'nothing'} is not a task; use {', '.join(TASKS)}"
        )
    for name, option, given in (("ppl", "--text FILE", args.text), ("locomo", "--locomo FILE", args.locomo)):
        if name in tasks and not given:
            raise UserError(f"--tasks {name} needs {option}")
    least = {"episodes": 2, "window": 2, "windows": 1, "context": 1, "questions": 0, "batch": 1, "seed": 0}
    check_counts(args, least)
    check_out(args.out)
    return tasks


def check_counts(args: argparse.Namespace, least: dict[str, int]) -> None:
    """Raises UserError where a count is below the least one, or not below 2^31 (of seeds 2^63)."""
    for name, low in least.items():
        bits = 63 if name == "seed" else 31
        if not low <= getattr(args, name) < 2**bits:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: use {low} to 2^{bits} - 1")


def _put(base: Any, adapter: Any, any_base: bool) -> Any:
    from megatron_dla.adapters.files import empty_adapter
    from megatron_dla.serving.load import attach_adapter

    return attach_adapter(base, adapter or empty_adapter(), any_base=any_base)


Run = Callable[[Any, Any, int], Any]
"""(model, static control, seed) -> Table."""


def _prepare(name: str, args: argparse.Namespace, tokenizer: Any) -> list[Run]:
    """Read and check a task's inputs; what makes its table, or tables."""
    from megatron_dla.evaluation.tasks import perplexity_table, text_windows

    if name == "recall":
        return _prepare_recall(args, tokenizer)
    if name == "ppl":
        texts = [text for file in args.text for text in _read(file)]
        windows = text_windows(tokenizer, texts, args.window, args.windows, args.seed)
        return [
            lambda model, static, seed: perplexity_table(
                model, windows, batch=args.batch, static=static, settings={"text": args.text}
            )
        ]
    if importlib.util.find_spec("nltk") is None:
        raise UserError("--tasks locomo needs nltk, which is not installed: pip install 'megatron-dla[eval]'")
    from megatron_dla.evaluation.locomo import locomo_table, read_locomo

    items = read_locomo(
        Path(args.locomo), tokenizer, tokens=args.context, window=args.context_window, questions=args.questions,
        seed=args.seed,
    )  # fmt: skip
    settings = {"window": args.context_window, "context": args.context}
    return [
        lambda model, static, seed: locomo_table(
            model, tokenizer, items, seed=seed, batch=args.batch, controls=args.controls, static=static,
            settings=settings,
        )
    ]  # fmt: skip


def _prepare_recall(args: argparse.Namespace, tokenizer: Any) -> list[Run]:
    """One table, or one for each value of `--sweep`."""
    from megatron_dla.evaluation.recall import for_tokenizer, make_task
    from megatron_dla.evaluation.tasks import recall_table

    beside = parse_alternatives(args.beside)
    kind = args.recall_task or ("facts" if getattr(tokenizer, "chat_template", None) else "profile")
    given = _settings("--set", args.set)
    key, _, values = (args.sweep or "").partition("=")
    if args.sweep and (not key or not all(values.split(",")) or len(set(values.split(","))) < 2):
        raise UserError(f"--sweep {args.sweep}: write KEY=V,V,... with at least two different values")
    if key in given:
        raise UserError(f"--sweep {args.sweep}: --set has {key} too; give one of the two")
    varied = [_settings("--sweep", [f"{key}={value}"]) for value in values.split(",")] if key else [{}]
    tasks = [for_tokenizer(make_task(kind, **given, **one), tokenizer) for one in varied]

    def run(task: Any) -> Run:
        return lambda model, static, seed: recall_table(
            model, tokenizer, task, episodes=args.episodes, seed=seed, batch=args.batch, controls=args.controls,
            static=static, beside=beside, sweep=key,
        )  # fmt: skip

    return [run(task) for task in tasks]


def _settings(option: str, pairs: Sequence[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{option} {pair}: write KEY=VALUE")
        try:
            out[key] = int(value)
        except ValueError:
            out[key] = value
    return out


def _read(file: str) -> list[str]:
    """The text of a file, or the texts of a JSONL file."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--text {file}: not UTF-8 text ({error})") from error
    if not file.endswith(".jsonl"):
        return [text]
    texts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UserError(f"--text {file}:{number}: not JSON ({error})") from error
        found = record.get("text") if isinstance(record, dict) else None
        if not isinstance(found, str) or any("\ud800" <= sign <= "\udfff" for sign in found):
            raise UserError(f'--text {file}:{number}: want an object with "text", without halves of surrogate pairs')
        texts.append(found)
    return texts


def _print_layers(tables: Sequence[Any]) -> None:
    rows: list[dict[str, float]] = next((table.layers for table in tables if table.layers), [])
    if rows:
        print("\nlayer  mean beta  half-life (writes)  ||delta o|| / ||o||")
    for row in rows:
        name = f"{row['adapter']}/{row['layer']}" if "adapter" in row else str(row["layer"])
        print(f"{name:>5}  {row['mean_beta']:9.4f}  {row['half_life']:18.1f}  {row['output_ratio']:19.4f}")
