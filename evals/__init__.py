"""Find out, judge, roll out: suites, replays, statistics, the gate. Knows HTTP, never an engine."""
