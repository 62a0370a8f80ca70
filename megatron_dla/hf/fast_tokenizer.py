"""The sentencepiece model of a run as `tokenizer.json`: the same ids, without code of ours."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dla.errors import CheckpointError
from megatron_dla.hf.directory import TOKENIZER

_SPACE = "\u2581"  # sentencepiece stores every space as this character
_WINDOW = 1 << 16  # characters that the data tools encode at once
_PROBES = (
    "", " ", "a  b ", "\n\ttab", "Caf\xe9 \U0001f600 x", "The 12 cats, 3.5!\nNext line.", "<unk><0x0A>",
    "\u2581 x\u2581\u2581", "\ufeffe\u0301",
)  # fmt: skip


@dataclass(frozen=True)
class SpecialTokens:
    """Ids for config.json and generation_config.json.

    Attributes:
        eos: ends every document. pad: its own row of the embedding. size: tokens of the sentencepiece model.
        unused: rows of the embedding that stand for no text, pad among them.
    """

    eos: int
    pad: int
    size: int
    unused: tuple[int, ...]


def _core(sp: Any) -> Any:
    """The `tokenizers` BPE. Its pieces have plain spaces, so that a literal U+2581 is no piece and becomes bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pieces = {sp.id_to_piece(i).replace(_SPACE, " "): i for i in range(sp.get_piece_size())}
    unk = sp.id_to_piece(sp.unk_id())
    core = Tokenizer(models.BPE(pieces, _merges(pieces, sp), unk_token=unk, fuse_unk=True, byte_fallback=True))
    # the windows of `data_prep.tokenizer`: cut after a space of the second half or a line, else anywhere
    half = _WINDOW // 2
    window = rf".{{1,{_WINDOW}}}\z|.{{{half},{_WINDOW - 1}}}[ \n]|.{{0,{half - 1}}}\n|.{{{_WINDOW}}}"
    core.pre_tokenizer = pre_tokenizers.Split(Regex(f"(?m:{window})"), "isolated")
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return core


def _merges(pieces: dict[str, int], sp: Any) -> list[tuple[str, str]]:
    """Pairs in the order in which BPE joins them: by the rank of what they make, then of the parts."""
    found = []
    for piece, rank in pieces.items():
        if len(piece) < 2 or sp.is_byte(rank) or sp.is_control(rank) or sp.is_unknown(rank):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((rank, pieces[left], pieces[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def write_tokenizer(out: Path, source: Path, rows: int) -> SpecialTokens:
    """tokenizer.json, tokenizer_config.json and a copy of tokenizer.model.

    eos is special, also where it is written in a text. There is no bos: no document of the training data begins with
    one. pad is the first of the `rows` of the embedding that the sentencepiece model leaves over, or unk, which no
    text contains.

    Raises:
        CheckpointError: the ids would differ from the sentencepiece model's.
    """
    import sentencepiece
    from transformers import PreTrainedTokenizerFast

    sp = sentencepiece.SentencePieceProcessor(model_file=str(source))
    size = sp.get_piece_size()
    pad = "<pad>" if size < rows and sp.piece_to_id("<pad>") == sp.unk_id() else sp.id_to_piece(sp.unk_id())
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=_core(sp), eos_token=sp.id_to_piece(sp.eos_id()), pad_token=pad, padding_side="left",
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    marked = sp.piece_to_id([f"<0x{byte:02X}>" for byte in _SPACE.encode()])
    for probe in _PROBES:
        parts = [sp.encode(part) for part in probe.split(_SPACE)]
        want = parts[0] + [i for part in parts[1:] for i in (*marked, *part)]
        got = fast.encode(probe, add_special_tokens=False, split_special_tokens=True)
        if got != want or fast.decode(got) != probe:
            raise CheckpointError(f"{str(source)!r}: {probe!r} would get other ids in tokenizer.json")
    fast.save_pretrained(str(out))
    shutil.copyfile(source, out / TOKENIZER)  # shards for this model are made with it
    return SpecialTokens(sp.eos_id(), fast.pad_token_id, size, tuple(range(size, rows)))
