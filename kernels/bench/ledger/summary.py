"""A recording as numbers: one row a component, and the quantities that the targets of the kernels name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .components import COMPONENTS, FUSIBLE, MIXER, SCANS
from .record import Event, Recording, nbytes


@dataclass
class Row:
    """Sums over the operations of one component.

    Attributes:
        launches: kernels, Triton's among them. copies: transfers from the host. syncs: reads on the host.
        flops: of matrix products of torch operations. bytes: each tensor argument of a launch once.
    """

    launches: int = 0
    triton: int = 0
    syncs: int = 0
    copies: int = 0
    flops: int = 0
    bytes: int = 0

    def add(self, event: Event) -> None:
        self.syncs += event.kind == "sync"
        self.copies += event.kind == "copy"
        if event.launches:
            self.launches += 1
            self.triton += event.kind == "triton"
            self.flops += event.flops
            self.bytes += event.bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rows(events: Iterable[Event]) -> dict[str, Row]:
    """Component -> sums, in the order of `COMPONENTS`, without those where nothing ran."""
    found = {name: Row() for name in COMPONENTS}
    for event in events:
        found[event.component].add(event)
    return {name: row for name, row in found.items() if row.launches or row.syncs or row.copies}


def total(parts: Iterable[Row]) -> Row:
    out = Row()
    for part in parts:
        for name, value in asdict(part).items():
            setattr(out, name, getattr(out, name) + value)
    return out


def scan_programs(events: Iterable[Event]) -> dict[str, int]:
    """Kernel that walks over the blocks -> fewest programs of its launches."""
    found: dict[str, int] = {}
    for event in events:
        if event.kind == "triton" and event.component == SCANS:
            found[event.name] = min(found.get(event.name, 1 << 60), event.launch.programs)
    return found


def snapshot_bytes(events: Iterable[Event]) -> int:
    """Slot states that the forward passes write for the output kernel."""
    scans = ("slot_scan_kernel", "state_scan_kernel", "carry_states_kernel")
    forward = [e for e in events if e.kind == "triton" and e.name in scans and not e.backward]
    return sum(nbytes(e.launch.arguments["snap"]) for e in forward if "snap" in e.launch.arguments)


def quantities(recording: Recording, layers: int, micro_batches: int) -> dict[str, Any]:
    """What the targets are stated in: of one layer and micro batch."""
    events, each = recording.events, layers * micro_batches
    inside = [e for e in events if e.micro]
    mixer = [e for e in inside if e.component in MIXER and e.launches]
    fusible = [e for e in inside if e.component in FUSIBLE and e.launches and not e.flops]
    return {
        "host_syncs_a_micro_batch": sum(e.kind == "sync" for e in inside) / micro_batches,
        "copies_from_the_host_a_micro_batch": sum(e.kind == "copy" for e in inside) / micro_batches,
        "fusible_bytes_a_layer": sum(e.bytes for e in fusible) / each,
        "mixer_launches_a_layer": len(mixer) / each,
        "mixer_triton_launches_a_layer": sum(e.kind == "triton" for e in mixer) / each,
        "snapshot_bytes_a_layer": snapshot_bytes(inside) / each,
        "scan_programs": scan_programs(inside),
    }
