"""Running requests: jobs, sampling, incremental text, and a worker that runs them one by one."""

from chunkcache.engine.jobs import Answer, Delta, Event, Failed, Finished, Job, Result, Sampling
from chunkcache.engine.runner import Runner

__all__ = [
    "Answer",
    "Delta",
    "Event",
    "Failed",
    "Finished",
    "Job",
    "Result",
    "Runner",
    "Sampling",
]
