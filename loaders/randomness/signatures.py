"""Recognises transforms with random state by the methods of their classes."""

from __future__ import annotations

import inspect
from typing import Any


def is_stateful(kind: type[Any]) -> bool:
    """Whether a class has a method that sets its random state, as in albumentations."""
    # Checked on the type: objects that have every attribute, such as proxies, are not transforms.
    return takes(kind, "set_random_state", 2) or takes(kind, "set_random_seed", 1)


def takes(kind: type[Any], name: str, count: int) -> bool:
    """Whether a class has a method of that name that accepts `count` positional arguments."""
    method = getattr(kind, name, None)
    if not callable(method):
        return False
    bound = isinstance(inspect.getattr_static(kind, name), (staticmethod, classmethod))
    try:
        inspect.signature(method).bind(*[None] * (count if bound else count + 1))
    except TypeError:
        return False
    except ValueError:  # written in C, without a signature
        return True
    return True
