"""What an encoder-decoder is asked: inputs of the encoder, and the decoder's prompts.

An encoder looks both ways, so its output can be reused for the very same input only. Such an input is
part of the namespace of the decoder's prefixes: a tree per input, at whose root lies what decoding
needs of it.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from chunkcache.errors import AttentionMaskError, InvalidTokensError, UnsupportedRequestError
from chunkcache.hf.arguments import check_ids


class Encoding(NamedTuple):
    """One input of the encoder.

    Attributes:
        key: its content; tokens: how many it counts for; inputs: what the encoder is called with.
    """

    key: bytes
    tokens: int
    inputs: dict[str, torch.Tensor]

    def space(self, namespace: bytes) -> bytes:
        """The namespace of prefixes decoded from it."""
        return hashlib.blake2b(namespace + b"encoded" + self.key, digest_size=32).digest()


def read_encodings(
    inputs: Any, mask: torch.Tensor | None, model: PreTrainedModel, pad: Any
) -> list[Encoding]:
    """The rows of a batch without their padding, which must be on the right.

    Args:
        inputs: ids `[rows, columns]`, or features `[rows, ...]` (audio, images).
        mask: `[rows, columns]`; None asks for what generate() would assume: padding where `pad` stands.

    Raises:
        InvalidTokensError, EmptyPromptError, AttentionMaskError
    """
    if isinstance(inputs, torch.Tensor) and inputs.is_floating_point():
        if mask is not None and not bool((mask == 1).all()):
            raise UnsupportedRequestError(
                "features with a mask are not supported: cut them instead"
            )
        name = str(model.get_encoder().main_input_name)
        return [_features(name, row) for row in inputs]
    check_ids(inputs, model)
    if mask is None:
        mask = torch.ones_like(inputs) if pad is None else (inputs != pad).long()
    rows = []
    for ids, seen in zip(inputs, mask.to(inputs.device), strict=True):
        count = int(seen.sum())
        if not bool((seen[:count] == 1).all()):
            raise AttentionMaskError(
                "an encoder's input must be padded on the right, without holes"
            )
        if not count:
            raise InvalidTokensError("an encoder's input needs at least one token")
        kept = ids[:count].to(torch.int64).cpu()
        key = b"ids" + kept.numpy().tobytes()
        rows.append(Encoding(key, count, {"input_ids": ids[None, :count].to(model.device)}))
    return rows


def _features(name: str, row: torch.Tensor) -> Encoding:
    raw = row.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
    head = f"{name} {tuple(row.shape)} {row.dtype}".encode()
    return Encoding(head + hashlib.blake2b(raw, digest_size=32).digest(), 0, {name: row[None]})


def decoder_prompts(ids: torch.Tensor | None, rows: int, start: Any) -> torch.Tensor:
    """The decoder's prompts `[rows, tokens]` as generate() makes them: behind the start token.

    Raises:
        UnsupportedRequestError: no start token is known.
    """
    if start is None:
        raise UnsupportedRequestError("generate() needs a decoder_start_token_id")
    starts = start if isinstance(start, list) else [int(start)] * rows
    if len(starts) != rows:
        raise UnsupportedRequestError(f"{len(starts)} decoder_start_token_id for {rows} rows")
    begin = torch.tensor(starts, dtype=torch.long).unsqueeze(1)
    if ids is None:
        return begin
    ids = ids.cpu().long()
    missing = len(ids) == rows and bool((ids[:, :1] != begin).all())
    return torch.cat([begin, ids], 1) if missing else ids
