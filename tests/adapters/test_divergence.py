"""The KL divergence from the frozen model, over a vocabulary that ranks share."""

import pytest

from tests.support import adapter_workers


@pytest.mark.parametrize("world", [1, 2, 4])
def test_it_is_that_of_torch_over_the_whole_vocabulary(ranks, world) -> None:
    for value, gradient in ranks(world).run(adapter_workers.divergences):
        assert value < 1e-14 and gradient < 1e-14
