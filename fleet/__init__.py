"""Replicas on a Ray cluster: where they run, how many there are, and what becomes of dead ones."""
