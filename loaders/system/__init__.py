"""What the machine and its cgroups allow: cores, memory, OpenCV's threads.

Imports nothing of the package; anything may import it.
"""
