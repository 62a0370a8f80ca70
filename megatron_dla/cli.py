"""The `dla` command: parse arguments, dispatch, and report user errors as one line with exit code 2."""

from __future__ import annotations

import argparse
import atexit
import errno
import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

from megatron_dla import __version__
from megatron_dla.console import escaped, protect
from megatron_dla.errors import UserError, is_wrong_path
from megatron_dla.masking import mask_text
from megatron_dla.processes import PARENT, end_with_parent

MAX_LINE = 3000


def _train(args: argparse.Namespace) -> int:
    from megatron_dla.config import load_config
    from megatron_dla.tasks.run import replay_batch, train

    if args.world_size and not args.dry_run:
        raise UserError("--world-size is only for --dry-run: the launcher sets the number of processes of a run")
    config = load_config(args.config, args.overrides)
    if args.replay is not None:
        return replay_batch(config, None if args.replay < 0 else args.replay)
    return train(config, dry_run=args.dry_run, world_size=args.world_size)


def _run(args: argparse.Namespace) -> int:
    from megatron_dla.config import load_config
    from megatron_dla.launch.local import run_local
    from megatron_dla.tasks.run import check_run, run_directory, train

    config = load_config(args.config, args.overrides)
    if args.dry_run:
        return train(config, dry_run=True, world_size=args.nproc)
    check_run(config, args.nproc)  # one message instead of one per rank
    return run_local(args.nproc, [args.config, *args.overrides], run_directory(config), args.hang_timeout)


def _plot(args: argparse.Namespace) -> int:
    from megatron_dla.metrics.plots import plot_run

    print(plot_run(Path(args.run_dir)))
    return 0


def _add_training(subparsers) -> None:
    for name, function, text in (
        ("train", _train, "train in this process (or as one rank under torchrun)"),
        ("run", _run, "train with several processes on this machine"),
    ):
        parser = subparsers.add_parser(name, help=text, description=text)
        parser.add_argument("config", help="YAML file, or the name of a shipped one (configs/)")
        parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change keys of the config")
        parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
        if name == "train":
            parser.add_argument(
                "--replay", nargs="?", type=int, const=-1, metavar="STEP",
                help="run the batch of a line of anomalies.jsonl (default: the last) on the checkpoint before it, "
                "print where its numbers go wrong, write nothing",
            )  # fmt: skip
            parser.add_argument("--world-size", type=int, help="with --dry-run: the number of processes to plan for")
        if name == "run":
            parser.add_argument("--nproc", type=int, required=True, help="number of processes")
            parser.add_argument(
                "--hang-timeout",
                type=float,
                metavar="S",
                help="stop the run after S seconds without a step; 0: never (default: ten times the longest of the "
                "last steps, at least 120)",
            )
        parser.set_defaults(func=function)
    parser = subparsers.add_parser("plot", help="draw loss, boundary rate and speed of a run")
    parser.add_argument("run_dir", help="runs/NAME")
    parser.set_defaults(func=_plot)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {escaped(message)}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from megatron_dla.ablation.cli import add_ablate_parser
    from megatron_dla.boundaries.cli import add_boundaries_parser
    from megatron_dla.data_prep.cli import add_data_parser
    from megatron_dla.evaluation.capacity_cli import add_eval_capacity_parser
    from megatron_dla.evaluation.cli import add_eval_parser
    from megatron_dla.evaluation.lm.cli import add_eval_lm_parser
    from megatron_dla.hf.cli import add_convert_parser
    from megatron_dla.kernels.bench.cli import add_bench_parser
    from megatron_dla.launch.cli import add_slurm_parsers
    from megatron_dla.launch.preflight import add_preflight_parser
    from megatron_dla.report.cli import add_report_parser
    from megatron_dla.serving.cli import add_chat_parser, add_generate_parser
    from megatron_dla.serving.http.cli import add_serve_parser
    from megatron_dla.smoke.cli import add_smoke_parser
    from megatron_dla.study.cli import add_study_parser
    from megatron_dla.training.checkpoint_cli import add_checkpoint_parser

    parser = _Parser(prog="dla", description="Pretraining with Dynamic Linear Attention.")
    parser.add_argument("--version", action="version", version=f"megatron-dla {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_data_parser(subparsers)
    _add_training(subparsers)
    add_report_parser(subparsers)
    add_checkpoint_parser(subparsers)
    add_convert_parser(subparsers)
    add_generate_parser(subparsers)
    add_chat_parser(subparsers)
    add_serve_parser(subparsers)
    add_eval_parser(subparsers)
    add_eval_lm_parser(subparsers)
    add_eval_capacity_parser(subparsers)
    add_study_parser(subparsers)
    add_ablate_parser(subparsers)
    add_boundaries_parser(subparsers)
    add_smoke_parser(subparsers)
    add_bench_parser(subparsers)
    add_slurm_parsers(subparsers)
    add_preflight_parser(subparsers)
    return parser


def _report(line: str) -> None:
    """Print one line to stderr; a rank of `dla run` writes it to a file, and the launcher prints the first one."""
    line = "; ".join(part.strip() for part in line.splitlines() if part.strip()).replace(":;", ":")
    line = escaped(mask_text(line))
    if len(line) > MAX_LINE:  # a parser's error quotes what it read
        line = f"{line[: MAX_LINE // 2]} [...] {line[-MAX_LINE // 2 :]}"
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if os.environ.get("DLA_LAUNCHED") and path:
        Path(path).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
    else:
        print(line, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run `dla`. Exit codes: 0 done, 2 bad input, 3 bad nodes, 4 hung, 75 stopped after a checkpoint, 1 other."""
    # import-time warnings: Megatron's about Apex and Transformer Engine (the local spec needs neither), torch's about
    # renamed collectives that DeepSpeed calls
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if (parent := os.environ.pop(PARENT, "")).isdecimal():
        end_with_parent(int(parent))
    parser = build_parser()
    # argparse does not accept positionals after an option (dla run C --nproc 2 a.b=c): take overrides from the rest
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:2] in (["eval", "lm"], ["eval", "capacity"]):  # commands of two words: `eval` has a positional of its own
        argv[:2] = [" ".join(argv[:2])]
    args, rest = parser.parse_known_args(argv)
    if unknown := [text for text in rest if text.startswith("-") or not hasattr(args, "overrides")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        return args.func(args)
    except UserError as error:
        _report(f"dla {args.command}: {error}")
        return 2
    except FloatingPointError as error:
        _report(f"dla {args.command}: {error}")
        return 1
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        name = error.filename2 or error.filename  # of a copy that failed, the target
        where = "" if name is None else f"{name!r}: "
        _report(f"dla {args.command}: {where}{error.strerror}")
        return 2 if is_wrong_path(error) else 1
    except KeyboardInterrupt:
        return 130


def entry() -> NoReturn:
    """The `dla` program: `main` as a process of its own.

    A rank ends without the interpreter's shutdown: a gloo thread that drops a Python object during it would end the
    process with SIGABRT, whatever the exit code was to be.
    """
    sys.stdout = protect(sys.stdout)
    try:
        code = main()
    except KeyboardInterrupt:  # outside of a command: while its parser is made
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    entry()
