"""A cache of decoded samples, in shared memory or in a file.

Imports the dataset protocol, `images` and `system`; only the public interface imports it.
"""
