"""`dla eval lm`: arguments, and the sequence of models and tasks."""

from __future__ import annotations

import argparse
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dla.errors import UserError
from megatron_dla.evaluation.cli import check_counts
from megatron_dla.files import check_out

if TYPE_CHECKING:
    from megatron_dla.evaluation.lm.items import Task


def add_eval_lm_parser(subparsers: Any) -> None:
    """Add `eval lm` to an argparse subparsers object; `func(args)` gives the exit code."""
    text = (
        "Compare language models on the same text and questions: exports of `dla convert to-hf`, plain Hugging Face "
        "models, runs (their newest checkpoint). With --out, an evaluation that was stopped goes on where it was."
    )
    parser = subparsers.add_parser("eval lm", help="evaluate language models, several side by side", description=text)
    parser.add_argument(
        "models", nargs="+", metavar="[NAME=]MODEL", help="an export, a Hugging Face directory, or a run; the first is "
        "the one that the others are compared with",
    )  # fmt: skip
    parser.add_argument(
        "--adapter", nargs="+", default=[], metavar="[NAME=]DIR", help="δ-mem adapters: the first model with each of "
        "them, reading and writing, compared like one more model",
    )  # fmt: skip
    plain = parser.add_argument_group("perplexity and bits per byte")
    plain.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text, JSONL (field `text`) or parquet")
    plain.add_argument("--window", type=int, default=1024, help="tokens of an input (default: 1024)")
    plain.add_argument(
        "--stride", type=int, default=0, help="tokens between windows; smaller than --window: they overlap, and each "
        "token is scored once, with as much context as there is (default: the window)",
    )  # fmt: skip
    plain.add_argument("--windows", type=int, default=0, help="a random subset; 0 = all (default)")
    asked = parser.add_argument_group("questions")
    asked.add_argument(
        "--questions", nargs="+", default=[], metavar="[NAME=]FILE", help="JSONL, also compressed: multiple choice "
        "and last words, scored as lm-eval does",
    )  # fmt: skip
    asked.add_argument("--limit", type=int, default=0, help="the first so many rows of each file; 0 = all (default)")
    asked.add_argument(
        "--lm-eval", nargs="+", default=[], metavar="TASK", help="tasks of lm-eval by name, or its YAML files; their "
        "data comes from the network or its cache",
    )  # fmt: skip
    made = parser.add_argument_group("generated long-context tasks")
    made.add_argument(
        "--tasks", default="", metavar="LIST", help="ruler (its 13 tasks), single ones of them (niah_single_1, ..., "
        "vt, cwe, fwe, qa_1, qa_2), mqar, key_value",
    )  # fmt: skip
    made.add_argument(
        "--lengths", nargs="+", default=["1K", "2K", "4K"], metavar="N", help="tokens of prompt and "
        "answer, such as 4096 or 128K (default: 1K 2K 4K)",
    )  # fmt: skip
    made.add_argument("--items", type=int, default=20, help="prompts of each task and length (default: 20)")
    made.add_argument("--haystack", nargs="+", default=[], metavar="FILE", help="text of a book's size")
    made.add_argument(
        "--qa", nargs="+", default=[], metavar="FILE", help="of qa_1 and qa_2: in the form of SQuAD or HotpotQA"
    )
    made.add_argument("--pairs", type=int, default=8, help="of mqar (default: 8)")
    parser.add_argument(
        "--batch-tokens", type=int, default=8192, help="of a forward pass, padding included (default: 8192)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of items, windows and bootstrap (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: as stored")
    parser.add_argument("--threads", type=int, help="of a CPU (default: 1 for models under 100M parameters)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write eval.json, eval.png and items.jsonl, which a later call goes "
        "on from",
    )  # fmt: skip
    parser.set_defaults(func=_eval_lm)


def _length(text: str) -> int:
    number = text[:-1] if text[-1:] in ("k", "K") else text
    if not number.isdecimal() or not 1 <= int(number) <= 1 << 30:
        raise UserError(f"--lengths {text}: write tokens, such as 4096 or 128K")
    return int(number) * (1 if number == text else 1024)


