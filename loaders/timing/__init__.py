"""Measures where time goes: the stages of a sample, the events of a trace, and the file they are written to.

Imports nothing of the package; anything may import it.
"""
