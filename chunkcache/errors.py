"""Every error that chunkcache raises on purpose.

ChunkcacheError
├── ConfigError                 a setting that cannot work (also a ValueError)
├── UnsupportedModelError       nothing could be proved for this model; `.reason` says why
├── UnsupportedRequestError     an argument of generate() that reuse cannot be combined with (ValueError)
├── PromptError                 a prompt that cannot be run (ValueError)
│   ├── InvalidTokensError      ids that are no token ids, or outside the vocabulary
│   ├── EmptyPromptError        no token at all
│   ├── PromptTooLongError      beyond the positions the model has
│   └── AttentionMaskError      right padding, holes, or a mask of another shape
├── ModelStateError             the model is not what was wrapped (RuntimeError)
│   ├── TrainingModeError       model.train() is on
│   ├── ModelChangedError       moved, re-typed or restructured since it was wrapped
│   ├── AdapterStateError       adapters that are merged and switched off at once
│   ├── AlreadyWrappedError     wrap() of what is wrapped already
│   └── ClosedError             used after close()
├── PoolExhaustedError          the byte budget cannot hold what was asked for (MemoryError)
├── StoreError                  a colder tier; requests go on without it
│   ├── StoreDownError          it cannot be reached, or does not answer in time
│   ├── StoreFullError          it takes no more values
│   └── CorruptValueError       a value that is damaged, or of something else
│       └── OtherFormatError    a value that another version wrote
├── TraceError                  a file of requests that cannot be read
├── QueueFullError              the server keeps no more waiting requests
├── ReleasedLeaseError          KV of a released lease was asked for (RuntimeError)
└── RunLengthError              a run of chunks of the wrong length (ValueError)
"""


class ChunkcacheError(Exception):
    """Base of all errors raised by chunkcache."""


class ConfigError(ChunkcacheError, ValueError):
    """A setting that cannot work; the message names the setting and what would work."""


class UnsupportedModelError(ChunkcacheError):
    """No way to reuse KV was proved for a model.

    Attributes:
        reason: what was seen, in one sentence.
    """

    def __init__(self, model_type: str, reason: str):
        super().__init__(f"{model_type}: {reason}")
        self.model_type = model_type
        self.reason = reason


class UnsupportedRequestError(ChunkcacheError, ValueError):
    """An argument of generate() that prefix reuse cannot be combined with."""


class PromptError(ChunkcacheError, ValueError):
    """A prompt that cannot be run; nothing was computed or stored."""


class InvalidTokensError(PromptError):
    """Token ids that are negative, not integers, or outside the vocabulary."""


class EmptyPromptError(PromptError):
    """A prompt (or a row of a batch) without a single token."""


class PromptTooLongError(PromptError):
    """A prompt longer than the positions the model was built for."""


class AttentionMaskError(PromptError):
    """A mask that is not 2-D zeros-then-ones: right padding and holes cannot be prefixes."""


class ModelStateError(ChunkcacheError, RuntimeError):
    """The model is not in the state in which it was wrapped."""


class TrainingModeError(ModelStateError):
    """Dropout makes KV random: call model.eval() first."""


class ModelChangedError(ModelStateError):
    """The model was moved, re-typed or restructured after wrapping: wrap it again."""


class AdapterStateError(ModelStateError):
    """Adapters are merged and switched off at once: call unmerge_adapter() first."""


class AlreadyWrappedError(ModelStateError):
    """wrap() was given something that is already wrapped."""


class ClosedError(ModelStateError):
    """The wrapper was closed."""


class PoolExhaustedError(ChunkcacheError, MemoryError):
    """The byte budget cannot hold what was to be kept; nothing was pinned."""


class StoreError(ChunkcacheError):
    """Something is wrong with a colder tier; requests go on without it."""


class StoreDownError(StoreError):
    """A store cannot be reached, or does not answer in time."""


class StoreFullError(StoreError):
    """A store takes no more values: no room, or nothing may be written."""


class CorruptValueError(StoreError):
    """A stored value that is damaged, of another format, or not of what was asked for."""


class OtherFormatError(CorruptValueError):
    """A stored value that another version wrote: whole, as far as its seal tells, but not readable here."""


class TraceError(ChunkcacheError):
    """A file of requests that cannot be read; the message names the line, if it is one."""


class QueueFullError(ChunkcacheError):
    """As many requests wait as the server keeps; try again later."""


class ReleasedLeaseError(ChunkcacheError, RuntimeError):
    """The KV of a released lease was asked for; it may be somebody else's by now."""


class RunLengthError(ChunkcacheError, ValueError):
    """make_run or Run.split returned a run of another length than asked for."""
