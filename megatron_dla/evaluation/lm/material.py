"""What prompts are made of: names, values, and sentences of a text file."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from random import Random

from megatron_dla.errors import UserError

_ADJECTIVES = """
amber ancient bitter blue bold brave brief bright broad bronze calm careful cheap clean clear clever cold common
copper cosy crisp curious dark deep dense distant double dry dusty eager early empty equal exact faint fair famous
fancy fast fierce firm flat fond formal fresh gentle giant glad golden grand grave green grey happy heavy hollow
honest humble icy idle iron ivory jolly keen kind large late lazy light little lively local lone long loud lucky
mild modern narrow noble odd open pale patient plain polite proud quick quiet rapid rare ready royal rusty sharp
silent silver simple slow smooth soft solid steady strange strong sudden sweet swift tall tame tender thick tidy
vast warm wide wild young
"""
_NOUNS = """
acorn anchor apple arrow badge banner barrel basket beacon bell bench berry blanket boat book bottle bridge brush
bucket button cabin cable camel candle canyon carpet castle cattle cedar chain chair chest circle clock cloud coat
coin collar corner cotton cradle crown cup curtain desk door dragon drum eagle engine fabric falcon feather fence
field finger flag flower forest fountain fox garden gate glass glove grain guitar hammer harbour hat hill horse
hotel island jacket jewel jungle kettle key kitchen ladder lake lamp lantern leaf lemon letter library lion lock
magnet map market meadow melon mill mirror moon mountain needle nest oak ocean orange orchard oven paddle palace
parcel pencil pepper piano pillow pine planet plate pocket pony potato quilt rabbit raven ribbon river robot rocket
roof rope saddle sail school shell ship shoe shovel spoon square stable star station stone sword table temple thread
ticket tiger tower train tunnel turtle valley violin wagon wallet water whale wheel whistle window winter wizard
"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
NOISE = ("The road is dry.", "The field is wide.", "The river is slow.", "On we walk.", "Then we turn back.")


def names(rng: Random, count: int) -> list[str]:
    """Distinct names such as `calm-harbour`."""
    total = len(ADJECTIVES) * len(NOUNS)
    if count > total:
        raise UserError(f"--lengths: a prompt would need {count} different names and there are {total}: give a shorter")
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in rng.sample(range(total), count)]


def numbers(rng: Random, count: int) -> list[str]:
    """Distinct numbers of seven digits."""
    return [str(number) for number in rng.sample(range(10**6, 10**7), count)]


def uuids(rng: Random, count: int) -> list[str]:
    return [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(count)]


class Haystack:
    """Sentences and words of texts.

    Attributes:
        sentences: in order. vocabulary: different lower-case words of four letters or more, sorted.

    Raises:
        UserError: fewer than ten sentences.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        text = re.sub(r"\s+", " ", " ".join(texts))
        self.sentences = [s for s in re.split(r"(?<=[.!?]) (?=[^a-z])", text) if s.strip()]
        self.vocabulary = sorted(set(re.findall(r"\b[a-z]{4,}\b", text)))
        if len(self.sentences) < 10:
            raise UserError(f"--haystack: {len(self.sentences)} sentences; give a text of a book's size")

    def some(self, rng: Random, count: int) -> list[str]:
        """So many consecutive sentences from a random place on, from the beginning again after the last."""
        start, total = rng.randrange(len(self.sentences)), len(self.sentences)
        return [self.sentences[(start + i) % total] for i in range(count)]
