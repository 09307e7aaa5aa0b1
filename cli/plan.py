"""`chunkcache plan`."""

from __future__ import annotations

import json
import re
from typing import Any

import click

from .loading import DTYPES, load_config

_UNITS = {"": 1, "k": 10**3, "m": 10**6}


class _Contexts(click.ParamType[tuple[int, ...]]):
    """Numbers of tokens with commas between, as 8192,128k,1M."""

    name = "tokens"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """The numbers in the order given."""
        if isinstance(value, tuple):
            return value
        found = [
            re.fullmatch(r"([0-9]+)([km]?)", part.strip().lower()) for part in value.split(",")
        ]
        numbers = tuple(int(part[1]) * _UNITS[part[2]] for part in found if part)
        if len(numbers) < len(found) or not all(numbers):
            self.fail(f"{value!r} is not numbers of tokens, as 8192,128k,1M", param, ctx)
        return numbers


class _Bytes(click.ParamType[int]):
    """A number of bytes, as 16GiB."""

    name = "bytes"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """The number."""
        from chunkcache.config import parse_bytes
        from chunkcache.errors import ConfigError

        try:
            return parse_bytes(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


@click.command(short_help="Tell what MODEL's KV costs.")
@click.argument("model")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="Number type of the model; auto takes the configuration's.",
)
@click.option(
    "--context",
    "contexts",
    type=_Contexts(),
    default="10k,100k,500k,1M",
    show_default=True,
    help="Lengths of one sequence; k is 1,000 and M 1,000,000.",
)
@click.option(
    "--encoder-tokens",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Length of the encoder's input, for models that have one.",
)
@click.option(
    "--budget", type=_Bytes(), default="16GiB", show_default=True, help="Memory for KV, as 16GiB."
)
@click.option(
    "--shared",
    type=click.IntRange(0),
    default=2000,
    show_default=True,
    help="Tokens that all sessions begin with.",
)
@click.option(
    "--private",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Tokens that each session has of its own.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(model: str, dtype: str, contexts: tuple[int, ...], as_json: bool, **o: int) -> None:
    """Tell what MODEL's KV costs, from its configuration alone: no weights are read.

    MODEL may also be a path to a config.json.
    """
    config = load_config(model)
    import torch
    from transformers.utils import logging

    from chunkcache.hf.plan import plan

    logging.set_verbosity_error()  # that fast kernels are missing does not matter here

    found = plan(config, None if dtype == "auto" else getattr(torch, dtype))
    encoder = o["encoder_tokens"]
    if encoder and not found.encoder_token_bytes:
        raise click.UsageError("--encoder-tokens: this model has no encoder")
    sessions = found.sessions(o["budget"], o["shared"], o["private"], encoder)
    if as_json:
        lengths = [
            {
                "tokens": tokens,
                "bytes": found.bytes_at(tokens, encoder),
                "mha_bytes": found.mha_bytes_at(tokens, encoder),
            }
            for tokens in contexts
        ]
        more = {"encoder_tokens": encoder, "contexts": lengths, "sessions": sessions.to_dict()}
        click.echo(json.dumps({"model": model} | found.to_dict() | more, indent=2))
        return
    from chunkcache.lab.views.plan import plan_report
    from chunkcache.lab.views.tables import console

    console().print(plan_report(model, found, contexts, encoder, sessions))
