"""What the tests of compiled programs share."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

Compile = Callable[..., Any]


def abstract(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes with a sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
