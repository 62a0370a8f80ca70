"""The thirteen tasks of RULER (arXiv 2404.06654) with generators, words and sentences of our own.

The shapes are RULER's: what is hidden, how often, among what, what is asked, how answers are matched. The texts differ,
so that scores are comparable among models here, and not with published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_dla.errors import UserError
from megatron_dla.evaluation.lm.answering import Answering, Documents
from megatron_dla.evaluation.lm.counting import CommonWords, frequent_words, track_variables
from megatron_dla.evaluation.lm.generated import Generated, Recipe
from megatron_dla.evaluation.lm.material import ADJECTIVES, NOUNS, Haystack
from megatron_dla.evaluation.lm.needles import Needles

_NEEDLE_TOKENS, _LEAST_WORDS = 128, 60
RULER = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip


def ruler_tasks(
    names: Sequence[str],
    *,
    lengths: Sequence[int],
    count: int,
    seed: int,
    haystack: Callable[[], Haystack],
    documents: Sequence[str] = (),
) -> list[Generated]:
    """Tasks out of `RULER`.

    Args:
        lengths: in tokens, prompt and answer together. count: prompts of each. haystack: called where a task needs it.
        documents: files of qa_1 and qa_2, see `Documents`.

    Raises:
        UserError: a task lacks its file.
    """
    return [Generated(name, _recipe(name, haystack, documents), lengths=lengths, count=count, seed=seed)
            for name in names]  # fmt: skip


def _recipe(name: str, haystack: Callable[[], Haystack], documents: Sequence[str]) -> Recipe:
    if name.startswith("qa_"):
        number = int(name[-1])
        if len(documents) < number:
            raise UserError(f"--tasks {name} needs --qa with {number} file(s) in the form of SQuAD or HotpotQA")
        return Recipe(Answering(Documents(documents[number - 1])), 32, least=0)
    if name == "vt":
        return Recipe(track_variables, 30)
    if name == "fwe":
        return Recipe(frequent_words, 50, least=_LEAST_WORDS)  # of fewer, two ranks may be equal
    if name == "cwe":
        found = haystack()
        return Recipe(CommonWords(found), 120, least=12, most=len(found.vocabulary) - 40)
    shapes: dict[str, Callable[[], Needles]] = {
        "niah_single_1": lambda: Needles("noise"),
        "niah_single_2": lambda: Needles("text", haystack=haystack()),
        "niah_single_3": lambda: Needles("text", value="uuids", haystack=haystack()),
        "niah_multikey_1": lambda: Needles("text", keys=4, haystack=haystack()),
        "niah_multikey_2": lambda: Needles("needles"),
        "niah_multikey_3": lambda: Needles("needles", key="uuids", value="uuids"),
        "niah_multivalue": lambda: Needles("text", values=4, haystack=haystack()),
        "niah_multiquery": lambda: Needles("text", keys=4, queries=4, haystack=haystack()),
    }
    most = len(ADJECTIVES) * len(NOUNS) - 1 if name == "niah_multikey_2" else Recipe.most
    return Recipe(shapes[name](), _NEEDLE_TOKENS, most=most)
