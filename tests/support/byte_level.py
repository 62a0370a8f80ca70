"""A tokenizer.json as GPT-2, GPT-NeoX, Llama 3 and Qwen have it."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Core


def byte_level(path: Path, lines: list[str], prefix: bool = False) -> Core:
    """Write path/tokenizer.json; 281 tokens at most, the end of a document is 0."""
    core = Core(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.decoder = decoders.ByteLevel()
    special = AddedToken("<|endoftext|>", special=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=[special], initial_alphabet=alphabet)
    core.train_from_iterator(lines, trainer)
    core.add_tokens(["  "])  # as in GPT-NeoX: white space that is not special
    bos = [("<|endoftext|>", 0)]
    core.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=bos)
    path.mkdir(parents=True, exist_ok=True)
    core.save(str(path / "tokenizer.json"))
    return core
