"""The small model that ships: its tasks, its tokenizer, its training and its evaluation.

An ordinary transformers program. It knows nothing of the rest of the project.
"""
