"""Guess cheaply, verify exactly: proposers of tokens, and the rule that keeps the target's law.

Knows tokens, probabilities and costs; knows no engine, no requests and nothing else of ours.
"""
