"""Verdicts as people and machines read them: JUnit, Markdown, one HTML page.

Knows what was found, not how; answers are hostile input and never reach a reader unescaped.
"""
