"""The process of one cell: `python -m megatron_dla.study.cell CELL.json RESULT.json PARENT`.

PARENT is the id of the process that started it, with which it ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_dla.processes import end_with_parent


def main(arguments: list[str]) -> int:
    """Learn the cell of the first file and write its result to the second."""
    given, result, parent = arguments
    end_with_parent(int(parent))  # before the imports, which take seconds
    import torch

    from megatron_dla.files import parse_json, write_json
    from megatron_dla.study.learner import learn
    from megatron_dla.study.synthetic import CellConfig

    torch.set_num_threads(1)
    write_json(Path(result), learn(CellConfig.from_plain(parse_json(Path(given).read_bytes()))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
