"""A clock that stands in for the module `time` of a module under test."""


class FakeClock:
    """Time that passes only when a test advances it.

    A test replaces the name `time` of one module, so that no other code sees the clock:
    `monkeypatch.setattr(latency, "time", clock)`.

    Attributes:
        now: Seconds, as all clocks of `time` return them.
        cpu_seconds: CPU time of the process.
    """

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.cpu_seconds = 0.0

    def time(self) -> float:
        """See `time.time`."""
        return self.now

    def monotonic(self) -> float:
        """See `time.monotonic`."""
        return self.now

    def perf_counter(self) -> float:
        """See `time.perf_counter`."""
        return self.now

    def process_time(self) -> float:
        """See `time.process_time`."""
        return self.cpu_seconds

    def sleep(self, seconds: float) -> None:
        """Advance the clock."""
        self.now += seconds
