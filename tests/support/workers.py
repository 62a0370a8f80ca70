"""What runs on the ranks of the parity tests: build at one layout, run with a random cotangent, give whole tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_dla import compat

compat.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer.spec_utils import build_module  # noqa: E402

from megatron_dla.config import LETTERS, ModelSection, ParallelSection  # noqa: E402
from megatron_dla.mixers.softmax import ContiguousRotary  # noqa: E402
from megatron_dla.model.gpt import build_model, packed_sequence, transformer_config  # noqa: E402
from megatron_dla.model.init import initialise, tag_megatron_parameters  # noqa: E402
from megatron_dla.model.parameters import layer_parameters  # noqa: E402
from megatron_dla.model.spec import layer_spec  # noqa: E402
from megatron_dla.parallel.context import context_slice  # noqa: E402
from megatron_dla.parallel.groups import initialize_model_parallel, process_groups  # noqa: E402
from megatron_dla.parallel.tags import get_tag  # noqa: E402

BASE_SECTION = ModelSection(
    sliding_window=9,
    levels=5,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_groups=2,
    key_dim=8,
    value_dim=12,
    capacity=3,
    tau=1.2,
    ffn_hidden_size=48,
    attention_heads=4,
    attention_groups=2,
    init_std=0.2,
    vocab_multiple=8,
)
ALONE = ParallelSection()
_LAYOUTS: dict[tuple[int, int], dict] = {}


def lay_out(tensor: int, context: int = 1) -> None:
    """Switch Megatron's groups to a layout; groups are made once (each costs gloo threads)."""
    state, key = vars(parallel_state), (tensor, context)
    if key not in _LAYOUTS:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        initialize_model_parallel(tensor, 1, context)
        _LAYOUTS[key] = {k: v for k, v in state.items() if k.startswith("_") and not k.startswith("__")}
    state.update(_LAYOUTS[key])


def gathered_over(x: torch.Tensor, group, dim: int) -> torch.Tensor:
    """The parts of all ranks of a group, joined along `dim`."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)


def whole(parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """A parameter's (or its gradient's) whole value from all tensor-parallel ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(value) for _ in range(group.size())]
    dist.all_gather(parts, value.contiguous(), group=group)
    tag = get_tag(parameter)
    if tag.kind != "sharded":
        for part in parts[1:]:
            assert torch.equal(part, parts[0]), "replicas differ"
    return tag.unshard(parts)


