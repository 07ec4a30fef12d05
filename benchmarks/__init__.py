"""Measurements that anybody can make again, one module each; `lab/` holds the instruments.

A module here has an `ABOUT`, a `main(argv)`, and the options --json and --quick.
"""
