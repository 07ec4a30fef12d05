"""The instruments: what is told and how, conditions, statistics, a running stack, a client."""
