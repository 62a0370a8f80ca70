"""Exported models with every kind of layer."""

from dataclasses import replace

import pytest

from megatron_dla.hf.convert import to_hf
from megatron_dla.hf.load import load_export
from tests.support.exports import BASE

SECTIONS = {
    "slots": BASE,  # DLA alone
    "softmax": replace(BASE, pattern="AW"),
    "mamba2_all": replace(BASE, num_layers=5, pattern="DAWLM", conv_kernel=3, conv_bias=True),
    "gdn_all": replace(
        BASE, backbone="gdn", num_layers=4, num_groups=2, pattern="DNGA", slot_weights="content", qk_norm=True,
        boundary="random", boundary_rate=0.3, merge="random", control_seed=11,
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def served(saved, tmp_path_factory):
    """`served(name)`: an exported model, loaded once."""
    made = {}

    def get(name):
        if name not in made:
            run = tmp_path_factory.mktemp(name)
            made[name] = load_export(to_hf(saved(SECTIONS[name], run)[1], run / f"hf_{name}"))
        return made[name]

    return get
