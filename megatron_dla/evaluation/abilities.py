"""Two abilities of a memory besides recalling facts: to learn from examples, and to see what holds for a whole text.

With `facts` and its keys `filler`, `updates` and `shifts` (recall.py) these are small, generated counterparts of the
abilities that MemoryAgentBench (arXiv 2507.05257) asks for: accurate retrieval, test-time learning, long-range
understanding, and conflict resolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_dla.evaluation.stories import RELATIONS, CompletionTask, Question, Story

LABELS = "north south east west"
SENTENCES = (
    "A {} ball rolled by.", "Then came a {} car.", "There was a {} door.", "Somebody wore a {} hat.",
    "The next one was {}.", "A {} kite went up.",
)  # fmt: skip


@dataclass(frozen=True)
class LabelsTask(CompletionTask):
    """Test-time learning: every kind of word has a label, new in each story; asked is a word that was not told."""

    kinds: int = 2
    """Kinds of words (colours, pets, cities, jobs), and as many labels."""
    examples: int = 4
    """Told of each kind."""
    kind = "labels"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.between("kinds", 2, len(RELATIONS))
        self.between("examples", 1, min(len(words.split()) for _, _, words in RELATIONS.values()) - 1)

    def story(self, rng: np.random.Generator, split: str) -> Story:
        names = LABELS.split()
        labels = tuple(names[i] for i in rng.permutation(len(names))[: self.kinds])
        told, questions = [], []
        for label, number in zip(labels, rng.permutation(len(RELATIONS)), strict=False):
            words = list(RELATIONS.values())[number][2].split()
            order = [words[i] for i in rng.permutation(len(words))]
            told += [f"{word}: {label}." for word in order[: self.examples]]
            questions.append(Question(f" {order[self.examples]}:", label, tuple(sorted(labels)), "", "."))
        text = " ".join(told[i] for i in rng.permutation(len(told)))
        asked = tuple(questions[i] for i in rng.permutation(len(questions)))
        return self.completions([text], asked)


@dataclass(frozen=True)
class MostTask(CompletionTask):
    """Long-range understanding: which of some colours comes most often in the whole text; twice as often as others."""

    colours: int = 4
    repeats: int = 2
    """Of the other colours."""
    kind = "most"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.between("colours", 2, len(RELATIONS["colour"][2].split()))
        self.between("repeats", 1, 1000)

    def story(self, rng: np.random.Generator, split: str) -> Story:
        words = RELATIONS["colour"][2].split()
        colours = [words[i] for i in rng.choice(len(words), self.colours, replace=False)]
        shown = colours[:1] * (2 * self.repeats) + colours[1:] * self.repeats
        told = [SENTENCES[rng.integers(len(SENTENCES))].format(shown[i]) for i in rng.permutation(len(shown))]
        question = Question(" The colour that came most often is", colours[0], tuple(sorted(colours)), "", ".")
        return self.completions([" ".join(told)], (question,))
