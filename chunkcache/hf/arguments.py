"""What generate() was asked for: prompts as rows of ids, and arguments that reuse cannot serve."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from chunkcache.errors import (
    AttentionMaskError,
    EmptyPromptError,
    InvalidTokensError,
    PromptTooLongError,
    UnsupportedRequestError,
)

_REFUSED: dict[str, str] = {
    "assistant_model": "assisted decoding rolls the cache back",
    "assistant_tokenizer": "assisted decoding rolls the cache back",
    "assistant_early_exit": "assisted decoding rolls the cache back",
    "prompt_lookup_num_tokens": "assisted decoding rolls the cache back",
    "use_mtp": "multi-token prediction rolls the cache back",
    "past_key_values": "the wrapper brings its own cache",
    "cache_implementation": "the wrapper brings its own cache",
    "inputs_embeds": "prefixes are found by token ids",
    "penalty_alpha": "contrastive search rolls the cache back",
    "dola_layers": "DoLa needs the logits of inner layers",
    "custom_generate": "another decoding loop may use the cache in ways that were not proved",
    "prefill_chunk_size": "the wrapper cuts prefill itself (Config.prefill_step)",
    "negative_prompt_ids": "classifier-free guidance runs the model with a cache of its own",
    "output_attentions": "attention weights are never formed",
    "output_hidden_states": "hidden states of reused tokens are not computed",
    "position_ids": "positions follow from the prompt",
}


class Prompts(NamedTuple):
    """Rows of a batch without padding."""

    rows: list[list[int]]
    pads: list[int]
    mask: torch.Tensor


def setting(name: str, kwargs: dict[str, Any], *configs: GenerationConfig | None) -> Any:
    """A generation argument as generate() will see it."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    for config in configs:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


_OURS = {"attention_mask", "use_cache", "tokenizer"}
_CONFIG = set(vars(GenerationConfig()))
_CALL = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}


def known_arguments() -> set[str]:
    """Names that generate() takes or that are refused by name: everything else goes to a forward."""
    return _CONFIG | _CALL | _REFUSED.keys() | _OURS | {"input_ids", "decoder_input_ids"}


def answer_length(answer: list[int], ends: set[int]) -> int:
    """Tokens of a generated row, with its end; what follows is padding."""
    return next((at + 1 for at, token in enumerate(answer) if token in ends), len(answer))


def refuse(
    kwargs: dict[str, Any], *configs: GenerationConfig | None, also: frozenset[str] = frozenset()
) -> None:
    """Raises UnsupportedRequestError for arguments that cannot be combined with reuse.

    Args:
        also: names that are known besides those of generate().
    """
    unknown = kwargs.keys() - _CONFIG - _CALL - _REFUSED.keys() - _OURS - also
    if unknown:
        raise UnsupportedRequestError(
            f"{sorted(unknown)}: neither generate() nor this model's forward takes an argument of "
            "that name"
        )
    for name, why in _REFUSED.items():
        value = setting(name, kwargs, *configs)
        if value is not None and value is not False:
            raise UnsupportedRequestError(f"{name} cannot be used with a wrapped model: {why}")
    if setting("use_cache", kwargs, *configs[:1]) is False:  # some models say so by default
        raise UnsupportedRequestError("use_cache=False leaves nothing to wrap; use the plain model")
    if (setting("guidance_scale", kwargs, *configs) or 1) != 1:
        raise UnsupportedRequestError(
            "guidance_scale cannot be used with a wrapped model: classifier-free guidance runs the "
            "model with a cache of its own"
        )


def read_prompts(
    input_ids: Any, mask: torch.Tensor | None, model: PreTrainedModel, limit: int | None, pad: Any
) -> Prompts:
    """Checks ids and mask and takes the padding off.

    Args:
        input_ids: `[rows, columns]` integers.
        mask: `[rows, columns]`, zeros then ones in each row; None asks for what generate() would
            assume: padding where `pad` stands, if that is a token of its own.

    Raises:
        InvalidTokensError, EmptyPromptError, AttentionMaskError, PromptTooLongError
    """
    check_ids(input_ids, model)
    pads = _pads(_mask(input_ids, mask, pad))
    rows = [ids[skip:] for ids, skip in zip(input_ids.tolist(), pads, strict=True)]
    for row in rows:
        if limit is not None and len(row) > limit:
            raise PromptTooLongError(
                f"the prompt has {len(row)} tokens, the model {limit} positions"
            )
    ones = torch.ones_like(input_ids)
    for row, skip in zip(ones, pads, strict=True):
        row[:skip] = 0
    return Prompts(rows, pads, ones)


def check_ids(input_ids: Any, model: PreTrainedModel) -> None:
    """Raises InvalidTokensError or EmptyPromptError for what is no batch of token ids."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
        raise InvalidTokensError("input_ids must be a tensor of shape [rows, tokens]")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise InvalidTokensError(f"input_ids must be integers, not {input_ids.dtype}")
    if 0 in input_ids.shape:
        raise EmptyPromptError("a prompt needs at least one token")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocabulary:
        raise InvalidTokensError(f"token ids must be from 0 to {vocabulary - 1}")


def _mask(input_ids: torch.Tensor, mask: torch.Tensor | None, pad: Any) -> torch.Tensor:
    if mask is None:
        return torch.ones_like(input_ids) if pad is None else (input_ids != pad).long()
    if not isinstance(mask, torch.Tensor) or mask.shape != input_ids.shape:
        shape = tuple(getattr(mask, "shape", ()))
        raise AttentionMaskError(
            f"attention_mask has shape {shape}, input_ids {tuple(input_ids.shape)}"
        )
    return mask.to(input_ids.device).long()


def _pads(mask: torch.Tensor) -> list[int]:
    pads = []
    for number, row in enumerate(mask.tolist()):
        if not set(row) <= {0, 1}:
            raise AttentionMaskError("attention_mask must hold zeros and ones")
        if 1 not in row:
            raise EmptyPromptError(f"row {number} has no token: its mask is all zeros")
        if 0 in row[row.index(1) :]:
            where = "on the right" if row[-1] == 0 else "with a hole"
            raise AttentionMaskError(
                f"row {number} is padded {where}; prefixes need padding_side='left'"
            )
        pads.append(row.index(1))
    return pads


def eos_ids(kwargs: dict[str, Any], *configs: GenerationConfig | None) -> set[int]:
    """Ids that end a row."""
    eos = setting("eos_token_id", kwargs, *configs)
    if isinstance(eos, torch.Tensor):
        eos = eos.flatten().tolist()
    return set(eos if isinstance(eos, list | tuple) else [] if eos is None else [eos])


def assumed_pad(kwargs: dict[str, Any], *configs: GenerationConfig | None) -> int | None:
    """The id that generate() would mask if no mask is given; None if it would mask nothing."""
    pad = setting("pad_token_id", kwargs, *configs)
    eos = setting("eos_token_id", kwargs, *configs)
    ends = eos if isinstance(eos, list) else [eos]
    return pad if isinstance(pad, int) and pad not in ends else None
