"""Loss of episodes in the published two-pass form, on a transformers model; tests compare packed training with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from megatron_dla.adapters.memory import MemoryInputs
from megatron_dla.serving.hf_model import DeltaMemModel
from megatron_dla.tasks.adapter.episodes import Episode


@torch.no_grad()
def answer_loss(model: DeltaMemModel, episodes: Sequence[Episode]) -> float:
    """Mean loss (nats) of the answer tokens: each episode's write segment goes to an empty memory, then its read
    segment, which does not write and does not attend to the write segment."""
    nats, count = 0.0, 0
    for episode in episodes:
        assert not episode.in_prompt, "one pass"
        write, message, read, answer = (
            torch.from_numpy(x)[None].to(model.device)
            for x in (episode.write_ids, episode.write_messages, episode.read_ids, episode.answer)
        )
        states = model(write, inputs=MemoryInputs(message=message), logits_to_keep=1).states
        quiet = MemoryInputs(write=torch.zeros_like(answer), message=torch.full_like(read, -1))
        logits = model(read, states=states, inputs=quiet).logits[0, :-1]
        losses = F.cross_entropy(logits.float(), read[0, 1:], reduction="none")
        nats += losses[answer[0, 1:]].double().sum().item()
        count += int(answer.sum())
    return nats / count
