"""The KL divergence from the frozen model, over a vocabulary that ranks share."""

import pytest

from tests.support import adapter_workers


@pytest.mark.parametrize("world", [1, 2, 4])
def test_it_is_that_of_torch_over_the_whole_vocabulary(ranks, world) -> None:
    assert max(ranks(world).run(adapter_workers.divergences)) < 1e-14
