"""Trace many prompts, here or on Ray: results are written as they finish, and finished ones are not traced again."""

from tl_circuits.batch.jobs import Job, read_jobs
from tl_circuits.batch.trace import trace_many

__all__ = ["Job", "read_jobs", "trace_many"]
