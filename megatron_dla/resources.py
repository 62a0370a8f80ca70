"""Files that ship with the package: run configs, batch scripts, cluster profiles."""

from pathlib import Path

import megatron_dla
from megatron_dla.errors import ConfigError


def resource(path: str) -> Path:
    """The place of a shipped file or folder, in a checkout, an editable install or an installed wheel.

    Args:
        path: as in the repository: `slurm/pretrain.sbatch`, `slurm/profiles`, `configs`.
    """
    found = next((file for root in megatron_dla.__path__ if (file := Path(root) / path).exists()), Path(path))
    return found.resolve()  # a checkout reaches these folders through links


def find_yaml(given: str | Path, folder: str, what: str, pattern: str = "*.yaml") -> Path:
    """The file that a user means: `given` where it exists, else a shipped one, by its name or its path in the
    repository.

    Args:
        folder: `configs` or `slurm/profiles`. what: `config` or `profile`, for the message. pattern: of the names of
            shipped ones.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(given)
    if path.exists():
        return path
    shipped = sorted(resource(folder).glob(pattern))
    for file in shipped:
        if str(given) in (file.stem, f"{folder}/{file.name}"):
            return file
    names = ", ".join(file.stem for file in shipped)
    raise ConfigError(
        f"{what} {str(given)!r} cannot be read (no such file): give the path of a YAML file, or the name of a "
        f"shipped {what}: {names}"
    )
