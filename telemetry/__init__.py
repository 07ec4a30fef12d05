"""What services tell of themselves: observed requests, and traces."""

from telemetry.observation import FROM_CACHE, Observation, Outcome

__all__ = ["FROM_CACHE", "Observation", "Outcome"]
