"""Models by name, for all commands that take one."""

from __future__ import annotations

from typing import Any

import click

DTYPES = ("auto", "float32", "bfloat16", "float16")

dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="Number type of the weights; auto takes them as stored, and float32 for the demo.",
)


def load(model: str, dtype: str = "auto") -> tuple[Any, Any]:
    """A model in eval mode and its tokenizer, from a folder, the hub, or `demo`.

    Raises:
        click.ClickException: nothing there that transformers can load.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from chunkcache.demo import model_path

    logging.disable_progress_bar()
    source = str(model_path()) if model == "demo" else model
    wanted = "float32" if model == "demo" and dtype == "auto" else dtype
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=wanted)
    except (OSError, ValueError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise click.ClickException(f"cannot load {model!r}: {first_line}") from error
    return loaded.eval(), tokenizer
