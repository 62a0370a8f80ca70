"""Imported full-attention models over several ranks: logits and the gradient through them are those of transformers."""

import pytest

from megatron_dla.config import ParallelSection
from tests.support import backbone_workers, tiny_backbones
from tests.support.workers import check, errors

LAYOUTS = {"tp2": ParallelSection(2), "tp2sp": ParallelSection(2, True), "cp2": ParallelSection(1, False, 2)}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`written(name)`: directory of a tiny model, and what transformers gives: {with documents: (logits, gradient)}."""
    made = {}

    def get(name: str):
        if name not in made:
            directory = tmp_path_factory.mktemp("backbone")
            family, changes = tiny_backbones.CASES[name]
            model = tiny_backbones.write_tiny(directory, family, **changes)
            ids, cotangent, documents = tiny_backbones.token_rows()
            made[name] = (
                directory,
                {
                    bool(bounds): tiny_backbones.logits_and_gradient(model, ids, cotangent, bounds)
                    for bounds in ([], documents)
                },
            )
        return made[name]

    return get


@pytest.mark.parametrize(
    "name,layout",
    [(name, "tp2") for name in tiny_backbones.CASES]
    + [("qwen3, one key head, tied", "tp2sp"), ("smollm3", "tp2sp"), ("qwen3", "cp2"), ("llama3 scaling", "cp2")],
)
def test_logits_and_gradient(ranks, written, name: str, layout: str) -> None:
    directory, wanted = written(name)
    ids, cotangent, documents = tiny_backbones.token_rows()
    for bounds in ([], documents):
        arguments = directory, LAYOUTS[layout], ids, cotangent, bounds
        want = dict(zip(("logits", "gradient"), wanted[bool(bounds)], strict=True))
        for got in ranks(2).run(backbone_workers.imported, *arguments):
            check(errors(dict(zip(("logits", "gradient"), got, strict=True)), want), 1e-5)
