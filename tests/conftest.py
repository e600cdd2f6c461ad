"""Fixtures and settings of all tests."""

import hypothesis
import jax

# Goldens and properties are stated for float32 products, not for TF32 or bfloat16 passes.
jax.config.update("jax_default_matmul_precision", "highest")

# Shared machines are slow now and then; a deadline would measure them and not the code.
hypothesis.settings.register_profile("default", deadline=None, max_examples=25)
hypothesis.settings.load_profile("default")