def layout_free(model: torch.nn.Module, values: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    out = {}
    for name, parameter in model.named_parameters():
        value = values[name]
        assert value is not None, f"{name} has no gradient"
        tag = get_tag(parameter)
        out |= dict(zip(tag.keys(name), tag.split(whole(parameter, value)), strict=True))
    return out


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """Summed over the context-parallel ranks, as DeepSpeed does."""
    group, found = parallel_state.get_context_parallel_group(), {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.grad
        if parameter.grad is not None and group.size() > 1:
            dist.all_reduce(parameter.grad, group=group)
    return found


def perturb(model: torch.nn.Module, section: ModelSection) -> None:
    """Move every parameter off its special start (ones, zeros), alike at every layout."""
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, p in model.named_parameters():
            tag = get_tag(p)
            pieces = []
            full = tag.full_shape(p.shape, size)
            for key, n in zip(tag.keys(name), [n for _, n in tag.sections] or [full[tag.dim]], strict=True):
                gen = torch.Generator().manual_seed(sum(key.encode()) * 7919)
                shape = [n if i == tag.dim else m for i, m in enumerate(full)]
                pieces.append(torch.randn(shape, generator=gen, dtype=torch.float64))
            p += 0.05 * tag.shard(torch.cat(pieces, tag.dim), rank, size).to(p.dtype)


def run_layer(
    section: ModelSection, parallel: ParallelSection, letter: str, documents: list[int], seed: int,
    dtype: torch.dtype = torch.float64, recompute: str = "none",
):  # fmt: skip
    """One TransformerLayer: (output [S, B, hidden], input gradient, {key: gradient}), whole tensors."""
    tensor = parallel.tensor_model_parallel_size
    lay_out(tensor, parallel.context_parallel_size)
    config = transformer_config(section, parallel, dtype, True, recompute)
    groups = process_groups()
    spec = layer_spec(section, letter, cp_scheme=parallel.cp_scheme)
    layer = build_module(spec, config=config, layer_number=1, pg_collection=groups)
    tag_megatron_parameters(layer, layer_parameters(section, letter, tensor))
    initialise(layer, 3, groups.tp.rank(), tensor)
    perturb(layer, section)
    S, B = 48, 2
    gen = torch.Generator().manual_seed(seed)
    full = torch.randn(S, B, section.hidden_size, generator=gen, dtype=torch.float64).to(dtype)
    cotangent = torch.randn(full.shape, generator=gen, dtype=torch.float64).to(dtype)
    packed = packed_sequence(torch.tensor(documents, dtype=torch.int32) if documents else None, S)
    owners = [groups.cp] + ([groups.tp] if parallel.sequence_parallel else [])  # who holds which part of the sequence
    mine = [full, cotangent]
    for group in owners:
        mine = [context_slice(t, group, 0) for t in mine]
    x = mine[0].clone().requires_grad_()
    rotary = None
    if LETTERS[letter].rotary:
        from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

        rope = RotaryEmbedding(config.kv_channels, 1.0, use_cpu_initialization=True, cp_group=groups.cp)
        rotary = ContiguousRotary(rope, groups.cp)(S)
    out, _ = layer(x, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=packed)
    out.backward(mine[1])
    grads = layout_free(layer, gradients(layer))
    gathered = []
    for t in (out.detach(), x.grad):
        for group in reversed(owners):
            t = gathered_over(t, group, 0)
        gathered.append(t)
    return (*gathered, grads)


def errors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest error relative to each tensor's largest entry."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    return {k: ((got[k] - want[k]).abs().max() / want[k].abs().max().clamp(min=1e-30)).item() for k in want}


def check(errors: dict[str, float], limit: float) -> None:
    bad = {key: f"{e:.1e}" for key, e in errors.items() if not e <= limit}
    assert not bad, f"over {limit:.0e}: {bad}"


def layer_parity(section: ModelSection, parallel: ParallelSection, letter: str, documents: list[int], seed: int):
    """Errors of a layer at a layout against the same layer in one process."""
    want = run_layer(section, ALONE, letter, documents, seed)
    got = run_layer(section, parallel, letter, documents, seed)
    named = [{"output": o, "input gradient": i} | g for o, i, g in (got, want)]
    assert all(float(g.abs().max()) > 0 for g in named[1].values()), "a gradient is zero: the test sees nothing there"
    return errors(*named)


@contextlib.contextmanager
def fused_kernels() -> Iterator[None]:
    """The fused kernels, in Triton's interpreter, wherever a GPU would use them."""
    from megatron_dla.mixers import around
    from tests.support import triton_interpreter

    triton_interpreter.use_interpreter()
    chosen, launches = around.uses_kernels, []

    def always(x: torch.Tensor, backend: str) -> bool:
        launches.append(x.dtype)
        return chosen(x, "triton")

    around.uses_kernels = always
    try:
        yield
    finally:
        around.uses_kernels = chosen
    assert launches and set(launches) == {torch.float32}


def fused_parity(section: ModelSection, parallel: ParallelSection, documents: list[int], seed: int, recompute: str):
    """Errors of a DLA layer whose passes around the recurrence are the fused kernels, against torch in float64."""
    want = run_layer(section, ALONE, "D", documents, seed)
    with fused_kernels():
        got = run_layer(section, parallel, "D", documents, seed, torch.float32, recompute)
    named = [{"output": o, "input gradient": i} | g for o, i, g in (got, want)]
    return errors(*({k: x.double() for k, x in one.items()} for one in named))


def fused_model_parity(section: ModelSection, parallel: ParallelSection, documents: list[int], seed: int):
    """Errors of a whole model with the fused kernels and their loss, against torch in float64."""
    want_loss, want = run_model(section, ALONE, documents, seed)
    with fused_kernels():
        got_loss, got = run_model(section, parallel, documents, seed, torch.float32)
    return errors({"loss": got_loss.double()} | {k: x.double() for k, x in got.items()}, {"loss": want_loss} | want)


def run_model(
    section: ModelSection, parallel: ParallelSection, documents: list[int], seed: int,
    dtype: torch.dtype = torch.float64,
):  # fmt: skip
    """The whole model with a random cotangent on the token losses: (losses, {key: gradient})."""
    lay_out(parallel.tensor_model_parallel_size, parallel.context_parallel_size)
    S, B, vocab = 48, 2, 200
    model = build_model(section, parallel, vocab_size=vocab, seq_len=S, seed=seed, dtype=dtype)
    perturb(model, section)
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (B, S + 1), generator=gen)
    packed = packed_sequence(torch.tensor(documents, dtype=torch.int32) if documents else None, S)
    group = parallel_state.get_context_parallel_group()
    rows = ids[:, :-1], ids[:, 1:], torch.rand(B, S, generator=gen)
    tokens, labels, cotangent = (context_slice(x, group) for x in rows)
    losses = model(tokens, None, None, labels=labels.contiguous(), packed_seq_params=packed)
    losses.backward(cotangent)
    return gathered_over(losses.detach(), group, 1), layout_free(model, gradients(model))


def model_parity(section: ModelSection, parallel: ParallelSection, documents: list[int], seed: int):
    want_loss, want = run_model(section, ALONE, documents, seed)
    got_loss, got = run_model(section, parallel, documents, seed)
    return errors({"loss": got_loss} | got, {"loss": want_loss} | want)


def boundary_rates(section: ModelSection, parallel: ParallelSection, seed: int) -> torch.Tensor:
    """Boundary rate of each local head over the layers [layers, H local]: the parity cases must merge and not merge."""
    from megatron_dla.model.gpt import slot_mixers

    lay_out(parallel.tensor_model_parallel_size, parallel.context_parallel_size)
    model = build_model(section, parallel, vocab_size=200, seq_len=48, seed=seed)
    perturb(model, section)
    tokens = torch.randint(0, 200, (2, 48), generator=torch.Generator().manual_seed(seed))
    group = parallel_state.get_context_parallel_group()
    model(context_slice(tokens, group), None, None)
    rates = torch.stack([mixer.take_boundary_rate() for mixer in slot_mixers(model)])
    dist.all_reduce(rates, group=group)
    return rates


def meta_model(section: ModelSection, parallel: ParallelSection, vocab_size: int, monkeypatch) -> torch.nn.Module:
    """The real module without memory: Megatron and the mixers ask the (shimmed) current device."""
    from megatron.core.models.gpt import GPTModel

    from megatron_dla.model.gpt import padded_vocab
    from megatron_dla.model.spec import block_spec

    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    config = transformer_config(section, parallel, torch.float32, False)
    return GPTModel(
        config, block_spec(section), vocab_size=padded_vocab(vocab_size, section.vocab_multiple),
        max_sequence_length=64, position_embedding_type="none",
        share_embeddings_and_output_weights=section.tie_embeddings, pg_collection=process_groups(),
    )  # fmt: skip


def parameter_count(section: ModelSection, parallel: ParallelSection, vocab_size: int) -> int:
    lay_out(parallel.tensor_model_parallel_size, parallel.context_parallel_size)
    model = build_model(section, parallel, vocab_size=vocab_size, seq_len=16, seed=1)
    return sum(p.numel() for p in model.parameters())


def sent_forward(section: ModelSection, parallel: ParallelSection) -> dict[str, float]:
    """Bytes that this rank sends to the others of its context-parallel group in one forward pass, and the plan's."""
    from megatron_dla.config import DataSection, RunConfig, TrainingSection
    from megatron_dla.training.plan import context_bytes

    lay_out(parallel.tensor_model_parallel_size, parallel.context_parallel_size)
    model = build_model(section, parallel, vocab_size=60, seq_len=48, seed=1)
    sent = {"bytes": 0.0, "scalars": 0.0}
    originals = {name: getattr(dist, name) for name in ("all_to_all_single", "send", "batch_isend_irecv")}

    def all_to_all(out, x, group=None):
        sent["bytes"] += x.nbytes * (group.size() - 1) / group.size()
        return originals["all_to_all_single"](out, x, group=group)

    def send(x, *args, **kwargs):
        sent["bytes" if x.ndim == 5 else "scalars"] += x.nbytes
        return originals["send"](x, *args, **kwargs)

    def batch(ops):
        sent["bytes"] += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return originals["batch_isend_irecv"](ops)

    dist.all_to_all_single, dist.send, dist.batch_isend_irecv = all_to_all, send, batch
    try:
        ids = torch.randint(0, 60, (2, 48), generator=torch.Generator().manual_seed(1))
        model(context_slice(ids, parallel_state.get_context_parallel_group()), None, None)
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)
    run = RunConfig(data=DataSection(seq_len=48), model=section, parallel=parallel)
    run.training = TrainingSection(micro_batch_size=2)
    return sent | {"planned": context_bytes(run, 4)}


