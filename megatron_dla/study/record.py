"""What the `cell.json` of a cell holds; it is checked where it is read, since the report computes with all of it."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from megatron_dla.errors import ConfigError

Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Part = Annotated[float, Field(strict=True, ge=0, le=1)]
Day = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
Range = Annotated[str, Field(pattern=r"^[0-9]{1,9}(-[0-9]{1,9})?\+?$")]  # of tokens: 1, 2-3, 512+
Index = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Pair = Annotated[list[Finite], Field(min_length=2, max_length=2)]
Triple = Annotated[list[Finite], Field(min_length=3, max_length=3)]


@dataclass(frozen=True)
class Keys:
    """Keys with their types. `always`: of every cell. `ended`: also of those that did not diverge. `maybe`: some
    versions do not write them."""

    always: dict[str, Any]
    ended: dict[str, Any]
    maybe: dict[str, Any]


_MADE: dict[str, Any] = {"machine": str, "date": Day}
_ANY = {"rate": Finite, "seed": Whole, "config": dict[str, dict[str, Any]]}
_Reason = Annotated[str, Field(min_length=1)]
TEXT = Keys(
    always=_ANY,
    ended={"val_bpb": Finite, "parameters": Whole},
    maybe={
        "diverged": _Reason, "held_out": Annotated[list[Pair], Field(min_length=1)],
        "by_position": dict[Range, Finite] | None, "slot_sizes": dict[Range, Finite] | None,
        "slot_weights": dict[Index, Finite] | None, "newest_merge_share_by_layer": list[Finite | None] | None,
        **_MADE, "boundary_rate": Finite | None, "tokens_per_s": Finite | None, "memory_gb": Finite | None,
    },
)  # fmt: skip
SYNTHETIC = Keys(
    always={**_ANY, "curve": list[Triple]},
    ended={"accuracy": dict[Index, Part], "check_accuracy": Part, "steps": Whole, "parameters": Whole},
    maybe={"diverged": _Reason, **_MADE},
)


def check_record(path: Path, record: Any, keys: Keys) -> dict[str, Any]:
    """`record`, which is the content of the file `path`.

    Raises:
        ConfigError: the file, the key that is missing or has another type, and its value.
    """
    if not isinstance(record, dict):
        raise damaged(path, f"{reprlib.repr(record)} is not an object")
    needed = keys.always if "diverged" in record else {**keys.always, **keys.ended}
    for key, kind in {**keys.always, **keys.ended, **keys.maybe}.items():
        if key not in record:
            if key in needed:
                raise damaged(path, f"{key} is missing")
            continue
        try:
            TypeAdapter(kind).validate_python(record[key])
        except ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"].replace("Input should", "must")
            reason = "has another form" if "pattern" in reason else reason
            raise damaged(path, f"{key} = {reprlib.repr(record[key])}: {reason}") from None
    return record


def damaged(path: Path, why: object) -> ConfigError:
    """The error of a cell's file."""
    return ConfigError(f"{str(path)!r} is damaged ({why}): delete it to run this cell again")
