"""Decoded samples kept in shared memory or in a file.

Imports the dataset protocol, `images` and `system`; nothing but the public interface imports it.
"""
