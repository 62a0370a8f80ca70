"""Questions over numbered documents, of which one (or, as in HotpotQA, several) has the answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dla.data_prep.readers import COMPRESSIONS, kind_of
from megatron_dla.errors import DataError, UserError
from megatron_dla.evaluation.lm.generated import Place, Sample
from megatron_dla.files import parse_json


@dataclass(frozen=True)
class Asked:
    """A question, its answers, and the numbers of the documents that it needs."""

    text: str
    answers: tuple[str, ...]
    needs: tuple[int, ...]


class Documents:
    """Documents and questions of a file in the form of SQuAD or HotpotQA (JSON), or of SQuAD's rows (JSONL: `context`,
    `question`, `answers`), also compressed.

    Attributes:
        texts: different documents. asked: questions that have an answer.

    Raises:
        DataError: another form, or no question.
    """

    def __init__(self, file: str) -> None:
        self.texts: list[str] = []
        self.asked: list[Asked] = []
        self._numbers: dict[str, int] = {}
        try:
            data = _parse(file)
            if isinstance(data, dict):
                self._read_squad(data)
            elif "context" in data[0] and isinstance(data[0]["context"], str):
                for row in data:
                    texts = row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"]
                    self._ask(row["question"], texts, [row["context"]])
            else:
                for row in data:
                    needed = [f"{title}\n{''.join(sentences)}" for title, sentences in row["context"]]
                    self._ask(row["question"], [row["answer"]], needed)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(f"{file}: not in the form of SQuAD or HotpotQA, or damaged ({error!r})") from error
        if not self.asked:
            raise DataError(f"{file}: it has no question with an answer")

    def _read_squad(self, data: dict[str, Any]) -> None:
        for paragraph in (p for article in data["data"] for p in article["paragraphs"]):
            self._number(paragraph["context"])
            for question in paragraph["qas"]:
                if not question.get("is_impossible"):
                    texts = [answer["text"] for answer in question["answers"]]
                    self._ask(question["question"], texts, [paragraph["context"]])

    def _ask(self, question: str, answers: list[str], needed: list[str]) -> None:
        for text in (question, *answers):
            text.encode()  # fails for half of a surrogate pair, which tokenizers refuse
        needs = tuple(self._number(text) for text in needed)
        if kept := tuple(dict.fromkeys(answer for answer in answers if answer.strip())):
            self.asked.append(Asked(question, kept, needs))

    def _number(self, text: str) -> int:
        if text not in self._numbers:
            text.encode()
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]


def _parse(file: str) -> Any:
    kind = kind_of(Path(file))
    compression = kind.compression if kind else ""
    with open(file, "rb") as raw, COMPRESSIONS[compression](raw) as stream:
        try:
            data = stream.read()
        except Exception as error:  # the packages' errors share no base class
            raise UserError(f"{file}: cannot be read ({error}); copy or compress it again") from error
    if kind is not None and kind.format == ".jsonl":
        return [parse_json(line) for line in data.splitlines() if line.strip()]
    return parse_json(data)


@dataclass(frozen=True)
class Answering:
    """A maker of prompts: the needed documents among `size` others. Where the file has fewer, they repeat."""

    documents: Documents

    def __call__(self, place: Place, size: int) -> Sample:
        rng, found = place.rng, self.documents
        asked = found.asked[rng.randrange(len(found.asked))]
        others = [i for i in range(len(found.texts)) if i not in asked.needs]
        chosen = [*asked.needs]
        while others and len(chosen) < size + len(asked.needs):
            left = size + len(asked.needs) - len(chosen)
            chosen += rng.sample(others, min(left, len(others)))
        rng.shuffle(chosen)
        place_of = next(at for at, number in enumerate(chosen) if number in asked.needs)
        text = "\n\n".join(f"Document {at}:\n{found.texts[number]}" for at, number in enumerate(chosen, 1))
        task = "Answer the question at the end from the documents, with the answer alone."
        prompt = f"{task}\n\n{text}\n\n{task}\n\nQuestion: {asked.text}\nAnswer:"
        depth = (place_of + 0.5) / len(chosen) if len(asked.needs) == 1 else None
        return Sample(prompt, asked.answers, either=True, depth=depth)