def slot_statistics(section: ModelSection, parallel: ParallelSection, documents: list[int], seed: int):
    """(metrics, partitions and readout weights of each layer) of one training pass of rows [2, 48]."""
    from megatron_dla.mixers.dla import DLAMixer
    from megatron_dla.mixers.statistics import SlotStatistics, report
    from megatron_dla.model.gpt import slot_mixers

    lay_out(parallel.tensor_model_parallel_size, parallel.context_parallel_size)
    model = build_model(section, parallel, vocab_size=200, seq_len=48, seed=seed, dtype=torch.float64).train()
    perturb(model, section)
    tokens = torch.randint(0, 200, (2, 48), generator=torch.Generator().manual_seed(seed))
    packed = packed_sequence(torch.tensor(documents, dtype=torch.int32), 48)
    partitions, weights = [], []
    mixers, mix, partition = slot_mixers(model), DLAMixer._mix, DLAMixer._partition

    def keep_weights(self, inputs, *args):
        weights.append(inputs.slot_weights.detach())
        return mix(self, inputs, *args)

    def keep_partition(self, *args):
        partitions.append(partition(self, *args))
        return partitions[-1]

    DLAMixer._mix, DLAMixer._partition = keep_weights, keep_partition
    try:
        for mixer in mixers:
            mixer.statistics = SlotStatistics(mixer.heads, section.capacity, torch.device("cpu"))
        model(context_slice(tokens, parallel_state.get_context_parallel_group()), None, None, packed_seq_params=packed)
    finally:
        DLAMixer._mix, DLAMixer._partition = mix, partition
    groups = process_groups()
    return report([mixer.statistics for mixer in mixers], groups.dp_cp, groups.tp), partitions, weights
