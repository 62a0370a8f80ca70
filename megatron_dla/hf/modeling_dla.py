"""A Dynamic Linear Attention language model in plain torch and transformers.

This file and those beside it that it imports are copied into every exported directory, together with the recurrence
(`attention.py`, `cache.py`, ...), the mixer's arithmetic (`functional.py`), the table of its parameters (`layout.py`)
and the letters of the layer pattern (`pattern.py`): the same files that training runs.
It is therefore imported from such a directory, with `trust_remote_code=True`, and not from this package.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from .cache_dla import DLACache, LayerMemory
from .configuration_dla import DLAConfig
from .layers_dla import DLALayer, DLAMixer, DLARMSNorm, Step
from .layout import FP32_PARAMETERS, zeros
from .pattern import LETTERS
from .rotary import rotary_frequencies

logger = logging.get_logger(__name__)

# transformers renames the cache from `past_key_values` to `cache` in 5.24; calls may use either name
CACHE_FIELD = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"


def one_cache(past_key_values: DLACache | None, cache: DLACache | None) -> DLACache | None:
    """The cache of a call, under whichever of its two names it came. Raises ValueError for two different ones."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument: give one of them")
    given = cache if past_key_values is None else past_key_values
    if given is not None and not isinstance(given, DLACache):
        raise ValueError(f"past_key_values must be a DLACache, got {type(given).__name__}: leave it out to get one")
    return given


def left_padding(mask: Tensor | None, past: int, batch: int, tokens: int, keep: bool) -> Tensor | None:
    """Leading padded tokens of each row, int64 [B], from an attention mask; None where there are none.

    Args:
        mask: [B, past + tokens] (or [B, tokens]), 1 = token, 0 = padding, or None.
        past: tokens read before this call. keep: whether a cache is filled.

    Raises:
        ValueError: the mask has another shape, a hole, or padding after the tokens where a cache is filled.
    """
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in (tokens, past + tokens):
        raise ValueError(f"attention_mask must be {(batch, past + tokens)}, got {tuple(mask.shape)}")
    now = mask[:, -tokens:].bool()
    late = "attention_mask is 0 at a new token: after the first call of a cache every token must be real"
    if past and torch.compiler.is_compiling():
        torch._assert_async(now.all(), late)  # a branch on values would end the graph
        return None
    if bool(now.all()):
        return None
    if past:
        raise ValueError(late)
    count = now.sum(1)
    row = torch.arange(tokens, device=mask.device)
    if bool((now == (row >= (tokens - count)[:, None])).all()):
        if bool((count == 0).any()):
            raise ValueError(
                "attention_mask is 0 over a whole row: drop that row (a left-padded batch cannot be read in chunks: "
                "leave out prefill_chunk_size)"
            )
        return tokens - count
    if bool((now == (row < count[:, None])).all()) and not keep:
        return None  # what comes after the tokens cannot reach them
    raise ValueError(
        "attention_mask has a hole, or padding after the tokens while a cache is filled: a recurrent state would hold "
        "the padded tokens. Pad on the left (tokenizer.padding_side='left'), or pass use_cache=False"
    )


def packed_starts(
    position_ids: Tensor | None, ends: Tensor | None, mask: Tensor | None, batch: int, tokens: int
) -> Tensor | None:
    """bool [B, T], True where a document of a packed row begins; None where no row has a second one.

    Args:
        position_ids: int [B or 1, T]; a document begins where they do not increase by one.
        ends: int [n + 1] or None, document borders over the flattened tokens (`cu_seq_lens_q`); goes before the ids.
        mask: the attention mask; positions of padding mean nothing.
    """
    if ends is not None:
        starts = torch.zeros(batch * tokens + 1, dtype=torch.bool, device=ends.device)
        starts[ends.long()] = True
        starts = starts[:-1].view(batch, tokens)
    elif position_ids is not None and position_ids.ndim == 2 and position_ids.shape[1] == tokens > 1:
        starts = F.pad(position_ids.diff(dim=1) != 1, (1, 0)).expand(batch, -1)
    else:
        return None
    if mask is not None and mask.ndim == 2 and mask.shape[0] == batch and mask.shape[1] >= tokens:
        real = mask[:, -tokens:].bool()
        starts = starts & real & F.pad(real[:, :-1], (1, 0))
    return starts if bool(starts[:, 1:].any()) else None


class DLAPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = DLAConfig
    base_model_prefix = "model"
    _no_split_modules = ["DLALayer"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _is_stateful = True  # no assisted decoding: a recurrent state cannot be rolled back
    _supports_sdpa = True
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012 (each layer's part stays with it)
    _keep_in_fp32_modules_strict = [f"mixer.{name}" for name in FP32_PARAMETERS]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, DLAMixer):
            return
        table = module.table(self.config)
        # A_log is drawn last, so that a seed gives the model that it gave to the first exports
        for name in sorted(table, key=lambda name: name == "A_log"):
            if not name.endswith(".weight"):  # else transformers has initialised it, by its own rule
                init.copy_(getattr(module, name), table[name].inits[0](table[name].shape, None))
        weight, inits = module.in_proj.weight, table["in_proj.weight"].inits
        if not getattr(weight, "_is_hf_initialized", False):
            with torch.no_grad():
                for rows, start in zip(weight.split(list(module.sizes.values())), inits, strict=True):
                    if start is zeros:
                        rows.zero_()


class DLAModel(DLAPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: DLAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DLALayer(config, letter, n) for n, letter in enumerate(config.layer_letters))
        self.norm = DLARMSNorm(config.hidden_size, config.norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DLACache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: DLACache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, hidden] of `input_ids` [B, T] (or `inputs_embeds`).

        Args:
            attention_mask: [B, past + T]; padding on the left is left out of the memory. Padding on the right is
                allowed only where no cache is filled.
            position_ids: [B or 1, T]; where they begin anew inside a row, so does the memory (packed documents).
            past_key_values, cache: memory of the tokens before, changed in place; two names of one argument.
            use_cache: fill and return a cache; None: unless training, packed or padded on the right.
            kwargs: `cu_seq_lens_q`, document borders over the flattened tokens, goes before `position_ids`; what else
                transformers hands to every model is not used.

        Raises:
            ValueError: a mask or a cache that does not fit, a cache for packed rows, or `output_attentions`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions = True: a recurrence has no attention matrix to return; leave it out")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = one_cache(past_key_values, cache)
        if cache is not None and cache.batch_size not in (None, x.shape[0]):
            raise ValueError(f"the cache holds {cache.batch_size} sequences, the input has {x.shape[0]}")
        starts = packed_starts(position_ids, kwargs.get("cu_seq_lens_q"), attention_mask, *x.shape[:2])
        keep = use_cache if use_cache is not None else starts is None and self._cache_by_default(attention_mask, cache)
        keep = (keep or cache is not None) and not self._recomputes(keep, cache)
        cache = DLACache(len(self.layers)) if keep and cache is None else cache
        step = self._step(x, attention_mask, starts, cache, keep)
        hidden = [x]
        for i, layer in enumerate(self.layers):
            x = layer(x, LayerMemory() if cache is None else cache.layers[i], step)
            hidden.append(x)
        x = self.norm(x)
        if cache is not None:
            cache.seen += x.shape[1]
        want = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        memory: dict[str, Any] = {CACHE_FIELD: cache}
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=(*hidden[:-1], x) if want else None, **memory)

    def _cache_by_default(self, mask: Tensor | None, cache: DLACache | None) -> bool:
        if cache is not None or self.training or not self.config.use_cache:
            return cache is not None
        return mask is None or mask.ndim != 2 or bool(mask[:, -1].all())

    def _recomputes(self, keep: bool, cache: DLACache | None) -> bool:
        """Whether layers run a second time in backward (gradient checkpointing), when no cache can be filled."""
        recomputes = self.training and torch.is_grad_enabled() and self.is_gradient_checkpointing
        if recomputes and cache is not None:
            raise ValueError("no cache can be filled under gradient checkpointing: call model.eval(), or leave it out")
        if recomputes and keep:
            logger.warning_once("use_cache = True has no effect under gradient checkpointing")
        return recomputes

    def _step(self, x: Tensor, mask: Tensor | None, starts: Tensor | None, cache: DLACache | None, keep: bool) -> Step:
        """Padding, documents, positions and softmax mask of this call."""
        B, T = x.shape[:2]
        softmax = any(LETTERS[letter].softmax for letter in self.config.layer_letters)
        if cache is not None and cache.lengths is not None:
            position = cache.lengths[:, None] + torch.arange(T, device=x.device)
            return Step(None, None, self._rotary(position) if softmax else None, None, keep)
        past = 0 if cache is None else cache.seen
        now = left_padding(mask, past, B, T, keep)
        padding = cache.padding if cache is not None and past else now
        if cache is not None and past == 0:
            cache.padding = now
        position = torch.arange(past, past + T, device=x.device)[None]
        if starts is not None and keep:
            raise ValueError("position_ids begin anew inside a row: packed documents fill no cache: use_cache=False")
        real = None if now is None else position >= now[:, None]
        step = Step(now, real, None, None, keep)
        if not keep and (starts is not None or now is not None):
            step.document = None if starts is None else starts.long().cumsum(1)
            borders = position == (0 if now is None else now[:, None])
            borders = (borders | (position == 0) | (borders if starts is None else starts)).expand(B, T)
            step.ends = F.pad(borders.flatten().nonzero().flatten(), (0, 1), value=B * T)
        if softmax:
            begin = None if padding is None else padding[:, None]
            if starts is not None:
                documents = torch.where(starts, position, 0).cummax(1).values
                begin = documents if begin is None else torch.maximum(begin, documents)
            step.mask = self._softmax_mask(past, position, begin)
            step.rotary = self._rotary(position if begin is None else (position - begin).clamp(min=0))
        return step

    @staticmethod
    def _softmax_mask(past: int, position: Tensor, begin: Tensor | None) -> Tensor | None:
        """bool [B or 1, 1, T, S] or None for the plain causal one; `position` [1, T], `begin` [B, T or 1] or None."""
        T = position.shape[1]
        if begin is None and (past == 0 or T == 1):
            return None
        column, row = torch.arange(past + T, device=position.device), position[..., None]
        if begin is None:
            return (column <= row)[None]
        # a padded query sees itself: an empty row of a softmax is not a number
        return ((column <= row) & (column >= begin[..., None]) | (column == row))[:, None]

    def _rotary(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 cosine and sine [B or 1, T, D] of int positions [B or 1, T]."""
        c = self.config
        frequencies = rotary_frequencies(
            c.attention_channels, c.rope_theta, c.rope_type, c.rope_factor, c.rope_low_freq_factor,
            c.rope_high_freq_factor, c.rope_original_length,
        )  # fmt: skip
        angle = position[..., None].float() * frequencies.to(position.device)
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()


class DLAForCausalLM(DLAPreTrainedModel, GenerationMixin):
    """The language model: logits, loss and generation."""

    accepts_loss_kwargs = True  # the loss divides by `num_items_in_batch` where it is given
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DLAConfig) -> None:
        super().__init__(config)
        self.model = DLAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As of every model; only the rows from `new_num_tokens` on, and pad, are not generated afterwards."""
        done = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None and self.config.tokenizer_size:
            unused = set(range(new_num_tokens, self.config.vocab_size))
            if self.config.pad_token_id is not None:
                unused.add(self.config.pad_token_id)
            self.generation_config.suppress_tokens = sorted(unused) or None
        return done

    def _taught(self, labels: Tensor) -> None:
        """A token that was added to the tokenizer can be generated as soon as the model is trained on it."""
        suppressed = self.generation_config.suppress_tokens
        if suppressed and int(labels.max()) >= self.config.tokenizer_size > 0:
            known = set(labels.unique().tolist())
            self.generation_config.suppress_tokens = [i for i in suppressed if i not in known] or None

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # of transformers' own class: see the next method

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> Any:
        parent: Any = super()
        done = parent._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if model_kwargs.get(CACHE_FIELD) is None and generation_config.use_cache:
            model_kwargs[CACHE_FIELD] = DLACache(self.config.num_layers)
        return done

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DLACache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: DLACache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab] (the last `logits_to_keep` tokens, 0 = all); the other arguments as `DLAModel`.

        Args:
            labels: int64 [B, T], of the tokens that logits are computed for; token t is scored by the logits at t - 1;
                -100 is left out. The loss is the mean, or the sum over `num_items_in_batch`.
            kwargs: for the model and for the loss (`num_items_in_batch`, `shift_labels`).

        Raises:
            ValueError: as `DLAModel`; also labels of another length than the logits.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=False if labels is not None and use_cache is None else use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(
                    f"labels are {tuple(labels.shape)}, logits {tuple(logits.shape[:2])}: leave logits_to_keep at 0"
                )
            if self.training:
                self._taught(labels)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        memory = {CACHE_FIELD: getattr(out, CACHE_FIELD)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states, **memory)


class DLAForSequenceClassification(GenericForSequenceClassification, DLAPreTrainedModel):
    """A linear head on each row's last token that is not `pad_token_id`: logits [B, num_labels], loss with `labels`."""

    accepts_loss_kwargs = False  # its loss is a mean over rows

    def __init__(self, config: DLAConfig) -> None:
        DLAPreTrainedModel.__init__(self, config)  # the generic one asks whether to trust the code that runs already
        self.num_labels = len(config.id2label or ())
        self.model = DLAModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


__all__ = ["DLACache", "DLAForCausalLM", "DLAForSequenceClassification", "DLAModel", "DLAPreTrainedModel"]
