"""Which objects are transforms with random state, by the methods that their classes have."""

from __future__ import annotations

import inspect
from typing import Any


def is_stateful(kind: type[Any]) -> bool:
    """Whether a class has the methods by which its random state can be set, as albumentations has them."""
    # Asked of the type: objects that answer to any name, such as proxies, are no transforms.
    return takes(kind, "set_random_state", 2) or takes(kind, "set_random_seed", 1)


def takes(kind: type[Any], name: str, count: int) -> bool:
    """Whether a class has a method of that name for so many arguments. One with others is something else."""
    method = getattr(kind, name, None)
    if not callable(method):
        return False
    bound = isinstance(inspect.getattr_static(kind, name), (staticmethod, classmethod))
    try:
        inspect.signature(method).bind(*[None] * (count if bound else count + 1))
    except TypeError:
        return False
    except ValueError:  # written in C, and silent about it
        return True
    return True
