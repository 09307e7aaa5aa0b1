"""wrap(): a model whose generate() reuses every prefix it has seen."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import GenerationConfig

from chunkcache.config import Config
from chunkcache.errors import (
    AlreadyWrappedError,
    ClosedError,
    ModelChangedError,
    PoolExhaustedError,
    PromptError,
    PromptTooLongError,
    TrainingModeError,
    UnsupportedRequestError,
)
from chunkcache.hf import arguments
from chunkcache.hf.ahead import Ahead
from chunkcache.hf.carrier import Carried
from chunkcache.hf.insight import Insight
from chunkcache.hf.ledger import Ledger
from chunkcache.hf.others import Others, answers, is_ids, missed
from chunkcache.hf.plain import check_around, check_model, plain_model
from chunkcache.hf.prefill import Prefiller, Row, Space
from chunkcache.hf.probe import fixed_rope_limit, position_limit
from chunkcache.hf.requests import Request, read_causal, read_encoded
from chunkcache.hf.serving import Serving
from chunkcache.hf.state import ModelState
from chunkcache.hf.tracing import Tracing
from chunkcache.lab.traces.recorder import Recorder

_TRAINING = "the model, or a part of it, is in training mode (dropout); call model.eval() first"


def wrap(
    model: Any,
    tokenizer: Any = None,
    config: Config | None = None,
    trace: Recorder | Path | str | None = None,
) -> CachedModel:
    """Wraps a model; the model itself is left as it is.

    Runs the parity probe (a few short forwards) and a digest of the weights.

    Args:
        model: a transformers PreTrainedModel, a PeftModel around one, or either behind
            `torch.compile`, whose compiled code serves plain forwards only: the wrapper's own run
            uncompiled.
        trace: a file (or a `Recorder`, which can write salted hashes instead of token ids) that every
            prompt is added to, for `chunkcache simulate` and `chunkcache report`.

    Raises:
        UnsupportedModelError: nothing could be proved; the reason says why.
        TrainingModeError: the model, or a part of it, is in training mode.
        AdapterStateError: its adapters are merged and switched off at once.
        AlreadyWrappedError: `model` is a CachedModel.
        ConfigError: the byte budget is smaller than one chunk.
        TraceError: the trace cannot be written.
    """
    return CachedModel(model, tokenizer, config or Config(), trace)


class CachedModel(Insight):
    """A model with a prefix cache; also a context manager that closes it.

    Everything not defined here is the wrapped model's own, so it can stand in for it in
    `transformers.pipeline`. Thread-safe: threads generate side by side, and a prefix that several
    need at once is computed once.

    Adapters may be switched between requests: each state of them has prefixes of its own, which stay.

    Attributes:
        given: what wrap() was given; model: the transformers model in it.
    """

    def __init__(
        self,
        given: Any,
        tokenizer: Any,
        settings: Config,
        trace: Recorder | Path | str | None = None,
    ):
        if isinstance(given, CachedModel):
            raise AlreadyWrappedError("this model is wrapped already; close() it first")
        model = plain_model(given)
        check_model(model)
        if any(module.training for module in model.modules()):
            raise TrainingModeError(_TRAINING)
        check_around(given, model)
        self.given = given
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self._limit = position_limit(model)
        self._rope_limit = fixed_rope_limit(model)
        self._others = Others(model)
        self._one_plain = threading.Lock()
        self._ledger = Ledger()
        self._state = ModelState(model, settings)
        self._ahead = Ahead()
        self._tracing = Tracing(trace, settings, self.store, str(model.config.model_type))

    # -- generate

    def generate(self, inputs: Any = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """transformers' generate, with the prompt's known prefix taken from the cache.

        Takes and returns what `model.generate` does, but for a few arguments that are refused with
        the reason. Afterwards `last_reuse` tells what was reused.

        Raises:
            PromptError: a prompt that cannot be run.
            UnsupportedRequestError: an argument, or autocast, that reuse cannot be combined with.
            TrainingModeError, ModelChangedError, ClosedError
        """
        self._check_usable()
        self._ledger.begin()
        inputs = self._inputs(inputs, kwargs)
        others = self._others.take(inputs, kwargs)
        if others:
            return self._run_plain(others, inputs, generation_config, kwargs)
        request = self._read(inputs, kwargs, generation_config, self.generation_config)
        serving = self._state.serving()
        generator = serving.proof.carrier.generator
        generator.generation_config = self.generation_config
        begin = perf_counter()
        with self._open(request, serving) as rows:
            cache = self._prepare(rows, request, serving.prefiller)
            with self._ledger.running(cache):
                result = generator.generate(
                    past_key_values=cache,
                    generation_config=generation_config,
                    **request.arguments,
                    **kwargs | {"use_cache": True},
                )
            first_token = (cache.first_token_at or perf_counter()) - begin
            self._ledger.note(rows, first_token - _waited(rows))
            self._keep_answers(rows, cache, request.ends, serving.prefiller, first_token)
        if getattr(result, "past_key_values", None) is not None:
            result.past_key_values = None  # its chunks may be evicted from now on
        return result

    def _run_plain(
        self, others: list[str], inputs: Any, config: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The model's own generate(), counted as a miss; nothing is looked up or stored.

        One at a time: some models keep where the images of a prompt are on themselves.
        """
        records = missed(inputs, kwargs.get("attention_mask"), others)
        ids = {} if inputs is None else {"inputs": inputs}
        with self._one_plain:
            result = self.given.generate(generation_config=config, **ids, **kwargs)
        self._ledger.record(records)
        ends = arguments.eos_ids(kwargs, config, self.generation_config)
        prompt = kwargs.get("decoder_input_ids") if self._encodes else inputs
        start = 1 if self._encodes else 0
        width = prompt.shape[1] if prompt is not None and is_ids(prompt) else start
        for answer in answers(result, width):
            self._ledger.generated(arguments.answer_length(answer, ends))
        return result

    def _inputs(self, inputs: Any, kwargs: dict[str, Any]) -> Any:
        """The prompts, or what the encoder reads, whatever name they were given by."""
        names = ["input_ids", self.model.main_input_name] if self._encodes else ["input_ids"]
        named = [kwargs.pop(name) for name in dict.fromkeys(names) if name in kwargs]
        return next((value for value in named if value is not None), inputs)

    @property
    def _encodes(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    def _read(self, inputs: Any, kwargs: dict[str, Any], *configs: Any) -> Request:
        """What is asked for; takes out of `kwargs` what generate() is given in another form."""
        if self._encodes:
            return read_encoded(inputs, kwargs, self.model, self._limit, *configs)
        request = read_causal(inputs, kwargs, self.model, self._limit, *configs)
        self._check_rope(request.rows, kwargs, *configs)
        return request

    def _check_rope(self, rows: list[list[int]], kwargs: Any, *configs: Any) -> None:
        if self._rope_limit is None:
            return
        new = arguments.setting("max_new_tokens", kwargs, *configs)
        longest = arguments.setting("max_length", kwargs, *configs) or 20
        end = longest if new is None else max(map(len, rows)) + new
        if end > self._rope_limit:
            raise PromptTooLongError(
                f"prompt and answer may reach {end} tokens, but beyond {self._rope_limit} this "
                "model's rotary embeddings change and KV can no longer be shared"
            )

    @contextmanager
    def _open(self, request: Request, serving: Serving) -> Iterator[list[Row]]:
        """The rows of a request, filled as far as the request's shape allows; given back at the end."""
        space, prefiller = serving.space, serving.prefiller
        rows: list[Row] = []
        self.prefetch(request.rows[1:])
        try:
            for tokens, encoding in zip(request.rows, request.encodings, strict=True):
                row = prefiller.open(space, tokens, encoding=encoding)
                rows.append(row)
                if prefiller.carrier.alone:
                    prefiller.finish(row)
                elif len(request.rows) > 1:
                    _fill(prefiller, row, len(tokens) - 1)
            yield rows
        finally:
            for row in rows:
                prefiller.close(row)

    def _prepare(self, rows: list[Row], request: Request, prefiller: Prefiller) -> Carried:
        """The cache to hand to generate(): all of each prompt but what its first forward computes.

        A single row leaves its last prefill step to that forward, so a prompt costs no extra step;
        several rows leave one token each, which is the same for all.
        """
        row, copies = rows[0], request.copies
        single = len(rows) * copies == 1 and not prefiller.carrier.alone
        if single:
            start = prefiller.last_step(row)
            prefiller.prefill(row, start)
            if start == len(row.tokens) - 1:
                prefiller.publish(row)
        elif len(rows) == 1 and not prefiller.carrier.alone:
            _fill(prefiller, row, len(row.tokens) - 1)
        pads = [pad for pad in request.pads for _ in range(copies)]
        joined = prefiller.carrier.join([row.carried for row in rows], copies, pads)
        joined.prompt_left = 1
        if single:
            joined.after_prefill = lambda: _publish(prefiller, row)
        return joined

    def _keep_answers(
        self,
        rows: list[Row],
        cache: Carried,
        ends: set[int],
        prefiller: Prefiller,
        first_token: float,
    ) -> None:
        """Counts what was generated and stores it, so that a next turn finds it."""
        keep = self.settings.keep_answers and prefiller.keeps_steps
        copies = cache.rows // len(rows)
        stored: list[list[int]] = []
        counts: list[int] = []
        for number in range(cache.rows):
            prompt = len(rows[number // copies].tokens)
            tokens = cache.tokens(number)
            answer = tokens[prompt:]
            # The last token was sampled but never run.
            ended = any(token in ends for token in answer)
            count = arguments.answer_length(answer, ends) + (not ended)
            self._ledger.generated(count)
            if number % copies == 0:  # a trace has one answer of each prompt
                stored.append(answer[:count] if keep else [])
                counts.append(count)
            if keep:
                prefiller.store_tokens(rows[0].space, cache, number, tokens[: prompt + count])
        if not self._encodes:  # an encoder's input is no prefix
            seconds = _shares(rows, first_token - _waited(rows))
            self._tracing.note(rows, stored, counts, seconds, first_token)

    def _check_usable(self) -> None:
        if self._state.closed:
            raise ClosedError("this wrapper was closed; wrap the model again")
        if self._state.training():
            raise TrainingModeError(_TRAINING)
        if torch.is_autocast_enabled(self.model.device.type):
            raise UnsupportedRequestError(
                "autocast changes the type of KV in mid-model; load the model in that type instead"
            )

    # -- looking after the cache

    def preload(
        self, prompt: Any, name: str | None = None, pin: bool = True, ttl: float | None = None
    ) -> int:
        """Computes and stores a prompt ahead of time.

        Args:
            prompt: text, token ids, or chat messages (these two need a tokenizer, except ids).
            name: shown in reports; pin: keep it under memory pressure; ttl: seconds to keep it.

        Returns:
            Tokens stored: whole chunks only.

        Raises:
            PromptError: shorter than a chunk, not a prompt, or one for which reuse is not proved.
            PoolExhaustedError: the budget cannot hold it; nothing is pinned.
            UnsupportedRequestError: the model is an encoder-decoder.
            ModelChangedError: the model changed meanwhile; nothing is pinned.
        """
        self._check_usable()
        if self.model.config.is_encoder_decoder:
            raise UnsupportedRequestError(
                "an encoder's input is stored by the first generate() that it is given to"
            )
        ids = self._ids(prompt)
        arguments.read_prompts(torch.tensor([ids]), None, self.model, self._limit, None)
        serving = self._state.serving()
        if why := serving.prefiller.unproved(ids):
            raise PromptError(f"this prompt cannot be stored: {why}")
        space, prefiller = serving.space, serving.prefiller
        row = prefiller.open(space, ids, len(ids))
        try:
            prefiller.prefill(row, len(ids))
            stored = prefiller.publish(row, name=name, ttl=ttl)
        finally:
            prefiller.close(row)
        self._check_stored(ids, stored, space, serving)
        if pin:
            self.store.tree(space.name).pin(ids[:stored], name, ttl)
        return stored

    def _check_stored(self, ids: list[int], stored: int, space: Space, serving: Serving) -> None:
        """Says why a preloaded prompt is not stored, or could not be resumed."""
        prefiller = serving.prefiller
        unit = max(prefiller.unit, self.settings.chunk_size)
        if len(ids) < unit:
            raise PromptError(f"{len(ids)} tokens were given; {unit} are the least that is stored")
        if stored < len(ids) - len(ids) % unit:
            self._check_usable()
            if self._state.current(serving) != space:
                raise ModelChangedError(
                    "the model changed while the prompt was computed; preload it again"
                )
            raise PoolExhaustedError(
                f"only {stored} of {len(ids)} tokens fit: what else is stored is in use or pinned; "
                "raise device_bytes or flush()"
            )
        tree = self.store.tree(space.name)
        if prefiller.carrier.snapshots and tree.snapshot_at(ids, stored) is None:
            raise PoolExhaustedError(
                "no snapshot of its state fits beside those that are pinned; raise snapshot_bytes"
            )

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, torch.Tensor):
            return [int(token) for token in prompt.flatten().tolist()]
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            return list(prompt)
        if self.tokenizer is None:
            raise PromptError("text and messages need a tokenizer: wrap(model, tokenizer)")
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        return list(self.tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=False))

    def prefetch(self, prompts: Sequence[list[int]]) -> None:
        """Begins to bring what colder tiers have of prompts that will run soon; returns at once.

        Args:
            prompts: token ids.
        """
        if self._state.tiers is not None and not self._encodes:
            for tokens in prompts:
                self._ahead.start(partial(self._prefetch, list(tokens)))

    def _prefetch(self, tokens: list[int]) -> None:
        """For the model as the last request found it; if it is not that any more, nothing is done."""
        serving = self._state.last()
        if serving is not None:
            serving.prefiller.prefetch(serving.space, tokens)

    def flush(self) -> int:
        """Drops everything that no running request holds, pinned or not; returns the chunks freed."""
        return self._state.flush()

    def settle(self, timeout: float = 5.0) -> bool:
        """Waits until colder tiers have what is stored; whether they have within so many seconds."""
        tiers = self._state.tiers
        return tiers is None or tiers.flush(timeout)

    def close(self) -> None:
        """Drops the cache; generate() raises ClosedError from now on. The model is as it was.

        Colder tiers get a few seconds to take what they were offered.
        """
        self._ahead.close()
        self._state.close()
        self._tracing.close()

    def __enter__(self) -> CachedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def eval(self) -> CachedModel:
        """Puts the model into evaluation mode, where it must be anyway."""
        self.given.eval()
        return self

    @property
    def generation_config(self) -> GenerationConfig:
        """The wrapped model's own defaults for generate()."""
        config: GenerationConfig = self.given.generation_config
        return config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.given.generation_config = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "given":
            raise AttributeError(name)
        return getattr(self.given, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A plain forward of the wrapped model, without the cache."""
        return self.given(*args, **kwargs)


def _fill(prefiller: Prefiller, row: Row, until: int) -> None:
    prefiller.prefill(row, until)
    prefiller.publish(row)


def _waited(rows: list[Row]) -> float:
    """Seconds that were spent waiting for others, who computed what these rows need too."""
    return sum(row.waited for row in rows)


def _shares(rows: list[Row], seconds: float) -> list[float]:
    """What each row had of the time that was spent on computing: as much as it computed."""
    computed = [row.reuse.computed_tokens for row in rows]
    return [seconds * count / sum(computed) for count in computed]


def _publish(prefiller: Prefiller, row: Row) -> None:
    prefiller.publish(row)
