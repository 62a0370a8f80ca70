"""Tasks whose prompts are generated to a length in tokens and answered by greedy decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from megatron_dla.console import progress_bar
from megatron_dla.errors import UserError
from megatron_dla.evaluation.lm.items import Item, Task, Values, digest
from megatron_dla.evaluation.lm.models import Subject
from megatron_dla.evaluation.lm.scoring import continue_prompts

GOLDEN = 0.6180339887498949
ROUNDS = 12  # of the search for the size that fits
CLOSE = 100  # which ends where less than a hundredth of the length is left


@dataclass(frozen=True)
class Sample:
    """A prompt with its answers.

    Attributes:
        answers: strings that the continuation should contain. either: one of them is enough, else each counts.
        depth: of the answer in the context, 0 = start to 1 = end; None = it is in several places.
    """

    prompt: str
    answers: tuple[str, ...]
    either: bool = False
    depth: float | None = None


@dataclass(frozen=True)
class Place:
    """What a sample is made for: its random numbers, its number, the length in tokens."""

    rng: Random
    index: int
    length: int

    @property
    def depth(self) -> float:
        """In [0, 1), evenly spread over the samples however many there are."""
        return (self.index + 1) * GOLDEN % 1


Maker = Callable[[Place, int], Sample]
"""(place, size) -> sample; its tokens grow with the size (sentences, words, documents, ...)."""


@dataclass(frozen=True)
class Recipe:
    """How a task makes its prompts.

    Attributes:
        make: the maker. new_tokens: that the answer may have (more where the right answer has more). least: smallest
            size. most: largest size, of a limited material.
    """

    make: Maker
    new_tokens: int
    least: int = 1
    most: int = 1 << 30


class Generated(Task):
    """`accuracy`: share of the answers that occur in the continuation, in any case."""

    metrics = ("accuracy",)
    unit = "prompts"

    def __init__(self, name: str, recipe: Recipe, *, lengths: Sequence[int], count: int, seed: int) -> None:
        super().__init__(name, {"lengths": list(lengths), "items": count, "seed": seed}, chance=0.0)
        self._recipe = recipe

    def items(self, subject: Subject) -> list[Item]:
        out = []
        lengths, count = self.settings["lengths"], self.settings["items"]
        with progress_bar(len(lengths) * count, f"{self.name}: making prompts", unit="") as bar:
            for length in lengths:
                size = 2 * self._recipe.least
                for index in range(count):
                    sample, ids, size = self._fitted(subject, length, index, size)
                    about = {"length": length} | ({} if sample.depth is None else {"depth": sample.depth})
                    key = f"{length}/{index}/{digest(sample.prompt, sample.answers)}"
                    spare = self._new_tokens(subject, sample)
                    out.append(Item(key, len(ids) + spare, (sample, ids, spare), about))
                    bar.update()
        return out

    def sample(self, length: int, index: int, size: int) -> Sample:
        """The sample of a size: the same for the same arguments and seed."""
        rng = Random(f"{self.settings['seed']}/{self.name}/{length}/{index}")
        return self._recipe.make(Place(rng, index, length), size)

    def measure(self, subject: Subject, items: Sequence[Item]) -> list[Values]:
        prompts, spare = ([item.payload[i] for item in items] for i in (1, 2))
        texts = continue_prompts(subject, prompts, spare)
        return [
            {"accuracy": found_in(text, item.payload[0]), "text": text} for item, text in zip(items, texts, strict=True)
        ]

    def _new_tokens(self, subject: Subject, sample: Sample) -> int:
        answer = sample.answers[0] if sample.either else ", ".join(sample.answers)
        return max(self._recipe.new_tokens, len(subject.encode(f" {answer}")) + 8)

    def _fitted(self, subject: Subject, length: int, index: int, size: int) -> tuple[Sample, list[int], int]:
        """About the largest sample that, with its answer, has at most `length` tokens; starts the search at `size`."""
        least, most = self._recipe.least, self._recipe.most

        def tried(size: int) -> tuple[Sample, list[int], int]:
            sample = self.sample(length, index, size)
            ids = subject.encode(sample.prompt, special=True)
            return sample, ids, length - len(ids) - self._new_tokens(subject, sample)

        best = tried(least)
        if best[2] < 0:
            raise UserError(
                f"--lengths {length}: {self.name} needs at least {length - best[2]} tokens with this tokenizer: "
                "leave that length or the task out"
            )
        low, high, room = least, most + 1, best[2]
        size = min(max(size, least + 1), most)
        for _ in range(ROUNDS):
            if not low < size < high or room <= length // CLOSE:
                break
            found = tried(size)
            slope = max((room - found[2]) / (size - low), 1e-9)
            if found[2] >= 0:
                low, best, room = size, found, found[2]
                size += min(max(1, int(room / slope)), 3 * size)  # a step without new tokens says nothing
            else:
                high = size
                size -= max(1, int(-found[2] / slope) + 1)
            size = min(max(size, low + 1), high - 1)
        if low == most and room > length // 4:
            raise UserError(
                f"--lengths {length}: {self.name} has material for {length - room} tokens only: give more of it "
                "(--haystack), or shorter lengths"
            )
        return best[0], best[1], low


def found_in(text: str, sample: Sample) -> float:
    """Share of the answers that the text contains; of `either`, whether it contains one."""
    hits = [answer.lower() in text.lower() for answer in sample.answers]
    return float(any(hits)) if sample.either else sum(hits) / len(hits)
