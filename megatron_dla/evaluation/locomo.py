"""LoCoMo (arXiv 2402.17753): questions about long conversations, from a local file. Categories 1-4, token F1.

Conversations have 15,000 to 30,000 tokens, more than many backbones take, so each question gets a window of whole
turns. `last`: the end of the conversation, which most answers precede. `evidence`: turns around the annotated evidence;
this uses gold labels, so scores are comparable between the conditions of one table, not with published LoCoMo results.
The fraction of questions whose evidence is in the window is reported.
"""

from __future__ import annotations

import lzma
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nltk.stem.porter import PorterStemmer

from megatron_dla.adapters.memory import MemoryControl
from megatron_dla.errors import DataError, UserError
from megatron_dla.evaluation.scoring import PLAIN, READ_ONLY, LayerMeans, TokenRow, derangement, write_contexts
from megatron_dla.evaluation.table import Table
from megatron_dla.files import parse_json
from megatron_dla.serving.chat import encode, render, render_context, render_prompt
from megatron_dla.serving.decode import generate_batch, stop_tokens
from megatron_dla.serving.hf_model import DeltaMemModel, States, select_states

CATEGORIES = {1: "multi_hop", 2: "temporal", 3: "open_domain", 4: "single_hop"}
PROMPT = "Answer from our conversation, in a few words. {}"
DATED = " Answer with an approximate date."
NEW_TOKENS = 32
# M. F. Porter, An algorithm for suffix stripping, Program 14(3), 1980, as published: the authors' script has NLTK's
# extensions, which conflate a few words more (addition and additionally)
_PORTER = PorterStemmer(mode=PorterStemmer.ORIGINAL_ALGORITHM)


@dataclass(frozen=True)
class Item:
    """A question with its window of turns ("Anna: text"; the first turn of a session starts with its date)."""

    conversation: str
    question: str
    answer: str
    category: int
    window: tuple[str, ...]
    covered: bool


def read_locomo(path: Path, tokenizer: Any, *, tokens: int, window: str, questions: int, seed: int) -> list[Item]:
    """Questions of categories 1-4; a random subset if `questions` is not 0.

    Args:
        path: locomo10.json, or .json.xz. tokens: maximum of a window. window: last or evidence.

    Raises:
        DataError: the file does not have LoCoMo's format.
    """
    try:
        raw = path.read_bytes()
        raw = lzma.decompress(raw) if path.suffix == ".xz" else raw
        samples = parse_json(raw)
        items = [(sample, qa) for sample in samples for qa in sample["qa"] if qa["category"] in CATEGORIES]
        turns = {sample["sample_id"]: _turns(sample["conversation"], tokenizer) for sample in samples}
    except (ValueError, KeyError, TypeError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path}: not the LoCoMo data, or damaged ({error}): give locomo10.json") from error
    if questions:
        chosen = np.random.default_rng(seed).permutation(len(items))[:questions]
        items = [items[i] for i in sorted(chosen)]
    out = []
    for sample, qa in items:
        told = turns[sample["sample_id"]]
        cited = set(re.findall(r"D\d+:\d+", " ".join(map(str, qa.get("evidence", [])))))
        evidence = [i for i, turn in enumerate(told) if turn.name in cited]
        begin, end = _window(told, evidence if window == "evidence" else [], tokens)
        covered = bool(evidence) and begin <= evidence[0] and evidence[-1] < end
        texts = _dated(told[begin:end])
        out.append(Item(sample["sample_id"], qa["question"], str(qa["answer"]), qa["category"], texts, covered))
    return out


@dataclass(frozen=True)
class _Turn:
    name: str
    session: int
    date: str
    text: str
    tokens: int


def _turns(conversation: dict[str, Any], tokenizer: Any) -> list[_Turn]:
    out = []
    numbers = sorted(int(key.split("_")[1]) for key in conversation if re.fullmatch(r"session_\d+", key))
    for number in numbers:
        date = conversation[f"session_{number}_date_time"]
        for turn in conversation[f"session_{number}"]:
            text = f"{turn['speaker']}: {turn['text']}"
            if turn.get("blip_caption"):
                text += f" [shares {turn['blip_caption']}]"
            out.append(_Turn(turn["dia_id"], number, date, text, len(encode(tokenizer, text + "\n"))))
    return out


def _window(turns: Sequence[_Turn], around: Sequence[int], tokens: int) -> tuple[int, int]:
    """[begin, end) of whole turns within the token budget: around the given turns, or the last ones."""
    if not around:
        begin, left = len(turns), tokens
        while begin and turns[begin - 1].tokens <= left:
            begin -= 1
            left -= turns[begin].tokens
        return begin, len(turns)
    begin = end = around[-1]  # grows to both sides alternately, from the last evidence
    left = tokens
    while True:
        grown = False
        if end < len(turns) and turns[end].tokens <= left:
            left -= turns[end].tokens
            end += 1
            grown = True
        if begin and turns[begin - 1].tokens <= left:
            begin -= 1
            left -= turns[begin].tokens
            grown = True
        if not grown:
            return begin, end


def _dated(turns: Sequence[_Turn]) -> tuple[str, ...]:
    sessions = [None, *(turn.session for turn in turns)]
    return tuple(
        turn.text if turn.session == before else f"({turn.date}) {turn.text}"
        for turn, before in zip(turns, sessions, strict=False)
    )


# ---- score


def stem(word: str) -> str:
    """Porter's stem of a lower-case word; one of 1 or 2 letters is its own (NLTK would cut "is" to "i")."""
    return word if len(word) <= 2 else _PORTER.stem(word)


