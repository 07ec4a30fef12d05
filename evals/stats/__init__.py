"""What can be said of two arms, and how surely: tests, intervals, power. Numbers in, numbers out.

Knows no files, no metrics' names and no decisions; docs/statistics.md explains every test.
"""
