"""The tokenizer of a run as `tokenizer.json`: the same ids, without code of ours."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dla.data_prep.bpe_form import bpe_form, differing_probe
from megatron_dla.data_prep.tokenizer import Tokenizer
from megatron_dla.errors import CheckpointError
from megatron_dla.hf.directory import TOKENIZER, TOKENIZER_JSON

_PADS = ("<pad>", "<|padding|>", "<|pad|>", "[PAD]")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids for config.json and generation_config.json.

    Attributes:
        eos: ends every document. pad: its own row of the embedding. size: tokens of the run's tokenizer.
        unused: rows of the embedding that stand for no text, pad among them.
    """

    eos: int
    pad: int
    size: int
    unused: tuple[int, ...]


def _from_json(path: Path) -> Any:
    """The tokenizer of a `tokenizer.json`, without the bos that it may put before a text: shards have none."""
    from tokenizers import Tokenizer as Core
    from tokenizers import processors

    core = Core.from_file(str(path))
    core.post_processor = processors.Sequence([])
    return core


def _pad(core: Any, size: int, rows: int, unk: str | None) -> str:
    """A pad that no text contains: the tokenizer's own, a new one where the embedding has a row for it, or unk."""
    special = {token.content for token in core.get_added_tokens_decoder().values() if token.special}
    if own := [token for token in _PADS if token in special]:
        return own[0]
    if size < rows and core.token_to_id("<pad>") is None:
        return "<pad>"
    if unk is None:
        raise CheckpointError(f"the tokenizer has no pad and the embedding no row for one ({size} tokens, {rows} rows)")
    return unk


def write_tokenizer(out: Path, source: Path, rows: int) -> SpecialTokens:
    """tokenizer.json and tokenizer_config.json, of a sentencepiece model also a copy of tokenizer.model.

    eos is special, also where it is written in a text. There is no bos: no document of the training data begins with
    one. pad is the tokenizer's own, the first of the `rows` of the embedding that the tokenizer leaves over, or unk,
    which no text contains.

    Raises:
        CheckpointError: the ids would differ from those of the shards.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(source)
    size = tokenizer.vocab_size
    if source.suffix == ".json":
        core = _from_json(source)
        unk, eos = getattr(core.model, "unk_token", None), core.id_to_token(tokenizer.eos_id)
    else:
        import sentencepiece

        sp = sentencepiece.SentencePieceProcessor(model_file=str(source))
        core, unk, eos = bpe_form(sp), sp.id_to_piece(sp.unk_id()), sp.id_to_piece(sp.eos_id())
    pad = _pad(core, size, rows, unk)
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, pad_token=pad, padding_side="left",
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    probe = differing_probe(
        tokenizer, lambda text: fast.encode(text, add_special_tokens=False, split_special_tokens=True), fast.decode
    )
    if probe is not None:
        raise CheckpointError(
            f"{str(source)!r}: {probe!r} would get other ids in tokenizer.json; train on shards of another tokenizer "
            "(`dla data tokenizer` makes one) to export"
        )
    try:
        fast.save_pretrained(str(out))
    except Exception as error:  # the package tokenizers raises no OSError
        if isinstance(error, OSError) or "os error 28" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / TOKENIZER_JSON)) from error
    if source.suffix != ".json":
        (out / TOKENIZER).write_bytes(source.read_bytes())  # shards for this model are made with it
    return SpecialTokens(tokenizer.eos_id, fast.pad_token_id, size, tuple(range(size, rows)))
