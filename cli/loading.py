"""Models by name, for all commands that take one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

DTYPES = ("auto", "float32", "bfloat16", "float16")
_CONFIG_FIELDS = {"model_type", "num_hidden_layers", "n_layer", "n_layers", "num_layers"}
_TEXT_PARTS = ("text_config", "llm_config", "language_config")
_BAD_FIELDS = (ValueError, TypeError, KeyError, AttributeError)  # of values that make no sense

dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="auto",
    show_default=True,
    help="Number type of the weights; auto takes them as stored, and float32 for the demo.",
)


def load(model: str, dtype: str = "auto", tokens: bool = True) -> tuple[Any, Any]:
    """A model in eval mode and its tokenizer, from a folder, the hub, or `demo`.

    Args:
        tokens: whether a tokenizer is needed; None takes its place otherwise.

    Raises:
        click.ClickException: nothing there that transformers can load.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    from chunkcache.demo import model_path

    logging.disable_progress_bar()
    source = str(model_path()) if model == "demo" else model
    wanted = "float32" if model == "demo" and dtype == "auto" else dtype
    try:
        encodes = AutoConfig.from_pretrained(source).is_encoder_decoder
        kind = AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM
        loaded = kind.from_pretrained(source, dtype=wanted)
        tokenizer = AutoTokenizer.from_pretrained(source) if tokens else None
    except (OSError, ValueError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise click.ClickException(f"cannot load {model!r}: {first_line}") from error
    return loaded.eval(), tokenizer


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model, from a folder, the hub, or `demo`; no weights.

    Raises:
        click.ClickException: nothing there that transformers can load.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from chunkcache.demo import model_path

    logging.set_verbosity_error()  # prompts may be longer than the model takes: nothing runs
    try:
        return AutoTokenizer.from_pretrained(str(model_path()) if model == "demo" else model)
    except (OSError, ValueError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise click.ClickException(f"cannot load {model!r}: {first_line}") from error


def load_config(model: str) -> Any:
    """A model's configuration, from a folder, a config.json, the hub, or `demo`; no weights.

    Code that comes with a model is not run: a configuration of a type that transformers does not
    know is taken as its fields alone.

    Raises:
        click.ClickException: nothing there that is the configuration of a model.
    """
    from chunkcache.demo import model_path

    path = model_path() if model == "demo" else Path(model)
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise click.ClickException(f"cannot load {model!r}: no config.json in that folder")
    try:
        fields = json.loads(path.read_bytes()) if path.is_file() else _hub_fields(model)
        return _parse_config(fields)
    except (OSError, *_BAD_FIELDS) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise click.ClickException(f"cannot load {model!r}: {first_line}") from error


def _hub_fields(name: str) -> Any:
    """The fields of config.json of a model on the hub, or kept from an earlier visit."""
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(".json"):
        raise OSError("no such file or folder")
    from transformers import PreTrainedConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    fields, _ = PreTrainedConfig.get_config_dict(name)
    if not fields:
        raise OSError("no config.json there")
    return fields


def _parse_config(fields: Any) -> Any:
    if not isinstance(fields, dict) or not fields.keys() & _CONFIG_FIELDS:
        raise ValueError("that is not the configuration of a model: it names no type and no layers")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    name = fields.get("model_type")
    known = name in CONFIG_MAPPING  # whose get() finds nothing: it loads types when asked by []
    part = next((fields[key] for key in _TEXT_PARTS if isinstance(fields.get(key), dict)), None)
    if part and not known:
        return _parse_config(part)
    try:
        return (CONFIG_MAPPING[name] if known else PreTrainedConfig).from_dict(fields)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error
