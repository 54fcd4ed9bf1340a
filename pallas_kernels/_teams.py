"""A Hopper kernel of one block to a processor, in which teams of warpgroups work through queues of their own."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax import lax

from pallas_kernels._mosaic import pl, plgpu, processors


@dataclass(frozen=True, kw_only=True)
class Team:
    """Warpgroups that take every n-th item of a queue, n being the number of blocks, at their own pace.

    Attributes:
      warpgroups: how many.
      cluster: so many neighbouring blocks copy for one another; 1 if they do not.
      body: takes the warpgroup's place in the team, its first item, n, references to inputs and outputs, and the scratch by name.
      inputs: arrays.
      outputs: their shapes and dtypes.
      scratch: types of shared memory and barriers, by name.
      finish: makes the result of the outputs.
    """

    warpgroups: int
    cluster: int = 1
    body: Callable[..., None]
    inputs: tuple[jax.Array, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    scratch: dict
    finish: Callable[..., jax.Array]


def launch_teams(teams: tuple[Team, ...], name: str) -> list[jax.Array]:
    """The results of the teams, each that of a launch of its own, bit for bit: they share nothing but the processors."""
    cluster = max(team.cluster for team in teams)
    clusters = processors() // cluster
    blocks = clusters * cluster

    def body(*refs, **scratch):
        block = lax.axis_index("clusters") * cluster + lax.axis_index("cluster")
        group, rest = lax.axis_index("warpgroup"), iter(refs)
        inputs = [list(itertools.islice(rest, len(team.inputs))) for team in teams]
        outputs = [list(itertools.islice(rest, len(team.outputs))) for team in teams]
        first = 0
        for team, given, made, own in zip(teams, inputs, outputs, scratch["teams"]):
            place = group - first
            work = functools.partial(team.body, place, block, blocks, *given, *made, **own)
            pl.when((place >= 0) & (place < team.warpgroups))(work)
            first += team.warpgroups

    kernel = plgpu.kernel(
        body,
        out_type=tuple(made for team in teams for made in team.outputs),
        grid=(clusters,),
        grid_names=("clusters",),
        cluster=(cluster,),
        cluster_names=("cluster",),
        num_threads=sum(team.warpgroups for team in teams),
        thread_name="warpgroup",
        kernel_name=name,
        scratch_types={"teams": tuple(team.scratch for team in teams)},
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    out = iter(kernel(*(array for team in teams for array in team.inputs)))
    return [team.finish(*itertools.islice(out, len(team.outputs))) for team in teams]
