"""Training text without a download: sentences from a small grammar, about one topic at a time."""

from __future__ import annotations

import json
import random
from pathlib import Path

_TOPICS = {
    "harbour": ("the ship", "a sailor", "the tide", "the old pier", "a gull", "the lighthouse"),
    "kitchen": ("the cook", "a pot of soup", "the oven", "fresh bread", "the baker", "a wooden spoon"),
    "mountain": ("the climber", "a narrow path", "the summit", "deep snow", "the valley", "a cold wind"),
    "library": ("the reader", "a heavy book", "the quiet hall", "an old map", "the keeper", "a letter"),
    "garden": ("the gardener", "a red rose", "the hedge", "warm rain", "the beehive", "an apple tree"),
}
_VERBS = ("waits for", "remembers", "turns towards", "leans on", "covers", "follows", "looks after", "belongs to")
_ENDS = ("in the morning", "before noon", "every evening", "without a sound", "for a long time", "once again")


def document(rng: random.Random) -> str:
    """A few paragraphs; each keeps to one topic."""
    paragraphs = []
    for _ in range(rng.randint(2, 5)):
        topic = rng.choice(list(_TOPICS))
        words = _TOPICS[topic]
        sentences = [
            f"In the {topic}, {rng.choice(words)} {rng.choice(_VERBS)} {rng.choice(words)} {rng.choice(_ENDS)}."
            for _ in range(rng.randint(3, 9))
        ]
        paragraphs.append(" ".join(sentences))
    return "\n\n".join(paragraphs) + "\n"


def write_corpus(path: Path, characters: int, seed: int) -> Path:
    """JSON lines of at least `characters` characters of text in all."""
    rng, written = random.Random(seed), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        while written < characters:
            text = document(rng)
            written += len(text)
            file.write(json.dumps({"text": text}) + "\n")
    return path
