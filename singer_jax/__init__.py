"""SiNGER distillation of vision transformers in JAX and Flax NNX.

What the library offers stands in `__init__.pyi`, and is imported when it is used; docs/library.md
shows what it is for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.2.0"
