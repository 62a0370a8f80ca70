"""Variable tracking, and the most frequent words of a list and of a coded text."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from megatron_dla.evaluation.lm.generated import Place, Sample
from megatron_dla.evaluation.lm.material import NOISE, Haystack

HOPS, COMMON, FREQUENT = 4, 10, 3
SHORT = 4096  # tokens below which words are repeated less often
ZETA_2 = math.pi**2 / 6


def track_variables(place: Place, size: int) -> Sample:
    """A chain of assignments in `size` repetitions of noise; the answer is every variable of the chain. A solved
    example comes first."""
    example = _chain(place.rng, 6, letters=3)
    asked = _chain(place.rng, size * len(NOISE))
    return Sample(f"{example[0]} {', '.join(example[1])}\n\n{asked[0]}", tuple(asked[1]))


def _chain(rng: Random, lines: int, letters: int = 5) -> tuple[str, list[str]]:
    found: dict[str, None] = {}
    while len(found) < HOPS + 1:
        found["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    variables, value = list(found), rng.randrange(10_000, 100_000)
    steps = [f"VAR {variables[0]} = {value}."]
    steps += [f"VAR {b} = VAR {a}." for a, b in pairwise(variables)]
    text = [NOISE[i % len(NOISE)] for i in range(lines)]
    places = sorted((rng.randint(0, lines) for _ in steps), reverse=True)
    for at, step in zip(places, reversed(steps), strict=True):
        text.insert(at, step)
    prompt = (
        "The text below sets variables, some of them to the value of another. Follow the assignments.\n"
        + "\n".join(text)
        + f"\nQuestion: Which variables have the value {value}?\n"
        f"Answer: By these assignments {len(variables)} variables have the value {value}:"
    )
    return prompt, variables


@dataclass(frozen=True)
class CommonWords:
    """The ten words that a numbered list has most often, out of `size` words of the haystack's vocabulary. A solved
    example comes first, if there is room for one."""

    haystack: Haystack

    def __call__(self, place: Place, size: int) -> Sample:
        often, seldom, shown = (6, 1, (3, 1)) if place.length < SHORT else (30, 3, (10, 3))
        examples = 20 if place.length < SHORT else 40
        words = place.rng.sample(self.haystack.vocabulary, size + examples)
        example = _word_list(place.rng, words[size:], *shown)
        asked = _word_list(place.rng, words[:size], often, seldom)
        solved = " ".join(f"{number}. {word}" for number, word in enumerate(words[size : size + COMMON], 1))
        prompt = asked if place.length < SHORT // 2 else f"{example} {solved}\n\n{asked}"
        return Sample(prompt, tuple(words[:COMMON]))


def _word_list(rng: Random, words: Sequence[str], often: int, seldom: int) -> str:
    listed = [*words[:COMMON]] * often + [*words[COMMON:]] * seldom
    rng.shuffle(listed)
    text = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
    return (
        "Some words of the numbered list below occur more often than the others. Keep in mind which.\n"
        f"{text}\nQuestion: Which {COMMON} words occur most often in the list?\n"
        f"Answer: The {COMMON} words that occur most often are:"
    )


def frequent_words(place: Place, size: int) -> Sample:
    """The three most frequent words of a coded text of about `size` words, whose frequencies fall with the square of
    the rank; the first rank is dots, which do not count."""
    vocabulary: dict[str, None] = {}
    while len(vocabulary) < max(20, place.length // 50):
        vocabulary["".join(place.rng.choices(string.ascii_lowercase, k=6))] = None
    ranked = ["...", *vocabulary]
    counts = [int(size / ZETA_2 / rank**2) for rank in range(1, len(ranked) + 1)]
    words = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
    place.rng.shuffle(words)
    prompt = (
        "The coded text below repeats some of its coded words. Count how often each occurs; dots are not words.\n"
        f"{' '.join(words)}\nQuestion: Which three coded words occur most often, dots aside?\n"
        "Answer: The three coded words that occur most often are:"
    )
    return Sample(prompt, tuple(ranked[1 : 1 + FREQUENT]))
