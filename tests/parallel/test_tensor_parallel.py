"""TP = 2 and 4, with and without sequence parallelism, equal one process: output and every parameter's gradient."""

import dataclasses

import pytest

from megatron_dla.config import LETTERS, ParallelSection
from tests.support import workers
from tests.support.workers import BASE_SECTION as BASE
from tests.support.workers import check

PUBLISHED = {"ffn_hidden_size": 0, "conv_bias": True, "gated_norm": "group"}  # what Mamba-2 models are made of
BACKBONES = {
    "mamba2": BASE,
    "mamba2, one group for all heads": dataclasses.replace(BASE, num_groups=1),
    "gdn": dataclasses.replace(BASE, backbone="gdn", num_groups=4),
    "gdn, learned tau": dataclasses.replace(BASE, backbone="gdn", tau_mode="learned"),
    "mamba2, one group, learned tau": dataclasses.replace(BASE, num_groups=1, tau_mode="learned"),
    "published mamba2": dataclasses.replace(BASE, num_groups=1, **PUBLISHED),
    "published mamba2, two groups": dataclasses.replace(BASE, **PUBLISHED),
    "gdn, grouped norm": dataclasses.replace(BASE, backbone="gdn", num_groups=1, gated_norm="group"),
}
DOCUMENTS = [0, 17, 48, 60, 61, 96]


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("name", BACKBONES)
def test_dla_layer_tp2(ranks, name: str, sequence: bool) -> None:
    for documents in ([], DOCUMENTS):
        for errors in ranks(2).run(
            workers.layer_parity, BACKBONES[name], ParallelSection(2, sequence), "D", documents, 11
        ):
            check(errors, 1e-10)


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("change", [{}, {"attention_groups": 1, "attention_head_dim": 12, "qk_norm": True}], ids=str)
def test_softmax_layer_tp2(ranks, sequence: bool, change: dict) -> None:
    section = dataclasses.replace(BASE, **change)
    for documents in ([], DOCUMENTS):
        for errors in ranks(2).run(workers.layer_parity, section, ParallelSection(2, sequence), "A", documents, 12):
            check(errors, 1e-10)


def test_softmax_layer_with_fewer_groups_than_ranks(ranks) -> None:
    section = dataclasses.replace(BASE, attention_groups=2, attention_head_dim=12, qk_norm=True)
    for errors in ranks(4).run(workers.layer_parity, section, ParallelSection(4, True), "A", DOCUMENTS, 15):
        check(errors, 1e-10)


@pytest.mark.parametrize(
    "name", ["mamba2, one group for all heads", "gdn", "published mamba2", "published mamba2, two groups"]
)
def test_dla_layer_tp4(ranks, name: str) -> None:
    for errors in ranks(4).run(workers.layer_parity, BACKBONES[name], ParallelSection(4, True), "D", DOCUMENTS, 13):
        check(errors, 1e-10)


@pytest.mark.parametrize("sequence", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("name", ["mamba2", "gdn", "tied hybrid"])
def test_model_tp2(ranks, name: str, sequence: bool) -> None:
    hybrid = dataclasses.replace(BASE, pattern="DA", tie_embeddings=True)
    section = hybrid if name == "tied hybrid" else BACKBONES[name]
    for documents in ([], DOCUMENTS):
        for errors in ranks(2).run(workers.model_parity, section, ParallelSection(2, sequence), documents, 14):
            check(errors, 1e-6)  # Megatron returns the token losses in fp32


@pytest.mark.parametrize("letter", LETTERS)
def test_every_letter_of_the_pattern(ranks, letter: str) -> None:
    """Also one that was added without a test of its own."""
    section = dataclasses.replace(BASE, pattern=letter, num_groups=1)
    for errors in ranks(2).run(workers.layer_parity, section, ParallelSection(2, True), letter, DOCUMENTS, 16):
        check(errors, 1e-10)


def test_boundaries_fire_in_the_parity_model(ranks) -> None:
    rates = ranks(2).run(workers.boundary_rates, BASE, ParallelSection(2), 14)
    for rate in rates:
        assert ((rate > 0.05) & (rate < 1)).all(), rate
