"""Many prompts: traced one after the other or on Ray, written as they finish, resumed where they stopped."""

from tl_circuits.batch.jobs import Job, read_jobs
from tl_circuits.batch.trace import trace_many

__all__ = ["Job", "read_jobs", "trace_many"]
