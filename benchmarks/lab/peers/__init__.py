"""Engines beside ours, each a program of its own interpreter that speaks JSON lines."""
