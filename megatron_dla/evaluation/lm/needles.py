"""Needles in a haystack: values of keys, hidden in sentences, noise, or other needles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dla.evaluation.lm.generated import Place, Sample
from megatron_dla.evaluation.lm.material import NOISE, Haystack, names, numbers, uuids


@dataclass(frozen=True)
class Needles:
    """A maker of prompts; the size is in sentences (of noise: in repetitions).

    Attributes:
        among: `noise` (five sentences, repeated), `text` (a haystack) or `needles` (of other keys).
        keys: with values, of which `queries` are asked for. values: of each key.
        key, value: what they are: `names`, `numbers` or `uuids`.
    """

    among: str
    keys: int = 1
    values: int = 1
    queries: int = 1
    key: str = "names"
    value: str = "numbers"
    haystack: Haystack | None = None

    def __call__(self, place: Place, size: int) -> Sample:
        rng, draw = place.rng, {"names": names, "numbers": numbers, "uuids": uuids}
        others = size if self.among == "needles" else 0
        keys = draw[self.key](rng, self.keys + others)
        values = draw[self.value](rng, self.keys * self.values + others)
        noun = "number" if self.value == "numbers" else "code"
        hidden = [
            (_needle(noun, keys[k], values[k * self.values + v])) for k in range(self.keys) for v in range(self.values)
        ]
        answers = tuple(values[: self.queries * self.values])
        single = len(answers) == 1
        if self.among == "needles":
            rest = zip(keys[self.keys :], values[self.keys * self.values :], strict=True)
            context = [_needle(noun, key, value) for key, value in rest]
        else:
            context = list(NOISE) * size if self.haystack is None else self.haystack.some(rng, size)
        at = [rng.random() for _ in hidden]
        if single:
            at[0] = place.depth
        for depth, needle in sorted(zip(at, hidden, strict=True), reverse=True):
            context.insert(round(depth * len(context)), needle)
        text = (" " if self.among == "text" else "\n").join(context)
        asked = _listed(keys[: self.queries])
        prompt = _asked(text, noun, asked, single)
        return Sample(prompt, answers, depth=place.depth if single else None)


def _needle(noun: str, key: str, value: str) -> str:
    return f"One of the secret {noun}s of {key} is {value}."


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _asked(text: str, noun: str, asked: str, single: bool) -> str:
    if single:
        return (
            f"A secret {noun} is hidden in the text below. Keep it in mind; the question after the text is about it.\n"
            f"{text}\nQuestion: Which secret {noun} of {asked} does the text give?\n"
            f"Answer: The secret {noun} of {asked} in the text is"
        )
    return (
        f"Secret {noun}s are hidden in the text below. Keep them in mind; the question after the text is about them.\n"
        f"{text}\nQuestion: Which secret {noun}s of {asked} does the text give?\n"
        f"Answer: All secret {noun}s of {asked} in the text are"
    )
