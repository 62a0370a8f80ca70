"""Episodes: text to write into the memory (write segment), later questions without it (read segment), and answers.

One episode is one part `[write | read]` of a packed row: attention stays inside each segment, positions restart, and
the state flows from the write to the read segment, which only reads (arXiv 2605.12357, section 4). This equals two
forward passes, and works under recomputation and every parallel layout.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_dla.adapters.memory import MemoryInputs
from megatron_dla.errors import DataError, UserError
from megatron_dla.files import parse_json
from megatron_dla.serving.chat import Message, PlainText, encode, render, render_context, system_message

OPENERS: dict[str, Any] = {"": open, ".gz": gzip.open, ".xz": lzma.open}
ROLES = ("system", "user", "assistant")
Pair = dict[str, str]
"""{"question": text, "answer": text}"""


@dataclass(frozen=True)
class Episode:
    """int64 rows: `write_ids` [W], `write_messages` [W] (number of the chat message, -1: never written), `read_ids`
    [R]; `answer` bool [R], the tokens to predict, never the first one of the episode's prompt.

    `in_prompt`: the text is not removed, as a chat is served. Both segments are one prompt, all of which writes; the
    second one begins with the first answer. Without an answer it is ordinary text.
    """

    write_ids: np.ndarray
    write_messages: np.ndarray
    read_ids: np.ndarray
    answer: np.ndarray
    in_prompt: bool = False

    def __post_init__(self) -> None:
        if len(self.write_ids) != len(self.write_messages) or len(self.read_ids) != len(self.answer):
            raise ValueError("an episode has one message number a write token and one answer flag a read token")
        if (self.in_prompt and not len(self.write_ids)) or not (self.in_prompt or self.answer.any()):
            raise ValueError("an episode needs a prompt and an answer")
        if self.answer[0] and not self.in_prompt:
            raise ValueError("an episode needs an answer, with a token before it")

    def __len__(self) -> int:
        return len(self.write_ids) + len(self.read_ids)


def _render_answers(
    tokenizer: Any, asked: Sequence[Message], pairs: int, *, follows: bool = True
) -> tuple[list[int], np.ndarray]:
    """Read segment with its last `pairs` answers, and where they are. `follows`: see `render`.

    An answer is its content and the token that ends it; its header belongs to the question, as when the model is
    asked.
    """
    spans: list[tuple[int, int]] = []
    whole: list[int] = []
    for end in range(len(asked) - 2 * (pairs - 1), len(asked) + 1, 2):
        before = whole
        prompt, whole = (
            render(tokenizer, asked[: end - opened], generation_prompt=bool(opened), numbered=False, follows=follows)[0]
            for opened in (1, 0)
        )
        if whole[: len(prompt)] != prompt or prompt[: len(before)] != before:
            raise UserError(
                "an answer does not begin where the chat template opens it (does it start with white space, or does "
                "the template rewrite it?): strip the answers"
            )
        while len(whole) > len(prompt) and not tokenizer.decode(whole[-1:]).strip():
            whole.pop()  # the line break after the token that ends the answer
        spans.append((len(prompt), len(whole)))
    flags = np.zeros(len(whole), bool)
    for begin, stop in spans:
        flags[begin:stop] = True
    return whole, flags


def build_episode(
    tokenizer: Any,
    told: Sequence[Message],
    asked: Sequence[Message],
    *,
    pairs: int = 1,
    write_length: int,
    read_length: int,
    numbered: bool = False,
    in_prompt: bool = False,
) -> Episode:
    """An episode from messages.

    Args:
        told: what the write segment says; its last `write_length` tokens are kept.
        asked: what the read segment says, ending with `pairs` of a question and its answer; its last `read_length`
            tokens are kept.
        numbered: number the messages of the write segment, for adapters that write by message.
        in_prompt: what is told stays in the prompt (see `Episode`), of which the last `write_length + read_length`
            tokens are kept; messages of `asked` that are the end of `told`, or its system message, are not repeated.

    Raises:
        UserError: answers that do not fit `read_length`, or a chat template that does not go with this.
    """
    if in_prompt:
        new = [message for message in asked if all(message is not one for one in told)]
        return _in_prompt(tokenizer, [*told, *new], pairs, write_length + read_length, numbered)
    write, numbers = render_context(tokenizer, told, numbered=numbered)
    read, flags = _render_answers(tokenizer, asked, pairs)
    if not flags.any():
        raise UserError("the answer has no tokens")
    first = int(flags.argmax())
    if len(read) - first >= read_length:
        raise UserError(
            f"answers of {len(read) - first} tokens do not fit read_length = {read_length}: raise it or ask less"
        )
    return Episode(
        np.asarray(write[-write_length:], np.int64),
        np.asarray(numbers[-write_length:], np.int64),
        np.asarray(read[-read_length:], np.int64),
        flags[-read_length:],
    )


def _in_prompt(tokenizer: Any, messages: Sequence[Message], pairs: int, length: int, numbered: bool) -> Episode:
    ids, flags = _render_answers(tokenizer, messages, pairs, follows=False)
    if not flags.any():
        raise UserError("the answer has no tokens")
    first, start = int(flags.argmax()), max(0, len(ids) - length)
    if first <= start:
        raise UserError(
            f"answers of {len(ids) - first} tokens do not fit write_length + read_length = {length}: raise one or ask "
            "less"
        )
    numbers = render(tokenizer, messages, generation_prompt=False, numbered=numbered)[1][start:first]
    tokens = np.asarray(ids, np.int64)
    return Episode(tokens[start:first], np.asarray(numbers, np.int64), tokens[first:], flags[first:], in_prompt=True)


def chat_episode(tokenizer: Any, messages: Sequence[Message], *, recent_messages: int = 1, **lengths: Any) -> Episode:
    """The final answer A of a chat: with S the leading system message and U the last user message, S and everything
    before U is told, and S, the last `recent_messages` messages before A, and A make the read segment.

    Raises:
        UserError: nothing before the question; see `build_episode` (as are `lengths`).
    """
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    turns, answer = list(messages[len(system) : -1]), messages[-1]
    if len(turns) < 2:
        raise UserError("nothing is told before the question: an episode needs a message before the last user message")
    return build_episode(tokenizer, [*system, *turns[:-1]], [*system, *turns[-recent_messages:], answer], **lengths)


def text_episodes(tokenizer: Any, text: str, length: int) -> list[Episode]:
    """Ordinary text in pieces of at most `length` tokens, without an answer; a last token alone is left out."""
    ids = np.asarray(encode(tokenizer, text), np.int64)
    pieces = [ids[at : at + length] for at in range(0, len(ids) - 1, length)]
    unnumbered = np.full(1, -1, np.int64)
    return [
        Episode(piece[:1], unnumbered, piece[1:], np.zeros(len(piece) - 1, bool), in_prompt=True)
        for piece in pieces
        if len(piece) > 1
    ]


def question_episode(
    tokenizer: Any, context: Sequence[str], questions: Sequence[Pair], system: str = "", **lengths: Any
) -> Episode:
    """Texts, each told as one user message, then questions with their answers, both after the system message (if
    any); see `build_episode`."""
    first = system_message(system)
    asked = list(first)
    for pair in questions:
        asked += [{"role": "user", "content": pair["question"]}, {"role": "assistant", "content": pair["answer"]}]
    told = [*first, *({"role": "user", "content": text} for text in context)]
    return build_episode(tokenizer, told, asked, pairs=len(questions), **lengths)


# ---- files


def read_episodes(
    path: str | Path,
    tokenizer: Any,
    *,
    write_length: int,
    read_length: int,
    recent_messages: int = 1,
    numbered: bool = False,
    in_prompt: float = 0.0,
) -> list[Episode]:
    """Episodes of a .jsonl file (also .gz, .xz), one object a line: {"messages": [{"role", "content"}, ...]} that ends
    with user and assistant (`chat_episode`), or {"context": text or [text, ...], "question", "answer"}, with
    "questions": [{"question", "answer"}, ...] for several, "system" for a system message, and "plain": true where the
    texts are to be joined as they stand, without the chat template (`question_episode`); or {"text": ordinary text}
    (`text_episodes`).

    Args:
        tokenizer: of transformers (its chat template is used if it has one) or of data_prep.
        in_prompt: share of the episodes, evenly through the file, whose text stays in the prompt (see `Episode`).

    Raises:
        DataError: naming file, line and key. UserError: a length that makes no sense.
    """
    for name, value in (("write_length", write_length), ("read_length", read_length)):
        if value < 2:
            raise UserError(f"{name} = {value}: want at least 2 tokens")
    if recent_messages < 1:
        raise UserError(f"recent_messages = {recent_messages}: want at least 1, the question itself")
    lengths: dict[str, Any] = {"write_length": write_length, "read_length": read_length, "numbered": numbered}
    episodes: list[Episode] = []
    asked = 0
    for where, record in _records(Path(path)):
        if "text" in record:
            text = _check_text(where, '"text"', record["text"])
            episodes += text_episodes(tokenizer, text, write_length + read_length)
            continue
        asked += 1
        lengths["in_prompt"] = int(asked * in_prompt) > int((asked - 1) * in_prompt)
        try:
            if "messages" in record:
                messages = _check_chat(where, record["messages"])
                episodes.append(chat_episode(tokenizer, messages, recent_messages=recent_messages, **lengths))
            else:
                context, pairs, system = _check_questions(where, record)
                mine = PlainText(tokenizer) if record.get("plain") else tokenizer
                episodes.append(question_episode(mine, context, pairs, system, **lengths))
        except DataError:
            raise
        except UserError as error:
            raise DataError(f"{where}: {error}") from error
    if not episodes:
        raise DataError(f"{path}: holds no episode")
    return episodes


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of every line that is not blank."""
    packed = path.suffix if path.suffix in OPENERS else ""
    if Path(path.name.removesuffix(packed)).suffix != ".jsonl":
        raise DataError(f"{path}: unknown format; want .jsonl, optionally with .gz or .xz")
    try:
        with OPENERS[packed](path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    record = parse_json(line)
                except ValueError as error:
                    raise DataError(f"{where}: not JSON ({error})") from error
                if not isinstance(record, dict):
                    raise DataError(f'{where}: want an object with "messages", or with "context" and "question"')
                yield where, record
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged compression ({error}): fetch the file again") from error


def _check_text(where: str, name: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: {name} must be text that is not empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON allows it, tokenizers do not
        raise DataError(
            f"{where}: {name} holds {text[error.start]!a}, half of a surrogate pair, which is no text: remove it"
        ) from None
    return text


def _check_questions(where: str, record: dict[str, Any]) -> tuple[list[str], list[Pair], str]:
    several = "questions" in record
    for key in ("context", "questions") if several else ("context", "question", "answer"):
        if key not in record:
            raise DataError(f'{where}: "{key}" is missing (and there is no "messages")')
    context, pairs = record["context"], record["questions"] if several else [record]
    context = context if isinstance(context, list) else [context]
    for name, value in (("context", context), ("questions", pairs)):
        if not isinstance(value, list) or not value:
            raise DataError(f'{where}: "{name}" must be a list that is not empty')
    for i, pair in enumerate(pairs):
        name = f'"questions"[{i}]' if several else "question"
        if not isinstance(pair, dict) or not {"question", "answer"} <= pair.keys():
            raise DataError(f'{where}: {name} needs a "question" and an "answer"')
        for key in ("question", "answer"):
            _check_text(where, f'{name}: "{key}"' if several else f'"{key}"', pair[key])
    system = _check_text(where, '"system"', record["system"]) if "system" in record else ""
    return [_check_text(where, '"context"', text) for text in context], pairs, system


def _check_chat(where: str, messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: "messages" must be a list of {{"role", "content"}}')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(f'{where}: "messages"[{i}] needs a "role" out of {", ".join(ROLES)}')
        _check_text(where, f'"messages"[{i}]: "content"', message.get("content"))
        if message["role"] == "system" and i:
            raise DataError(f'{where}: "messages"[{i}]: only the first message can be a system message')
    if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
        raise DataError(f'{where}: "messages" must end with a user message and the assistant\'s answer')
    return messages


# ---- packed rows


class EpisodeBatch(NamedTuple):
    """One micro batch of b rows of T tokens, each several `[write | read]` and padding at the end.

    As data.packing.Batch: `tokens`, `labels` int64 [b, T] (label = next token); `loss_mask` float32 [b, T], 1 where
    the label is of an answer; `cu_seqlens` int32, borders of all segments (write, read, padding) in the b*T flattened
    tokens; `rows` int64 [b], each row's number in the global batch. `inputs`, for the memory: valid, reset (first
    token of an episode), write (write segments, and all of what is `in_prompt`) and message numbers, each [b, T].
    `keep`, float32 [b, T]: 1 where the prediction of the next token shall stay that of the frozen model.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    cu_seqlens: torch.Tensor
    rows: torch.Tensor
    inputs: MemoryInputs
    keep: torch.Tensor


def collate(
    rows: Sequence[Sequence[Episode]],
    row_length: int | None = None,
    *,
    multiple: int = 1,
    numbers: Sequence[int] | None = None,
) -> EpisodeBatch:
    """Tensors of packed rows, padded with token 0.

    Args:
        row_length: T; None = the longest row, rounded up to a `multiple`.
        numbers: of the rows in the global batch; None = 0, 1, ...

    Raises:
        ValueError: a row is longer than `row_length`.
    """
    longest = max(sum(len(episode) for episode in row) for row in rows)
    T = -(-longest // multiple) * multiple if row_length is None else row_length
    if longest > T:
        raise ValueError(f"a row of {longest} tokens does not fit row_length = {T}")
    shape = (len(rows), T)
    tokens, message = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    valid, reset, write, answer, keep = (np.zeros(shape, bool) for _ in range(5))
    borders = [0]
    for i, row in enumerate(rows):
        at = 0
        for episode in row:
            reset[i, at] = True
            middle, end = at + len(episode.write_ids), at + len(episode)
            borders += [i * T + at] if episode.in_prompt else [i * T + at, i * T + middle]
            tokens[i, at:end] = np.concatenate([episode.write_ids, episode.read_ids])
            valid[i, at:end] = True
            write[i, at : end if episode.in_prompt else middle] = True
            message[i, at:middle] = episode.write_messages
            answer[i, middle:end] = episode.answer
            keep[i, at : end - 1] = episode.in_prompt
            at = end
        borders += [i * T + at, (i + 1) * T]
    following = np.roll(answer, -1, 1)
    following[:, -1] = False
    return EpisodeBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(np.roll(tokens, -1, 1)),
        torch.from_numpy(following.astype(np.float32)),
        torch.from_numpy(np.unique(np.asarray(borders, np.int32))),
        torch.tensor(list(range(len(rows)) if numbers is None else numbers), dtype=torch.int64),
        MemoryInputs(*(torch.from_numpy(x) for x in (valid, reset, write, message))),
        torch.from_numpy(keep.astype(np.float32)),
    )
