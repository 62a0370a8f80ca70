"""The state of a loader in a checkpoint: what it must agree with, and how the states of all ranks become one.

Version 1 is that of one data directory in packing `concat`: `streams` holds positions of `TokenStream`. Version 2 has
`sources` {name: fingerprint}, `packing`, and `mixtures`, the weights that the run had, each with the tokens before it;
`streams` holds positions of `MixedStream`. Both have `split`, `seed`, `seq_len`, `num_streams`, `steps`, `tokens_seen`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_dla.errors import DataError


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge the states of all ranks into one, which can be loaded at any dp_size that divides num_streams.

    Raises DataError if the states are from different runs or steps, overlap, or lack a stream.
    """
    if not states:
        raise DataError("no loader state to merge: pass the state of every data-parallel rank")
    merged = {**states[0], "streams": {}}
    for state in states:
        for name in merged.keys() - {"streams"}:
            if state[name] != merged[name]:
                raise DataError(
                    f"{name} differs between loader states: {merged[name]!r} and {state[name]!r}; "
                    "use states from one checkpoint"
                )
        if twice := merged["streams"].keys() & state["streams"].keys():
            raise DataError(f"loader states overlap in streams {sorted(twice)}; pass each rank's state once")
        merged["streams"].update(state["streams"])
    check_streams(merged, range(merged["num_streams"]))
    merged["streams"] = {str(j): merged["streams"][str(j)] for j in range(merged["num_streams"])}
    return merged


def count_in(state: Mapping[str, Any], key: str) -> int:
    """A count of a state. Raises DataError where it is none."""
    value = state[key]
    if type(value) is not int or not 0 <= value < 2**63:
        raise DataError(f"the loader state has {key} = {value!r}, which is no count; use another checkpoint")
    return value


def check_streams(state: dict[str, Any], streams: Iterable[int]) -> None:
    """Raises DataError if the state lacks one of `streams`."""
    missing = [j for j in streams if str(j) not in state["streams"]]
    if missing:
        raise DataError(f"the loader state lacks streams {missing}; merge the states of all ranks with merge_states")


def check_same(state: dict[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises DataError if the state, of version 2, is not of this loader; `identity`: what it must have."""
    for name, value in identity.items():
        if name != "sources" and state.get(name) != value:
            raise _changed(name, state.get(name), value)
    for name, fingerprint in state["sources"].items():
        if name not in identity["sources"]:
            raise DataError(
                f"cannot resume: the checkpoint has a source {name!r}, this run has not; "
                "add it with a weight of 0, so that its position is kept"
            )
        if fingerprint != identity["sources"][name]:
            what = "the data (index fingerprint)" + (f" of source {name!r}" if len(state["sources"]) > 1 else "")
            more = "; to go on with other data, list both directories in data.sources, with any weights"
            raise _changed(what, fingerprint, identity["sources"][name], more)


def _changed(what: str, before: Any, now: Any, more: str = "") -> DataError:
    return DataError(
        f"cannot resume: {what} was {before!r} in the checkpoint and is {now!r} now; set it back, or begin another run "
        f"(run.name){more}"
    )


def to_version_1(state: dict[str, Any], source: str) -> dict[str, Any]:
    """The state of a loader of one directory in packing `concat`, called `source`."""
    kept = {name: state[name] for name in ("split", "seed", "seq_len", "num_streams", "steps", "tokens_seen")}
    streams = {j: dict(stream["sources"][source]) for j, stream in state["streams"].items()}
    for stream in streams.values():
        del stream["tokens"]
    return {"version": 1, **kept, "index": state["sources"][source], "streams": streams}


def to_version_2(state: dict[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """A state of any version as one of version 2; one directory becomes the source with its fingerprint."""
    if state.get("version") != 1:
        return state
    (name, *_) = [name for name, fingerprint in sources.items() if fingerprint == state["index"]] or sources
    tokens = count_in(state, "tokens_seen") // max(1, count_in(state, "num_streams"))
    streams = {
        j: {"weights": {}, "drawn": {}, "sources": {name: {"tokens": tokens, **stream}}}
        for j, stream in state["streams"].items()
    }
    kept = {key: value for key, value in state.items() if key != "index"}
    return kept | {
        "version": 2, "packing": "concat", "sources": {name: state["index"]}, "mixtures": [], "streams": streams,
    }  # fmt: skip
