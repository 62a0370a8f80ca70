"""The profile of a cluster: site settings of `dla submit` in one YAML file (slurm/profiles/). See docs/slurm.md."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from megatron_dla.config.load import fill
from megatron_dla.config.schema import Directory
from megatron_dla.config.yaml_text import read_yaml
from megatron_dla.errors import ConfigError
from megatron_dla.resources import find_yaml


@dataclass
class Profile:
    """Each key is a flag of sbatch or a setting of slurm/pretrain.sbatch; Slurm's default applies to an empty one."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    """Node features, as for `sbatch --constraint`."""
    exclude: str = ""
    """Nodes never to use, in addition to those in the run's bad_nodes."""
    time: str = ""
    """Time limit of one attempt, as for `sbatch --time`; `dla submit --time` overrides it."""
    gpus_per_node: int = 0
    """0: a cluster without GPUs."""
    gres: str = ""
    """Request the GPUs with `--gres` instead of `--gpus-per-node`, where a site requires it: gpu:h100:8."""
    cpus_per_node: int = 1
    """CPUs of the single task per node, which starts all ranks of the node."""
    memory: str = ""
    """Memory per node, as for `sbatch --mem`; 0 is all of it."""
    processes_per_node: int = 0
    """Ranks per node; 0: one per GPU."""
    spare_nodes: int = 0
    """Allocated in addition to --nodes, to replace nodes that fail preflight."""
    save_seconds: int = 300
    """Seconds before the time limit at which the run is told to save: longer than a step and a save take."""
    requeue: bool = True
    """false if the site does not allow requeueing; use `dla submit --chain` then."""
    max_failures: int = 3
    """Consecutive attempts without a new checkpoint after which the job gives up."""
    hang_timeout: int = 1800
    """Seconds without a step after which the watchdog dumps all stacks and ends the attempt; 0: never."""
    preflight: bool = True
    """Check every node before training."""
    preflight_timeout: int = 300
    """Seconds."""
    python: Directory = ""
    """Python of the ranks, inside the container if there is one; empty: the Python of `dla submit`."""
    host_python: Directory = ""
    """Python of the watchdog, on the host; empty: the Python of `dla submit`."""
    cache_dir: Directory = ""
    """Compiler caches (Triton, Inductor, CUDA), on a local disk of each node; empty: /tmp/dla-cache-USER."""
    site_env: Directory = ""
    """File that the batch script sources first (module load ...)."""
    srun_args: list[str] = field(default_factory=list)
    """Additional flags of srun, e.g. --container-image=... and --container-mounts=... of pyxis."""
    exec_prefix: list[str] = field(default_factory=list)
    """Command before python on each node, e.g. apptainer exec --nv image.sif."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the ranks, e.g. NCCL_SOCKET_IFNAME."""
    sbatch_args: list[str] = field(default_factory=list)
    """Additional flags of sbatch."""

    @property
    def nproc(self) -> int:
        """Ranks per node."""
        return self.processes_per_node or self.gpus_per_node


def _seconds(text: str) -> int | None:
    """A time limit of sbatch (M, M:S, H:M:S, D-H[:M[:S]]) in seconds; None if it is not one."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        return None
    days, *parts = match.groups()
    numbers = [int(p) for p in parts if p is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def check_time(time: str, profile: Profile) -> None:
    """Raises ConfigError if the limit is not a time, or leaves no time to train."""
    if not time or time.upper() in ("INFINITE", "UNLIMITED"):
        return
    if (seconds := _seconds(time)) is None:
        raise ConfigError(f"time limit {time}: must be minutes, H:M:S or D-H:M:S, as for sbatch")
    if seconds <= profile.save_seconds + 60:
        raise ConfigError(
            f"time limit {time} is {seconds} s, but the run is told to save {profile.save_seconds} to "
            f"{profile.save_seconds + 60} s before the limit (save_seconds): use a longer limit"
        )


def load_profile(path: str | Path) -> Profile:
    """Read a profile.

    Raises:
        ConfigError: the file cannot be read, is not a YAML mapping, or has an unknown key or a bad value.
    """
    path = find_yaml(path, "slurm/profiles", "profile")
    values = read_yaml(path, "profile")
    try:
        profile: Profile = fill(Profile, values)
        _check(profile)
    except ConfigError as error:
        raise ConfigError(f"profile {str(path)!r}: {error}") from error
    return profile


def _check(profile: Profile) -> None:
    for name, least in (
        ("gpus_per_node", 0), ("cpus_per_node", 1), ("processes_per_node", 0), ("spare_nodes", 0), ("save_seconds", 1),
        ("max_failures", 1), ("hang_timeout", 0), ("preflight_timeout", 140),
    ):  # fmt: skip
        if (value := getattr(profile, name)) < least:
            raise ConfigError(f"{name} = {value}: must be at least {least}")
    for word in (*profile.srun_args, *profile.exec_prefix):
        if not word or re.search(r"[\s*?\[]", word):  # the batch script splits at spaces
            raise ConfigError(f"srun_args, exec_prefix: {word!r} must be one word, without spaces or wildcards")
    for key, words in (("sbatch_args", profile.sbatch_args), ("srun_args", profile.srun_args)):
        if wrong := [word for word in words if re.match(r"--export(=|$)", word)]:
            raise ConfigError(f"{key}: {wrong[0]!r}: the settings of a run travel by its environment; leave it out")
    for name in profile.env:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(f"env.{name}: not a valid name of an environment variable")
    if profile.nproc == 0:
        raise ConfigError("processes_per_node = 0 means one rank per GPU, but gpus_per_node = 0: set one of them")
    if profile.time:
        check_time(profile.time, profile)
