"""Image files to arrays: decoding, crops that decode only what they need, normalisation, the Albumentations adapter.

Imports `system`, `timing` and `randomness`; datasets and the command line import it.
"""
