"""What a study found, in a few sentences made of its numbers."""

from __future__ import annotations

from typing import Any

from megatron_dla.study.html import show_difference
from megatron_dla.study.results import verdict

_ANSWERS = {
    "better": "yes, {arm} is better",
    "tie": "no difference beyond what the seeds differ",
    "worse": "no, {control} is better",
    "": "too few seeds to say",
}


def findings(results: dict[str, Any]) -> list[str]:
    """One line on the arms on text, one a question, one a synthetic task at its longest rows."""
    lines = []
    if results["arms"]:
        found = {name: (arm["difference"], 4) for name, arm in results["arms"].items() if arm["difference"]}
        about = f"Held-out text, bits per byte minus those of {results['reference']}, lower is better"
        lines += [f"{about}: {_by_verdict(found, lower=True)}."] if found else []
    for one in results["questions"]:
        answer = _ANSWERS[verdict(one["difference"])].format(**one)
        numbers = f"{one['arm']} minus {one['control']}: {show_difference(one['difference'], 4)}"
        lines.append(f"{one['question']} {answer[0].upper()}{answer[1:]} ({numbers}).")
    for name, task in results["synthetic"].get("tasks", {}).items():
        length, reference = task["lengths"][-1], results["synthetic"]["reference"]
        found = {key: (arm["difference"][length], 3) for key, arm in task["arms"].items() if arm["difference"][length]}
        mean = task["arms"][reference]["mean"][length]
        if mean is not None and found:
            about = f"{name} at {length} tokens, accuracy minus that of {reference} ({mean:.3f})"
            lines.append(f"{about}: {_by_verdict(found, lower=False)}.")
    return lines


def _by_verdict(found: dict[str, tuple[dict[str, Any], int]], lower: bool) -> str:
    """`name difference` of all arms, in groups."""
    groups: dict[str, list[str]] = {"better": [], "tie": [], "worse": [], "": []}
    for name, (difference, digits) in found.items():
        groups[verdict(difference, lower)].append(f"{name} {show_difference(difference, digits)}")
    return "; ".join(f"{group or 'too few seeds'}: {', '.join(names)}" for group, names in groups.items() if names)
