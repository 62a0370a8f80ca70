"""Which base model an adapter or a session belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dla.errors import CheckpointError


@dataclass(frozen=True)
class Fingerprint:
    """A base model: `name` for messages, `sha256` of parts of its weights for comparing."""

    name: str
    sha256: str

    def check(self, other: Fingerprint, what: str) -> None:
        """Raises CheckpointError unless both are the same weights."""
        if self.sha256 != other.sha256:
            raise CheckpointError(
                f"{what} belongs to the base model {self.name!r} (weights {self.sha256[:12]}), this one is "
                f"{other.name!r} ({other.sha256[:12]}): use that model"
            )
