"""Matching of student and teacher tokens if their grids or prefix tokens differ."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from singer_jax.errors import InputError
from singer_jax.models.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class TokenMatch:
    """The compared tokens of student and teacher.

    Prefix tokens are matched by role (class with class, register with register), and patches are
    compared on the teacher's grid.

    Attributes:
      student, teacher: Architectures.
      student_prefix, teacher_prefix: Positions of the prefix tokens that have a counterpart.
    """

    student: Architecture
    teacher: Architecture
    student_prefix: tuple[int, ...]
    teacher_prefix: tuple[int, ...]

    @property
    def num_prefix_tokens(self) -> int:
        """Number of prefix tokens in the results of `of_student` and `of_teacher`."""
        return len(self.teacher_prefix)

    def of_student(
        self, tokens: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch matched dim"]:
        """Returns the student's matched tokens, with patches interpolated to the teacher's grid."""
        prefix, patches = jnp.split(tokens, [self.student.num_prefix_tokens], axis=1)
        if self.student.grid != self.teacher.grid:
            batch, _, dim = patches.shape
            image = patches.astype(jnp.float32).reshape(batch, *self.student.grid, dim)
            image = jax.image.resize(image, (batch, *self.teacher.grid, dim), "linear")
            patches = image.reshape(batch, -1, dim).astype(tokens.dtype)
        elif len(self.student_prefix) == self.student.num_prefix_tokens:
            return tokens
        return jnp.concatenate([prefix[:, self.student_prefix, :], patches], axis=1)

    def of_teacher(
        self, tokens: Float[Array, "batch tokens dim"]
    ) -> Float[Array, "batch matched dim"]:
        """Returns the teacher's matched tokens."""
        if len(self.teacher_prefix) == self.teacher.num_prefix_tokens:
            return tokens
        prefix, patches = jnp.split(tokens, [self.teacher.num_prefix_tokens], axis=1)
        return jnp.concatenate([prefix[:, self.teacher_prefix, :], patches], axis=1)

    def describe(self) -> str:
        """Returns a description of the compared tokens for logs."""
        both_have_class = self.student.class_token and self.teacher.class_token
        registers = len(self.teacher_prefix) - both_have_class
        compared = ["1 class"] if both_have_class else []
        compared += [f"{registers} registers"] if registers else []
        compared.append(f"{self.teacher.num_patches} patches")
        if self.student.grid != self.teacher.grid:
            rows, columns = self.student.grid
            compared[-1] += f" (the student's {rows} x {columns} interpolated)"
        return " + ".join(compared)


def match_tokens(
    student: Architecture, teacher: Architecture, interpolate_patch_grid: bool
) -> TokenMatch:
    """Returns the tokens that are compared.

    Args:
      student, teacher: Architectures.
      interpolate_patch_grid: Allows interpolation of the student's patches to the teacher's grid.

    Raises:
      InputError: The grids of patches differ, and `interpolate_patch_grid` is off.
    """
    if student.grid != teacher.grid and not interpolate_patch_grid:
        raise InputError(
            f"the student has {student.grid[0]} x {student.grid[1]} patches, the teacher "
            f"{teacher.grid[0]} x {teacher.grid[1]}; set method.interpolate_patch_grid=True or use "
            "data.image_size and models with equal grids"
        )
    has_class = (0,) if student.class_token and teacher.class_token else ()
    registers = range(min(student.reg_tokens, teacher.reg_tokens))
    return TokenMatch(
        student,
        teacher,
        has_class + tuple(student.class_token + register for register in registers),
        has_class + tuple(teacher.class_token + register for register in registers),
    )
