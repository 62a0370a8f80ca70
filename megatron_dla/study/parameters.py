"""Equal numbers of parameters for the arms of a study."""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_dla.config import ModelSection
from megatron_dla.errors import ConfigError
from megatron_dla.model.counts import count_parameters

_TOLERANCE = 0.01  # between the parameters of two arms, as a share


def equal_width(
    model: ModelSection,
    reference: ModelSection,
    vocab_size: int,
    where: str,
    multiple: int,
    fix: str = "change its widths",
) -> ModelSection:
    """`model` with the MLP width, a multiple of `multiple`, that gives it the parameters of `reference`.

    Raises:
        ConfigError: they differ by more than 1 % with the best width; the message names the arm, `where`, and ends with
            `fix`.
    """
    wanted = count_parameters(reference, vocab_size)
    if abs(count_parameters(model, vocab_size) - wanted) <= 1e-4 * wanted:
        return model
    widths = (multiple, 2 * multiple)
    counts = [count_parameters(replace(model, ffn_hidden_size=width), vocab_size) for width in widths]
    width = multiple * max(1, 1 + round((wanted - counts[0]) / (counts[1] - counts[0])))
    new = replace(model, ffn_hidden_size=width)
    found = count_parameters(new, vocab_size)
    if not math.isclose(found, wanted, rel_tol=_TOLERANCE):
        raise ConfigError(
            f"{where}: {found:,} parameters with model.ffn_hidden_size = {width}, the reference has {wanted:,}: {fix}"
        )
    return new
