"""Find out, judge, roll out: suites, replays, statistics and the gate. Knows HTTP, never an engine."""