def _tokens(text: str) -> list[str]:
    text = "".join(" " if c in string.punctuation and c != "'" else c for c in text.lower()).replace("'", "")
    return [stem(word) for word in text.split() if word not in ("a", "an", "the", "and")]


def token_f1(prediction: str, answer: str) -> float:
    """F1 of stemmed words, without articles and punctuation."""
    found, wanted = _tokens(prediction), _tokens(answer)
    same = sum((Counter(found) & Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(found), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def answer_f1(prediction: str, answer: str, category: int) -> float:
    """The authors' score: a multi-hop answer is a list (mean over its parts of the best match); of an open-domain
    answer the part before ";" counts."""
    if category == 1:
        parts = [part for part in answer.split(",") if part.strip()]
        guesses = [part for part in prediction.split(",") if part.strip()] or [""]
        return float(np.mean([max(token_f1(guess, part) for guess in guesses) for part in parts]))
    return token_f1(prediction, answer.split(";")[0] if category == 3 else answer)


# ---- run


def locomo_table(
    model: DeltaMemModel,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    seed: int = 0,
    batch: int = 4,
    controls: bool = True,
    static: DeltaMemModel | None = None,
    settings: dict[str, Any] | None = None,
) -> Table:
    """Greedy answers under the conditions of `scoring`; a unit is a question, a group a conversation.

    Raises:
        UserError: fewer than 2 questions.
    """
    if len(items) < 2:
        raise UserError(f"--questions {len(items)}: must be at least 2 (states are shuffled between them)")
    numbered = model.config.write == "message"
    told, prompts, full = _encode(tokenizer, items, numbered)
    means, plain = LayerMeans(), [TokenRow(prompt, [-1] * len(prompt)) for prompt in prompts]

    def answers(
        rows: Sequence[TokenRow], control: MemoryControl, states: States | None = None, by: DeltaMemModel = model
    ) -> dict[str, np.ndarray]:
        texts = _generate(by, tokenizer, rows, control, states, batch)
        return {"f1": np.asarray([answer_f1(t, i.answer, i.category) for t, i in zip(texts, items, strict=True)])}

    found = {"full": answers(full, PLAIN)}
    pairs: list[tuple[str, str]] = []
    if model.layers:
        if controls:
            found["full_adapter"] = answers(full, MemoryControl())
        states = write_contexts(model, told, batch, means)
        found["kept"] = answers(plain, READ_ONLY, states)
        if controls:
            found["zeroed"] = answers(plain, READ_ONLY)
            found["shuffled"] = answers(plain, READ_ONLY, select_states(states, _from_others(items, seed)))
    found["scale_0"] = answers(plain, PLAIN)
    if static is not None:
        found["static"] = answers(plain, READ_ONLY, by=static)
    if model.layers:
        pairs += [("kept", other) for other in ("zeroed", "shuffled", "scale_0", "static") if other in found]
        pairs += [("full_adapter", "full")] if controls else []
    _, groups = np.unique([item.conversation for item in items], return_inverse=True)
    by_category = {
        name: {c: float(v["f1"][[i.category == n for i in items]].mean()) for c, v in found.items()}
        for n, name in CATEGORIES.items()
        if any(i.category == n for i in items)
    }
    settings = {**(settings or {}), "questions": len(items), "evidence_in_window": np.mean([i.covered for i in items]),
                "f1_by_category": by_category, "tokens_told": float(np.mean([len(t.ids) for t in told]))}  # fmt: skip
    return Table("LoCoMo", "questions", ("f1",), found, pairs, settings, groups, means.rows())


def _from_others(items: Sequence[Item], seed: int) -> list[int]:
    """For each question the index of another one, of another conversation if there is one."""
    order = derangement(len(items), seed)
    for i, item in enumerate(items):
        other = [j for j, x in enumerate(items) if x.conversation != item.conversation]
        if other and items[order[i]].conversation == item.conversation:
            order[i] = other[order[i] % len(other)]
    return order.tolist()


def _encode(
    tokenizer: Any, items: Sequence[Item], numbered: bool
) -> tuple[list[TokenRow], list[list[int]], list[TokenRow]]:
    """Contexts (one message, or one a turn if the adapter writes by message), prompts without and with them."""
    told, prompts, full = [], [], []
    for item in items:
        texts = item.window if numbered else ["\n".join(item.window)]
        context = [{"role": "user", "content": text} for text in texts]
        asked = PROMPT.format(item.question) + (DATED if item.category == 2 else "")
        user = {"role": "user", "content": asked}
        told.append(TokenRow(*render_context(tokenizer, context, numbered=numbered)))
        prompts.append(render_prompt(tokenizer, [user]))
        full.append(TokenRow(*render(tokenizer, [*context, user], generation_prompt=True, numbered=numbered)))
    return told, prompts, full


def _generate(
    model: DeltaMemModel,
    tokenizer: Any,
    rows: Sequence[TokenRow],
    control: MemoryControl,
    states: States | None,
    batch: int,
) -> list[str]:
    stop, texts = stop_tokens(model, tokenizer), []
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        mine = None if states is None else select_states(states, range(at, at + len(part)))
        numbers = [row.messages for row in part] if model.config.write == "message" else None
        tokens, _ = generate_batch(
            model, [row.ids for row in part], NEW_TOKENS, stop=stop, states=mine, messages=numbers, control=control
        )
        texts += [tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]
    return texts
