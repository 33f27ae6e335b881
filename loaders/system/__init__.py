"""The machine: the cores and memory that it and its cgroups allow, signal handlers, OpenCV's threads and messages.

Imports nothing of the package; anything may import it.
"""
