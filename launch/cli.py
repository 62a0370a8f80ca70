"""Arguments of `dla submit`, `jobs`, `logs` and `cancel`; the implementation is imported when a command runs."""

from __future__ import annotations

import argparse
import copy
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any


def add_slurm_parsers(subparsers: Any) -> None:
    """Add the four commands to an argparse subparsers object; `args.func(args)` returns the exit code."""
    text = "submit a training run to a Slurm cluster; its job resumes after time limits and failures"
    parser = subparsers.add_parser("submit", help="train on a Slurm cluster", description=text)
    parser.add_argument("config", help="YAML file, or the name of a shipped one (configs/)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change keys of the config")
    parser.add_argument("--profile", required=True, metavar="FILE", help="YAML file of the cluster (slurm/profiles/)")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="number of nodes to train on")
    parser.add_argument("--time", default="", metavar="T", help="time limit of one attempt, as for sbatch")
    parser.add_argument("--chain", type=int, default=1, metavar="K", help="submit K jobs in sequence, none requeued")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan, submit nothing")
    parser.set_defaults(func=_submit)
    parser = subparsers.add_parser("jobs", help="list the submitted runs with job, state and step")
    _add_runs(parser)
    parser.set_defaults(func=_jobs)
    parser = subparsers.add_parser("logs", help="print the log of a run's newest attempt")
    parser.add_argument("run", help="run directory, or its name under --runs")
    parser.add_argument("-f", "--follow", action="store_true", help="keep printing until the run has no job left")
    parser.add_argument("-n", "--lines", type=int, default=20, metavar="N", help="last lines of each log (default: 20)")
    _add_runs(parser)
    parser.set_defaults(func=_logs)
    parser = subparsers.add_parser("cancel", help="save a checkpoint, end the run's jobs and let none start again")
    parser.add_argument("run", help="run directory, or its name under --runs")
    parser.add_argument("--now", action="store_true", help="end running jobs immediately, without a checkpoint")
    _add_runs(parser)
    parser.set_defaults(func=_cancel)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="run.dir of the configs (default: runs)"
    )


def _submit(args: argparse.Namespace) -> int:
    from megatron_dla.errors import ConfigError
    from megatron_dla.launch import submit
    from megatron_dla.launch.slurm import known_bad_nodes
    from megatron_dla.masking import mask_command, mask_environment
    from megatron_dla.resources import find_yaml
    from megatron_dla.tasks.run import checkpoint_gb, git_state, train, versions

    request = submit.make_request(args.config, args.overrides, args.profile, args.nodes, args.time, args.chain)
    planned, gpus = copy.deepcopy(request.config), request.profile.gpus_per_node
    if planned.training.device == "cuda" and not gpus:
        raise ConfigError(f"training.device = cuda, but gpus_per_node = 0 in {args.profile}: use another profile")
    if planned.training.device == "auto" and gpus:
        planned.training.device = "cuda"
    if not args.dry_run:
        submit.check_free(request)  # first: a running job writes and deletes the checkpoints that the plan reads
    train(planned, dry_run=True, world_size=request.world_size)
    request = replace(request, checkpoint_gb=checkpoint_gb(planned))
    argv, env = submit.sbatch_argv(request), submit.job_environment(request)
    for name in known_bad_nodes(request.run_dir)[1]:
        print(f"ignored      {name!r} in {request.run_dir / 'bad_nodes'} is not a node of this cluster")
    if args.dry_run:
        print("environment  " + " ".join(f"{k}={shlex.quote(v)}" for k, v in mask_environment(env).items()))
        print(f"command      {shlex.join(map(mask_command, argv))}")
        if shutil.which("sbatch") is None:
            print("slurm        not installed on this machine, so sbatch --test-only was skipped")
            return 0
    print(f"slurm        {submit.test_only(argv, env)}", flush=True)
    if args.dry_run:
        return 0
    about = {"config": str(find_yaml(args.config, "configs", "config").absolute()), "overrides": args.overrides}
    jobs = submit.submit(request, about | {"git": git_state(), "versions": versions()})
    print(f"submitted    job {', then '.join(jobs)}; run directory {request.run_dir}")
    print(f"follow       dla logs -f {request.run_dir}    list all: dla jobs    end: dla cancel {request.run_dir}")
    return 0


def _jobs(args: argparse.Namespace) -> int:
    from megatron_dla.launch.jobs import list_jobs, render

    print(render(list_jobs(args.runs)))
    return 0


def _logs(args: argparse.Namespace) -> int:
    from megatron_dla.errors import UserError
    from megatron_dla.launch.jobs import find_run, tail

    if args.lines < 1:
        raise UserError(f"--lines {args.lines}: must be at least 1")
    for text in tail(find_run(args.run, args.runs), args.lines, args.follow):
        print(text, flush=True)
    return 0


def _cancel(args: argparse.Namespace) -> int:
    from megatron_dla.launch.jobs import cancel, find_run

    for line in cancel(find_run(args.run, args.runs), args.now):
        print(line)
    return 0
