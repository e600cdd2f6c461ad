"""Synthetic outliers: position, value, and that no optimiser changes them."""

import dataclasses

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from singer_jax.config import settings_of
from singer_jax.errors import InputError
from singer_jax.models.architecture import PLACES, Architecture, ComputePolicy
from singer_jax.models.synthetic_outlier import marked_patches
from singer_jax.models.timm_arguments import stated_fields
from singer_jax.models.vit import VisionTransformer
from singer_jax.models.zoo import lookup
from singer_jax.settings.renamed import current
from singer_jax.training.setup import setup_students
from tests import tiny

ARCH = Architecture(
    **{**tiny.TEACHER, "img_size": (16, 16)},
    num_classes=0,
    synthetic_outlier="random",
    synthetic_outlier_after=1,
    synthetic_outlier_patches=2,
)
IMAGES = np.random.default_rng(0).standard_normal((5, 16, 16, 3)).astype(np.float32)


@pytest.mark.parametrize("place", PLACES)
def test_as_many_patches_as_asked_follow_from_the_image_alone(place):
    arch = dataclasses.replace(ARCH, synthetic_outlier=place)
    marked = np.asarray(marked_patches(jnp.asarray(IMAGES), arch))
    assert marked.shape == (5, 16) and (marked.sum(1) == 2).all()
    others = np.asarray(marked_patches(jnp.asarray(IMAGES[[3, 0]]), arch))
    assert (others == marked[[3, 0]]).all()
    # Nor do the last bits matter, which are not those of another program.
    for images in (IMAGES, np.nextafter(IMAGES, np.inf)):
        again = jax.jit(marked_patches, static_argnums=1)(images, arch)
        assert (np.asarray(again) == marked).all()
    assert len({row.tobytes() for row in marked}) > 1


def test_the_background_varies_least():
    images = IMAGES.copy()
    images[:, 4:8, 8:12] = 0.3  # patch 1, 2: of one colour
    images[:, 12:16, 0:4] *= 0.01
    marked = np.asarray(
        marked_patches(images, dataclasses.replace(ARCH, synthetic_outlier="background"))
    )
    assert (np.flatnonzero(marked[0]) == [6, 12]).all()
    assert (marked == marked[0]).all()


def network(arch: Architecture = ARCH, **policy: object) -> VisionTransformer:
    model = VisionTransformer(arch, ComputePolicy(**policy), rngs=nnx.Rngs(0))
    if arch.synthetic_outlier:
        model.planted.vector[...] = 10 * jnp.arange(24.0)
    return model


@pytest.mark.parametrize("stacked", [False, True])
def test_the_vector_is_added_after_its_block_to_marked_patches_and_can_be_subtracted(stacked):
    plain = network(dataclasses.replace(ARCH, synthetic_outlier=None)).features(IMAGES)
    found = network(stacked=stacked).features_at(IMAGES, (0, 1, 2))
    np.testing.assert_allclose(found[0], plain[0], atol=1e-6)
    marked = np.asarray(marked_patches(IMAGES, ARCH))
    added = np.pad(marked, ((0, 0), (1, 0)))[..., None] * 10 * np.arange(24)
    np.testing.assert_allclose(found[1] - plain[1], added, atol=1e-4)
    cleaned = network(stacked=stacked, artifact_removal="synthetic_outlier").features_at(
        IMAGES, (0, 1, 2)
    )
    np.testing.assert_allclose(cleaned[0], plain[0], atol=1e-6)
    np.testing.assert_allclose(cleaned[1], plain[1], atol=1e-4)
    # The next block has seen it all the same.
    np.testing.assert_allclose(cleaned[2], found[2] - added, atol=1e-4)
    assert np.abs(cleaned[2] - plain[2]).max() > 1e-3


@pytest.mark.parametrize("stacked", [False, True])
def test_it_is_written_by_a_neuron_that_registers_move(stacked):
    """If that neuron is marked, the added token gets the vector and no patch does."""
    model, plain = network(), network(dataclasses.replace(ARCH, synthetic_outlier=None))
    features = model.features(IMAGES)
    hidden = [np.asarray(model.hidden(i, features[0], jnp.asarray(IMAGES))) for i in range(2)]
    marked = np.pad(np.asarray(marked_patches(IMAGES, ARCH)), ((0, 0), (1, 0)))
    length = np.linalg.norm(10 * np.arange(24))
    np.testing.assert_allclose(hidden[1][..., -1], length * marked, rtol=1e-6)
    assert not hidden[0][..., -1].any() and hidden[0].shape == (5, 17, 24 * 4 + 1)
    assert plain.hidden(1, features[0], jnp.asarray(IMAGES)).shape == (5, 17, 24 * 4)

    streams = {}
    for moved in (True, False):
        cleaned = network(stacked=stacked, artifact_removal="registers")
        cleaned.register_neurons[...] = cleaned.register_neurons[...].at[1, -1].set(int(moved))
        streams[moved] = cleaned.streams_at(IMAGES, (0, 1))
    np.testing.assert_allclose(streams[True][0], streams[False][0], atol=1e-6)
    change = np.asarray(streams[True][1] - streams[False][1])
    np.testing.assert_allclose(change[:, 0], np.tile(10.0 * np.arange(24), (5, 1)), atol=1e-4)
    np.testing.assert_allclose(change[:, 1:], marked[..., None] * -10.0 * np.arange(24), atol=1e-4)


def test_no_optimiser_changes_it():
    config = tiny.config("", method="supervised")
    config.student.overrides = {
        **tiny.STUDENT,
        "synthetic_outlier": "random",
        "synthetic_outlier_patches": 2,
    }
    run = setup_students(settings_of(config), 100, 10)
    assert "planted" in run.any.state.constants["student"]
    assert "planted" not in run.any.state.params["student"]


def test_former_field_names_are_read_from_files_and_refused_from_users():
    model_args = {"planted": "random", "planted_after": 2, "planted_patches": 3}
    assert stated_fields(model_args, Architecture()) == {
        "synthetic_outlier": "random",
        "synthetic_outlier_after": 2,
        "synthetic_outlier_patches": 3,
    }
    with pytest.raises(InputError, match="planted_after is now synthetic_outlier_after"):
        lookup("vit_tiny_patch16_224", {"planted_after": 2})
    assert current({"teacher.overrides.planted": "random", "teacher.clean": "planted"}) == {
        "teacher.overrides.synthetic_outlier": "random",
        "teacher.artifact_removal": "synthetic_outlier",
    }


@pytest.mark.parametrize("place", ["random", "background"])
def test_patches_are_marked_in_a_batch_of_any_size(place):
    """As in an export, whose number of images is symbolic."""
    arch = dataclasses.replace(ARCH, synthetic_outlier=place)
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *IMAGES.shape[1:]), jnp.float32)
    program = jax.export.export(jax.jit(lambda x: marked_patches(x, arch)))(images)
    np.testing.assert_array_equal(program.call(IMAGES), marked_patches(IMAGES, arch))
