"""wrap(): a model whose generate() reuses every prefix it has seen."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from chunkcache.attention.batch import Batch
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
from chunkcache.hf.cache import ChunkCache
from chunkcache.hf.fingerprint import Watch, arithmetic, digest_weights, namespace
from chunkcache.hf.forward import ForwardHooks
from chunkcache.hf.ledger import Ledger, tree_rows
from chunkcache.hf.prefill import Prefiller, Row, Space
from chunkcache.hf.probe import (
    Proof,
    check_model,
    fixed_rope_limit,
    position_limit,
    probe,
)
from chunkcache.hf.twin import make_twin
from chunkcache.kv.store import PrefixStore
from chunkcache.lab.records import Reuse, Stats, TreeRow


def wrap(
    model: PreTrainedModel, tokenizer: Any = None, config: Config | None = None
) -> CachedModel:
    """Wraps a model; the model itself is left as it is.

    Runs the parity probe (a few short forwards) and a digest of the weights.

    Raises:
        UnsupportedModelError: nothing could be proved; the reason says why.
        TrainingModeError: the model is in training mode.
        AlreadyWrappedError: `model` is a CachedModel.
        ConfigError: the byte budget is smaller than one chunk.
    """
    return CachedModel(model, tokenizer, config or Config())


class CachedModel:
    """A model with a prefix cache; also a context manager that closes it.

    Everything not defined here is the wrapped model's own, so it can stand in for it in
    `transformers.pipeline`. Thread-safe: threads generate side by side, and a prefix that several
    need at once is computed once.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, settings: Config):
        if isinstance(model, CachedModel):
            raise AlreadyWrappedError("this model is wrapped already; close() it first")
        check_model(model)
        _check_eval(model)
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self._twin = make_twin(model)
        self._hooks = ForwardHooks(self._twin)
        self._hooks.install(self._twin)
        self.proof: Proof = self._prove()
        self.store = PrefixStore(self.proof.layout, settings.budget, settings.policy)
        self._prefiller = Prefiller(self._twin, self.store, settings, False, self._current)
        self._apply_proof()
        self._limit = position_limit(model)
        self._rope_limit = fixed_rope_limit(model)
        self._lock = threading.RLock()
        self._epochs = itertools.count()
        self._ledger = Ledger()
        self._closed = False
        self._fingerprint()

    # -- what was proved

    def _prove(self) -> Proof:
        settings = self.settings
        rows, kernel = settings.exactness == "auto", settings.kernel
        size = settings.chunk_size
        return probe(self.model, self._twin, self._hooks, size, rows=rows, kernel=kernel)

    def _apply_proof(self) -> None:
        exact = self.settings.mode == "exact"
        self._hooks.multiple = self.proof.rows if exact and self.proof.rows else 1
        self._prefiller.borders = exact and not self.proof.rows

    # -- the namespace

    def _fingerprint(self) -> None:
        self._weights = digest_weights(self.model)
        self._watch = Watch(self.model, self._twin)
        self._space = self._next_space()

    def _enter(self) -> Space:
        """Where chunks of the model as it is now belong; forgets those of changed weights."""
        with self._lock:
            if self._watch.changed():
                stale = self._space
                self._fingerprint()
                if stale.name != self._space.name:
                    self.store.drop(stale.name)
            if self.proof.arithmetic != arithmetic(self.model.device):
                self.proof = self._prove()
                self._apply_proof()
                self._space = self._next_space()
            return self._space

    def _next_space(self) -> Space:
        settings = {
            "chunk_size": self.settings.chunk_size,
            "mode": self.settings.mode,
            "rows": self.proof.rows,
            "kernel": self.proof.kernel,
            "linear": self.proof.linear,
            "border": self.settings.border if self._prefiller.borders else 0,
        }
        name = namespace(self._twin, self._weights, settings, self.settings.tenant)
        return Space(name, next(self._epochs))

    def _current(self) -> Space | None:
        """The space that may be stored to: none after close(), or when anything is not as it was.

        The twin has settings and hooks of its own, so tensors and arithmetic are all that can change
        under a running request; the next one looks at the rest.
        """
        with self._lock:
            same = self.proof.arithmetic == arithmetic(self.model.device)
            same = same and not self._closed and self._watch.same_tensors()
            return self._space if same else None

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
        own = kwargs.pop("input_ids", None)
        configs = (generation_config, self.model.generation_config)
        arguments.refuse(kwargs, *configs)
        prompts = arguments.read_prompts(
            inputs if own is None else own,
            kwargs.pop("attention_mask", None),
            self.model,
            self._limit,
            arguments.assumed_pad(kwargs, *configs),
        )
        copies = _copies(kwargs, *configs)
        self._check_rope(prompts, kwargs, *configs)
        self._twin.generation_config = self.model.generation_config
        input_ids = inputs if own is None else own
        ends = arguments.eos_ids(kwargs, *configs)
        with self._open(prompts.rows) as rows:
            cache = self._prepare(rows, prompts.pads, copies)
            with self._ledger.running(cache.batch):
                result = self._twin.generate(
                    input_ids,
                    generation_config=generation_config,
                    attention_mask=prompts.mask,
                    past_key_values=cache,
                    **kwargs,
                )
            self._ledger.note(rows)
            self._keep_answers(rows, cache, ends)
        if getattr(result, "past_key_values", None) is not None:
            result.past_key_values = None  # its chunks may be evicted from now on
        return result

    def _check_rope(self, prompts: arguments.Prompts, kwargs: Any, *configs: Any) -> None:
        if self._rope_limit is None:
            return
        new = arguments.setting("max_new_tokens", kwargs, *configs)
        longest = arguments.setting("max_length", kwargs, *configs) or 20
        end = longest if new is None else max(map(len, prompts.rows)) + new
        if end > self._rope_limit:
            raise PromptTooLongError(
                f"prompt and answer may reach {end} tokens, but beyond {self._rope_limit} this "
                "model's rotary embeddings change and KV can no longer be shared"
            )

    @contextmanager
    def _open(self, prompts: list[list[int]]) -> Iterator[list[Row]]:
        """The rows of a request, filled as far as the request's shape allows; given back at the end."""
        space = self._enter()
        rows: list[Row] = []
        try:
            for tokens in prompts:
                row = self._prefiller.open(space, tokens)
                rows.append(row)
                if len(prompts) > 1:
                    self._fill(row, len(tokens) - 1)
            yield rows
        finally:
            for row in rows:
                self._prefiller.close(row)

    def _fill(self, row: Row, until: int) -> None:
        self._prefiller.prefill(row, until)
        self._prefiller.publish(row)

    def _prepare(self, rows: list[Row], pads: list[int], copies: int) -> ChunkCache:
        """The cache to hand to generate(): all of each prompt but what its first forward computes.

        A single row leaves its last prefill step to that forward, so a prompt costs no extra step;
        several rows leave one token each, which is the same for all.
        """
        if len(rows) == 1 and copies == 1:
            row = rows[0]
            start = self._prefiller.last_step(row)
            if start > row.length:
                self._prefiller.prefill(row, start)
            if start == len(row.tokens) - 1:
                self._prefiller.publish(row)
            return ChunkCache(row.batch, pads, lambda: self._after_prefill(row))
        if len(rows) == 1:
            self._fill(rows[0], len(rows[0].tokens) - 1)
        order = [number for number in range(len(rows)) for _ in range(copies)]
        batch = Batch.join([row.batch for row in rows]) if len(rows) > 1 else rows[0].batch
        if copies > 1:
            batch = batch.select(order)
        return ChunkCache(batch, [pads[number] for number in order])

    def _after_prefill(self, row: Row) -> None:
        self._prefiller.publish(row)

    def _keep_answers(self, rows: list[Row], cache: ChunkCache, ends: set[int]) -> None:
        """Counts what was generated and stores it, so that a next turn finds it."""
        keep = self.settings.keep_answers and not self._prefiller.borders
        copies = cache.batch.rows // len(rows)
        for number, sequence in enumerate(cache.batch.sequences):
            prompt = len(rows[number // copies].tokens)
            answer = sequence.tokens[prompt:]
            end = next((at for at, token in enumerate(answer) if token in ends), None)
            # The last token was sampled but never run; what follows an end is padding.
            count = len(answer) + 1 if end is None else end + 1
            tokens = sequence.tokens[: prompt + count]
            self._ledger.generated(count)
            if keep:
                self._prefiller.store_tokens(rows[0].space, cache.batch, number, tokens)

    def _check_usable(self) -> None:
        if self._closed:
            raise ClosedError("this wrapper was closed; wrap the model again")
        _check_eval(self.model)
        if torch.is_autocast_enabled(self.model.device.type):
            raise UnsupportedRequestError(
                "autocast changes the type of KV in mid-model; load the model in that type instead"
            )

    # -- records

    @property
    def last_reuse(self) -> list[Reuse]:
        """A record per prompt of this thread's last generate(), else of anybody's last."""
        return self._ledger.last

    def stats(self) -> Stats:
        """Sums since wrap() and what is stored now."""
        kind, decisions = str(self.model.config.model_type), self._prefiller.decisions
        return self._ledger.stats(kind, self.settings, self.proof, self.store, decisions)

    def tree_rows(self) -> list[TreeRow]:
        """The stored prefixes, depth first."""
        size = self.store.layout.token_bytes
        trees = self.store.trees()
        return [row for tree in trees for row in tree_rows(tree, size, self._snippet)]

    def _snippet(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids)) if self.tokenizer is not None else ""

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
            PromptError: shorter than a chunk, or not a prompt.
            PoolExhaustedError: the budget cannot hold it; nothing is pinned.
            ModelChangedError: the model changed meanwhile; nothing is pinned.
        """
        self._check_usable()
        ids = self._ids(prompt)
        arguments.read_prompts(torch.tensor([ids]), None, self.model, self._limit, None)
        space = self._enter()
        row = self._prefiller.open(space, ids, len(ids))
        try:
            self._prefiller.prefill(row, len(ids))
            stored = self._prefiller.publish(row, name=name, ttl=ttl)
        finally:
            self._prefiller.close(row)
        unit = self.settings.border if self._prefiller.borders else self.settings.chunk_size
        if len(ids) < unit:
            raise PromptError(f"{len(ids)} tokens were given; {unit} are the least that is stored")
        if stored < len(ids) - len(ids) % unit:
            self._check_usable()
            if self._current() != space:
                raise ModelChangedError(
                    "the model changed while the prompt was computed; preload it again"
                )
            raise PoolExhaustedError(
                f"only {stored} of {len(ids)} tokens fit: what else is stored is in use or pinned; "
                "raise device_bytes or flush()"
            )
        if pin:
            self.store.tree(space.name).pin(ids[:stored], name, ttl)
        return stored

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

    def flush(self) -> int:
        """Drops everything that no running request holds, pinned or not; returns the chunks freed."""
        return sum(tree.clear() for tree in self.store.trees())

    def close(self) -> None:
        """Drops the cache; generate() raises ClosedError from now on. The model is as it was."""
        self._closed = True
        self.store.close()

    def __enter__(self) -> CachedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def eval(self) -> CachedModel:
        """Puts the model into evaluation mode, where it must be anyway."""
        self.model.eval()
        return self

    @property
    def generation_config(self) -> GenerationConfig:
        """The wrapped model's own defaults for generate()."""
        config: GenerationConfig = self.model.generation_config
        return config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.model.generation_config = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A plain forward of the wrapped model, without the cache."""
        return self.model(*args, **kwargs)


def _check_eval(model: PreTrainedModel) -> None:
    if model.training:
        raise TrainingModeError("the model is in training mode (dropout); call model.eval() first")


def _copies(kwargs: dict[str, Any], *configs: GenerationConfig | None) -> int:
    """Rows that generate() makes of one prompt."""
    beams = arguments.setting("num_beams", kwargs, *configs) or 1
    returned = arguments.setting("num_return_sequences", kwargs, *configs) or 1
    return int(beams) if beams > 1 else int(returned)
