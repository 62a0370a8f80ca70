"""A sentencepiece model as a BPE of the package `tokenizers`, which is what exports of a run hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_dla.data_prep.encoders import NO_PREFIX, SPACE, WINDOW
from megatron_dla.data_prep.tokenizer import Tokenizer

_PROBES = (
    "", " ", "a  b ", "\n\ttab", "Caf\xe9 \U0001f600 x", "The 12 cats, 3.5!\nNext line.", "<unk><0x0A>",
    "\u2581 x\u2581\u2581", "\ufeffe\u0301",
)  # fmt: skip


def bpe_form(sp: Any) -> Any:
    """The `tokenizers` BPE. Its pieces have plain spaces, so that a literal U+2581 is no piece and becomes bytes."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Core

    pieces = {sp.id_to_piece(i).replace(SPACE, " "): i for i in range(sp.get_piece_size())}
    unk = sp.id_to_piece(sp.unk_id())
    core = Core(models.BPE(pieces, _merges(pieces, sp), unk_token=unk, fuse_unk=True, byte_fallback=True))
    # the windows of `data_prep.tokenizer`: cut after a space of the second half or a line, else anywhere
    half = WINDOW // 2
    window = rf".{{1,{WINDOW}}}\z|.{{{half},{WINDOW - 1}}}[ \n]|.{{0,{half - 1}}}\n|.{{{WINDOW}}}"
    core.pre_tokenizer = pre_tokenizers.Split(Regex(f"(?m:{window})"), "isolated")
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if sp.encode("a") != type(sp)(model_proto=sp.serialized_model_proto() + NO_PREFIX).encode("a"):
        core.normalizer = normalizers.Prepend(" ")
        steps.append(decoders.Strip(" ", 1, 0))
    core.decoder = decoders.Sequence(steps)
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


def differing_probe(
    tokenizer: Tokenizer, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]
) -> str | None:
    """A text that gets other ids than from `tokenizer`, or is decoded otherwise; None if all that are tried do not."""
    for probe in _PROBES:
        want = tokenizer.encode(probe)
        if (got := encode(probe)) != want or decode(got) != tokenizer.decode(want):
            return probe
    return None


def export_note(tokenizer: Tokenizer) -> str:
    """That no model trained with this tokenizer can be exported, where that is so, and what to do; else ''."""
    if tokenizer.path.suffix == ".json":
        return ""
    import sentencepiece

    try:
        core = bpe_form(sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path)))
    except ImportError:  # the package `tokenizers` is not installed: the export asks for it
        return ""
    probe = differing_probe(
        tokenizer, lambda text: core.encode(text, add_special_tokens=False).ids, lambda ids: core.decode(ids)
    )
    if probe is None:
        return ""
    return (
        f"note: {tokenizer.path} has no equal tokenizer.json ({probe!r} would get other ids: a unigram model, or one "
        "that changes texts), so `dla convert to-hf` will refuse models trained on these shards; if you want to export "
        "them, make a tokenizer with `dla data tokenizer`, or give a tokenizer.json"
    )
