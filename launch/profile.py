"""A cluster's profile: what `dla submit` must know of a site, in one YAML file (slurm/profiles/). See docs/slurm.md."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megatron_dla.config.load import fill
from megatron_dla.errors import ConfigError


@dataclass
class Profile:
    """One key, one flag of sbatch or one setting of slurm/pretrain.sbatch; an empty one is left to Slurm's default."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    """Node features, as for `sbatch --constraint`."""
    exclude: str = ""
    """Nodes never to use, beside those in the run's bad_nodes."""
    time: str = ""
    """Limit of one attempt, as for `sbatch --time`; `dla submit --time` goes before it."""
    gpus_per_node: int = 0
    """0: a cluster without GPUs."""
    gres: str = ""
    """Asks for the GPUs by `--gres` instead of `--gpus-per-node`, where a site wants it so: gpu:h100:8."""
    cpus_per_node: int = 1
    """For the one task of a node, which starts all its ranks."""
    memory: str = ""
    """Of a node, as for `sbatch --mem`; 0 is all of it."""
    processes_per_node: int = 0
    """Ranks; 0: one a GPU."""
    spare_nodes: int = 0
    """Allocated beyond --nodes, to take the place of nodes that preflight finds bad."""
    save_seconds: int = 300
    """How long before the time limit the run is asked to save: a step, a save and Slurm's 60 s of slack."""
    requeue: bool = True
    """false where the site does not allow it: use `dla submit --chain` there."""
    max_failures: int = 3
    """Attempts in a row without a new checkpoint, then the job gives up."""
    hang_timeout: int = 1800
    """Seconds without a step, then the watchdog dumps all stacks and ends the attempt; 0: never."""
    preflight: bool = True
    """Look at every node before training."""
    preflight_timeout: int = 300
    """Seconds."""
    python: str = ""
    """Runs the ranks; empty: the Python of `dla submit`. A path inside the container where there is one."""
    host_python: str = ""
    """Runs the watchdog beside the batch script; empty: the Python of `dla submit`."""
    cache_dir: str = ""
    """On the nodes' own disks, for the caches of Triton and the compilers; empty: /tmp/dla-cache-USER."""
    site_env: str = ""
    """File that the batch script sources first (module load ...)."""
    srun_args: list[str] = field(default_factory=list)
    """More flags for srun: --container-image=... and --container-mounts=... of pyxis."""
    exec_prefix: list[str] = field(default_factory=list)
    """Words before python on each node: apptainer exec --nv image.sif."""
    env: dict[str, str] = field(default_factory=dict)
    """Variables of the ranks: NCCL_SOCKET_IFNAME and the like."""
    sbatch_args: list[str] = field(default_factory=list)
    """More flags for sbatch."""

    @property
    def nproc(self) -> int:
        """Ranks a node."""
        return self.processes_per_node or self.gpus_per_node


def _seconds(text: str) -> int | None:
    """A time limit of sbatch (M, M:S, H:M:S, D-H[:M[:S]]) in seconds; None: no limit or not one."""
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
    """ConfigError where the limit is no time, or leaves no time to train."""
    if not time or time.upper() in ("INFINITE", "UNLIMITED"):
        return
    if (seconds := _seconds(time)) is None:
        raise ConfigError(f"time limit {time}: write minutes, H:M:S or D-H:M:S, as for sbatch")
    if seconds <= profile.save_seconds + 60:
        raise ConfigError(
            f"time limit {time} is {seconds} s, and the run is asked to save {profile.save_seconds} to "
            f"{profile.save_seconds + 60} s before the limit (save_seconds): ask for more time"
        )


def load_profile(path: str | Path) -> Profile:
    """Read a profile.

    Raises:
        ConfigError: no such file, no YAML mapping, an unknown key or a wrong value.
    """
    path = Path(path)
    try:
        text = path.read_text()
        values = yaml.safe_load(text) or {}
    except OSError as error:
        raise ConfigError(f"profile {str(path)!r} cannot be read ({error.strerror}): see slurm/profiles/") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"profile {str(path)!r} is not valid YAML: {str(error).replace(chr(10), ' ')}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"profile {str(path)!r} must be a mapping of keys, got {type(values).__name__}")
    if "time" in values:
        values["time"] = yaml.load(text, yaml.BaseLoader)["time"]  # YAML would read 24:00:00 as the number 86400
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
        if not word or re.search(r"[\s*?\[]", word):  # the batch script splits them at blanks
            raise ConfigError(f"{word!r} in srun_args or exec_prefix: one word an item, without blanks or wildcards")
    for name in profile.env:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(f"env.{name}: not the name of a variable")
    if profile.nproc == 0:
        raise ConfigError("processes_per_node = 0 means one rank a GPU, and gpus_per_node = 0: set one of them")
    if profile.time:
        check_time(profile.time, profile)
