"""Register spills that the compiler of a triton version is known to make, by architecture, kernel and configuration.

The pinned version has none; kernels written since 3.7.1 was tried are not listed for it. A kernel that spills more than
is listed, or where nothing is listed, is a problem: see `Report.problems`. After a change,
`python -m megatron_dla.kernels.aot` prints the numbers; lower the entries with them.
"""

from __future__ import annotations

# triton -> (arch, kernel, configuration) -> bytes a thread of spill stores and of spill loads
KNOWN: dict[str, dict[tuple[int, str, str], tuple[int, int]]] = {
    "3.7.1": {
        (80, "repair_kernel", "smoke_gpu-tp1"): (16, 16),
        (80, "repair_kernel", "gdn-mixed-128"): (12, 12),
    },
}


def known_spills(arch: int, kernel: str, users: list[str], version: str | None = None) -> tuple[int, int]:
    """Most bytes of spill stores and loads listed for a kernel that these configurations share; `version`: triton's."""
    if version is None:
        import triton

        version = triton.__version__
    known = KNOWN.get(version, {})
    listed = [known[arch, kernel, user] for user in users if (arch, kernel, user) in known]
    return max((s for s, _ in listed), default=0), max((load for _, load in listed), default=0)
