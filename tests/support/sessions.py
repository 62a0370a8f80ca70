"""A row of tokens with message numbers, a chat, and what sessions are compared with: plain forward passes."""

import torch

from megatron_dla.adapters.memory import MemoryInputs
from megatron_dla.serving.session import Session
from tests.support.tiny_hf import build_tokenizer, tokens

ROW = tokens(1, 30)[0].tolist()
NUMBERS = [-1] * 4 + [0] * 9 + [1] * 10 + [2] * 7
CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo!"},
    {"role": "user", "content": "and?"},
]


def forward(model, ids, numbers, states=None):
    """Last logits and states of one plain call."""
    with torch.no_grad():
        message = torch.tensor([numbers]) if model.config.write == "message" else None
        out = model(torch.tensor([ids]), states=states, inputs=MemoryInputs(message=message))
        return out.logits[0, -1], out.states


def same_states(a, b, exact=True, numbers=True) -> bool:
    """`numbers`: those of open messages, too."""

    def parts(states):
        return [
            x
            for _, s in sorted(states.items())
            for x in (s.S, *(v for k, v in (vars(s.pending) if s.pending else {}).items() if numbers or k != "message"))
        ]

    pairs = list(zip(parts(a), parts(b), strict=True))
    return all(torch.equal(x, y) if exact else torch.allclose(x, y, rtol=0, atol=1e-5) for x, y in pairs)


def fed(model, ids=ROW, numbers=NUMBERS, cut=17) -> Session:
    session = Session(model, build_tokenizer())
    session.append(ids[:cut], numbers[:cut])
    session.append(ids[cut:], numbers[cut:])
    return session
