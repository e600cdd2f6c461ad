"""The frozen teacher of a run: its model and its parameters."""

from __future__ import annotations

import dataclasses
import functools

from jax.sharding import Mesh

from singer_jax.errors import InputError
from singer_jax.models import registers
from singer_jax.models.architecture import PRECISIONS, ComputePolicy
from singer_jax.models.network import Network, resolve_model
from singer_jax.models.params import Params
from singer_jax.models.quantised import check_installed
from singer_jax.models.weight_files import WeightsFile
from singer_jax.models.weights import abstract_model, load_model
from singer_jax.platform import backends, parallel
from singer_jax.training.settings import DistillSettings


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen teacher before its parameters are in memory.

    Attributes:
      network: The model, with the removal of its artifacts.
      params: Its abstract parameters with shardings, test-time registers included.
      policy: Dtypes and the form of its computation.
      weights: The file of its parameters; None for a step that is only compiled.
      mesh: The devices.
    """

    network: Network
    params: Params
    policy: ComputePolicy
    weights: WeightsFile | None
    mesh: Mesh

    @property
    def unmodified(self) -> Network:
        """The model without the removal of its artifacts."""
        plain = dataclasses.replace(self.policy, artifact_removal=None)
        return Network(self.network.spec, abstract_model(self.network.spec.arch, plain)[0])

    def load(self) -> Params:
        """Reads the parameters of `unmodified` into their shardings; raises as `load_model`."""
        place = functools.partial(parallel.tree_shardings, self.mesh)
        plain = dataclasses.replace(self.policy, artifact_removal=None)
        return load_model(self.network.spec, self.weights, plain, place)[1]

    def with_neurons(self, params: Params, neurons: registers.Neurons) -> Params:
        """Returns the parameters of `network`.

        Args:
          params: The parameters that `load` returns.
          neurons: The register neurons; ignored by a teacher without test-time registers.
        """
        place = self.params.get(registers.NAME)
        if place is None:
            return params
        marked = registers.marked(neurons, place.shape)
        return params | {registers.NAME: parallel.put(marked, place.sharding)}


def make_teacher(settings: DistillSettings, mesh: Mesh, weights_needed: bool = True) -> Teacher:
    """Checks the settings of the teacher, and makes it without reading its parameters.

    Args:
      settings: The settings of the run.
      mesh: The devices, which may be only described.
      weights_needed: False for a step that is only compiled: the teacher may have no weights.

    Raises:
      InputError: The settings of the teacher cannot work.
    """
    data = settings.data
    spec, weights = resolve_model("teacher", settings.teacher, data.image_size, data.normalisation)
    if settings.teacher.artifact_removal == "synthetic_outlier" and not spec.arch.synthetic_outlier:
        raise InputError(
            f"teacher.artifact_removal: synthetic_outlier, but there is none in {spec.name}"
        )
    if weights_needed and not weights:
        raise InputError("teacher.weights: empty; give a hub name, a file or a run")
    dtype, backend = PRECISIONS[settings.precision], parallel.platform(mesh)
    stacked = backends.choices(backend).stack_frozen and spec.arch.blocks_alike
    quantised = settings.teacher.precision
    if quantised:
        check_installed(quantised)
    policy = ComputePolicy(
        dtype,
        dtype,
        quantised=quantised,
        backend=backend,
        stacked=stacked,
        artifact_removal=settings.teacher.artifact_removal,
        approximate_gelu=settings.teacher.approximate_gelu,
        gathered=parallel.replicated(mesh) if mesh.shape["fsdp"] > 1 else None,
    )
    graph, params = abstract_model(spec.arch, policy)
    params = parallel.with_shardings(mesh, params)
    return Teacher(Network(spec, graph), params, policy, weights, mesh)