def _eval_lm(args: argparse.Namespace) -> int:
    _check(args)
    from megatron_dla.evaluation.lm.journal import Journal
    from megatron_dla.evaluation.lm.models import Subject, load_subject, read_names, with_adapter
    from megatron_dla.evaluation.lm.report import lengths_text, task_summary, task_table, write_report
    from megatron_dla.evaluation.lm.runner import Runner

    models = read_names(args.models)
    adapters = read_names(args.adapter, models, "adapter")
    tasks = _tasks(args)  # reports bad files before a model is loaded
    base = next(iter(models))

    def load(name: str) -> Subject:
        if name in models:
            return load_subject(name, models[name], device=args.device, dtype=args.dtype)
        return with_adapter(load(base), name, adapters[name])

    about: dict[str, Any] = {"models": {}, "seed": args.seed}
    with Journal(args.out) as journal:
        runner = Runner(tasks, journal, args.batch_tokens, args.threads)
        for name in (*models, *adapters):
            subject = runner.run(partial(load, name))
            found = {"path": subject.path, "digest": subject.digest, "tokenizer": subject.tokenizer_digest}
            about["models"][name] = found
            del subject
    summaries = []
    for task in tasks:
        table = task_table(task, runner.outcomes[task.name])
        summaries.append(task_summary(task, runner.outcomes[task.name], table, args.seed))
        if "by_length" not in summaries[-1] or len(about["models"]) > 1 or len(task.metrics) > 1:
            print(f"\n{table.text(args.seed)}", flush=True)
        for name, value in summaries[-1].get("perplexity", {}).items():
            print(f"{name}: perplexity {value:.4f}")
    if lengths := lengths_text(summaries):
        print(f"\naccuracy in percent by tokens of the prompt\n{lengths}")
    if args.out is not None:
        for written in write_report(args.out, summaries, about):
            print(written)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for invalid or conflicting arguments."""
    if not (args.text or args.questions or args.lm_eval or args.tasks):
        raise UserError("no task: give --text FILE, --questions FILE, --lm-eval TASK or --tasks LIST")
    args.stride = args.stride or args.window
    least = {"window": 1, "stride": 1, "windows": 0, "limit": 0, "items": 1, "pairs": 1, "batch_tokens": 1, "seed": 0}
    check_counts(args, least)
    args.lengths = sorted({_length(text) for text in args.lengths})
    if args.stride > args.window:
        raise UserError(f"--stride {args.stride}: must be at most --window {args.window}, or tokens would be left out")
    check_out(args.out)


def _tasks(args: argparse.Namespace) -> list[Task]:
    from megatron_dla.evaluation.lm.harness import Harness
    from megatron_dla.evaluation.lm.perplexity import Perplexity, read_documents
    from megatron_dla.evaluation.lm.questions import read_questions

    tasks: list[Task] = []
    if args.text:
        options = {"window": args.window, "stride": args.stride, "count": args.windows, "seed": args.seed}
        tasks.append(Perplexity(read_documents(args.text), budget=args.batch_tokens, files=args.text, **options))
    tasks += [read_questions(argument, args.limit, args.batch_tokens) for argument in args.questions]
    tasks += [Harness(name, args.limit, args.batch_tokens) for name in args.lm_eval]
    tasks += _generated(args) if args.tasks else []
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise UserError(f"two tasks are called {task.name!r}: name them, as in --questions first={task.name}.jsonl")
        seen.add(task.name)
    return tasks


def _generated(args: argparse.Namespace) -> list[Task]:
    """The tasks of --tasks, in the order given. Raises UserError for an unknown one, or one that lacks a file."""
    from megatron_dla.evaluation.lm.material import Haystack
    from megatron_dla.evaluation.lm.perplexity import read_documents
    from megatron_dla.evaluation.lm.retrieval import KEY_VALUE, MQAR, Recall, key_value_task
    from megatron_dla.evaluation.lm.ruler import RULER, ruler_tasks

    given = [name.strip() for name in args.tasks.split(",") if name.strip()]
    names = list(dict.fromkeys(name for word in given for name in (RULER if word == "ruler" else (word,))))
    unknown = [repr(name) for name in names if name not in (*RULER, MQAR, KEY_VALUE)]
    if unknown or not names:
        raise UserError(
            f"--tasks {args.tasks}: {unknown[0] if unknown else 'nothing'} is not a task; use ruler, "
            f"{', '.join(RULER)}, {MQAR}, {KEY_VALUE}"
        )

    @cache
    def haystack() -> Haystack:
        if not args.haystack:
            raise UserError(f"--tasks {args.tasks} needs --haystack FILE, a text of a book's size")
        return Haystack(read_documents(args.haystack, "--haystack"))

    shared: dict[str, Any] = {"lengths": args.lengths, "count": args.items, "seed": args.seed}
    tasks: list[Task] = []
    for name in names:
        if name == MQAR:
            tasks.append(Recall(pairs=args.pairs, budget=args.batch_tokens, **shared))
        elif name == KEY_VALUE:
            tasks.append(key_value_task(**shared))
        else:
            tasks += ruler_tasks([name], haystack=haystack, documents=args.qa, **shared)
    return tasks
