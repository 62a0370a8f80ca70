"""What every rank of a test imports: once in a server process, from which ranks are forked (`distributed.Ranks`)."""

import deepspeed  # noqa: F401

from megatron_dla import compat

compat.install()

import megatron_dla.model.gpt  # noqa: E402
import megatron_dla.tasks.run  # noqa: E402, F401
