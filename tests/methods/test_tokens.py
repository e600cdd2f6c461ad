"""The tokens that are compared, and the interpolation of patches to another grid."""

import jax.numpy as jnp
import numpy as np
import pytest

from singer_jax.errors import InputError
from singer_jax.methods.tokens import match_tokens
from singer_jax.models.architecture import Architecture


def arch(img_size: int = 16, class_token: bool = True, reg_tokens: int = 0) -> Architecture:
    return Architecture(
        img_size=(img_size, img_size),
        patch_size=4,
        embed_dim=8,
        depth=2,
        num_heads=2,
        class_token=class_token,
        reg_tokens=reg_tokens,
        global_pool="token" if class_token else "map",
    )


def numbered(of: Architecture) -> jnp.ndarray:
    """Returns tokens whose values are their positions."""
    count = of.num_prefix_tokens + of.num_patches
    return jnp.broadcast_to(jnp.arange(float(count))[None, :, None], (1, count, 2))


@pytest.mark.parametrize(
    ("student", "teacher", "of_student", "of_teacher", "words"),
    [
        (arch(), arch(), range(17), range(17), "1 class + 16 patches"),
        (arch(), arch(reg_tokens=4), range(17), [0, *range(5, 21)], "1 class + 16 patches"),
        (arch(reg_tokens=1), arch(reg_tokens=4), range(18), [0, 1, *range(5, 21)], "1 registers"),
        (arch(), arch(class_token=False), range(1, 17), range(16), "16 patches"),
        (arch(class_token=False), arch(reg_tokens=2), range(16), range(3, 19), "16 patches"),
    ],
)
def test_prefix_tokens_are_compared_by_role(student, teacher, of_student, of_teacher, words):
    match = match_tokens(student, teacher, interpolate_patch_grid=False)
    np.testing.assert_array_equal(match.of_student(numbered(student))[0, :, 0], list(of_student))
    np.testing.assert_array_equal(match.of_teacher(numbered(teacher))[0, :, 0], list(of_teacher))
    assert words in match.describe()


def test_patches_are_resampled_bilinearly_onto_the_teachers_grid():
    student, teacher = arch(8), arch(16)
    match = match_tokens(student, teacher, interpolate_patch_grid=True)
    tokens = jnp.asarray([7.0, 0, 4, 8, 12])[None, :, None]  # 2 x 2 patches: a plane
    resampled = match.of_student(tokens)[0, :, 0]
    assert resampled[0] == 7
    axis = np.array([0.0, 0.25, 0.75, 1.0])  # half-pixel centres, clamped at the edges
    expected = 8 * axis[:, None] + 4 * axis[None, :]
    np.testing.assert_allclose(resampled[1:].reshape(4, 4), expected, atol=1e-5)
    assert "the student's 2 x 2 interpolated" in match.describe()


def test_other_grids_without_the_option_are_an_error():
    with pytest.raises(
        InputError, match=r"2 x 2 patches.*4 x 4.*method.interpolate_patch_grid=True"
    ):
        match_tokens(arch(8), arch(16), interpolate_patch_grid=False)
