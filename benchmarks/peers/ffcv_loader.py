"""FFCV: its file format, read by compiled code."""

from __future__ import annotations

NAME = "FFCV"
WHY_NOT = (
    "FFCV 1.0.2 has no wheels: it is compiled against OpenCV's C++ headers and libturbojpeg, and its last release is "
    "older than NumPy 2 and the Python that the others run on"
)
