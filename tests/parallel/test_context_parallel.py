"""Context parallelism equals one process: output, input gradient and every parameter's gradient in float64."""

import dataclasses

import pytest
import torch

from megatron_dla.config import ParallelSection, check_config, check_context_parallel, from_dict
from megatron_dla.errors import ConfigError
from tests.support import workers
from tests.support.workers import BASE_SECTION as BASE
from tests.support.workers import check

HEADS = ParallelSection(context_parallel_size=2)
SECTIONS = {
    "mamba2": BASE,
    "mamba2, one group": dataclasses.replace(BASE, num_groups=1),
    "mamba2, one group, learned tau": dataclasses.replace(BASE, num_groups=1, tau_mode="learned"),
    "gdn": dataclasses.replace(BASE, backbone="gdn", num_groups=4),
    "gdn, learned tau": dataclasses.replace(BASE, backbone="gdn", tau_mode="learned"),
    "published mamba2": dataclasses.replace(BASE, num_groups=1, ffn_hidden_size=0, conv_bias=True, gated_norm="group"),
}
DOCUMENTS = [0, 17, 24, 48, 60, 61, 96]  # 24 is where the second rank begins


@pytest.mark.parametrize("name", SECTIONS)
def test_dla_layer_by_heads(ranks, name: str) -> None:
    for documents in ([], DOCUMENTS):
        for errors in ranks(2).run(workers.layer_parity, SECTIONS[name], HEADS, "D", documents, 21):
            check(errors, 1e-10)


FIXED = {name: section for name, section in SECTIONS.items() if section.tau_mode == "fixed"}
CHAIN = ParallelSection(context_parallel_size=2, cp_scheme="chain")
# documents that begin where a rank's part does, one token earlier and later; rows with and without any
CHAINED = [[], DOCUMENTS, [0, 48, 96], [0, 23, 25, 26, 48, 50, 96]]


@pytest.mark.parametrize("name", FIXED)
def test_dla_layer_by_chain(ranks, name: str) -> None:
    for documents in CHAINED:
        for errors in ranks(2).run(workers.layer_parity, FIXED[name], CHAIN, "D", documents, 25):
            check(errors, 1e-10)


def test_a_convolution_of_one_token_has_no_halo(ranks) -> None:
    for name in ("mamba2, one group", "gdn"):
        section = dataclasses.replace(SECTIONS[name], conv_kernel=1)
        for errors in ranks(2).run(workers.layer_parity, section, CHAIN, "D", DOCUMENTS, 27):
            check(errors, 1e-10)


@pytest.mark.parametrize("name", FIXED)
def test_dla_layer_by_chain_on_four_ranks(ranks, name: str) -> None:
    for parallel in (ParallelSection(1, False, 4, "chain"), ParallelSection(2, True, 2, "chain")):
        for errors in ranks(4).run(workers.layer_parity, FIXED[name], parallel, "D", [0, 5, 40, 48, 90, 96], 26):
            check(errors, 1e-10)


@pytest.mark.parametrize("scheme", ["heads", "chain"])
@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("letter", ["G", "M", "L"])
def test_layer_of_another_recurrence(ranks, scheme: str, groups: int, letter: str) -> None:
    section, parallel = dataclasses.replace(BASE, num_groups=groups), ParallelSection(1, False, 2, scheme)
    for documents in ([], DOCUMENTS):
        for errors in ranks(2).run(workers.layer_parity, section, parallel, letter, documents, 28):
            check(errors, 1e-10)


@pytest.mark.parametrize("letter", ["A", "W"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_softmax_layer_by_heads(ranks, groups: int, letter: str) -> None:
    section = dataclasses.replace(BASE, attention_groups=groups)
    for documents in ([], DOCUMENTS):
        for errors in ranks(2).run(workers.layer_parity, section, HEADS, letter, documents, 22):
            check(errors, 1e-10)


@pytest.mark.parametrize("name", ["mamba2, one group, learned tau", "gdn, learned tau", "published mamba2"])
@pytest.mark.parametrize("parallel", [ParallelSection(2, True, 2), ParallelSection(1, False, 4)], ids=["tp2sp", "cp4"])
def test_dla_layer_on_four_ranks(ranks, name: str, parallel: ParallelSection) -> None:
    for errors in ranks(4).run(workers.layer_parity, SECTIONS[name], parallel, "D", DOCUMENTS, 23):
        check(errors, 1e-10)


@pytest.mark.parametrize("name", ["mamba2, one group", "gdn"])
def test_hybrid_model_by_heads(ranks, name: str) -> None:
    section = dataclasses.replace(SECTIONS[name], pattern="DA", tie_embeddings=name == "gdn")
    for documents in ([], DOCUMENTS):
        for errors in ranks(2).run(workers.model_parity, section, HEADS, documents, 24):
            check(errors, 1e-6)  # Megatron returns the token losses in fp32


def test_boundary_rates_are_those_of_one_process(ranks) -> None:
    alone = ranks(2).run(workers.boundary_rates, BASE, workers.ALONE, 14)[0]
    assert ((alone > 0.05) & (alone < 1)).all(), alone
    for parallel in (HEADS, CHAIN):
        for rates in ranks(2).run(workers.boundary_rates, BASE, parallel, 14):
            torch.testing.assert_close(rates, alone)


CP4 = {"context_parallel_size": 4}


@pytest.mark.parametrize(
    "model,parallel,seq_len,words",
    [
        ({"num_heads": 6, "num_groups": 6}, CP4, 96, r"context_parallel_size in \{1, 2, 3, 6\}"),
        (
            {"num_heads": 48},
            {"tensor_model_parallel_size": 8, "context_parallel_size": 4},
            96,
            r"48.* in \{1, 2, 3, 6\}",
        ),
        ({"num_heads": 12, "num_groups": 6}, CP4, 96, r"num_groups = 6\).*\{1, 2, 3, 6, 12\}"),
        ({"pattern": "A", "attention_heads": 6, "attention_groups": 2}, CP4, 96, r"\{1, 2, 6\}"),
        ({"tau_mode": "learned"}, {"context_parallel_size": 2, "cp_scheme": "chain"}, 64, "parallel.cp_scheme=heads"),
        ({"conv_kernel": 5}, {"context_parallel_size": 32, "cp_scheme": "chain"}, 64, r"seq_len = 64 .*kernel - 1 = 4"),
        ({"num_heads": 6, "num_groups": 6}, CP4, 64, r"context_parallel_size in \{1, 2\}"),
        ({}, {"context_parallel_size": 3}, 64, r"data\.seq_len = 64 .*context_parallel_size = 3"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_divide_are_named(model: dict, parallel: dict, seq_len: int, words: str) -> None:
    config = from_dict({"model": model, "parallel": parallel})
    with pytest.raises(ConfigError, match=words):
        check_context_parallel(config.model, config.parallel, seq_len)


def test_named_sizes_divide_the_processes() -> None:
    changes = {
        "model": {"num_heads": 48, "num_groups": 1},
        "parallel": {"tensor_model_parallel_size": 8, "context_parallel_size": 4},
    }
    with pytest.raises(ConfigError, match=r"use parallel.context_parallel_size in \{1, 2\}"):
        check_config(from_dict(changes | {"data": {"seq_len": 96, "dir": "x"}}), 32)
