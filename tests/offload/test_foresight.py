"""The next layer's router on this layer's input: exact where nothing changes between the two."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jaxinfer.models import init, unstack
from jaxinfer.models.decoder import without_experts
from jaxinfer.models.moe import route
from jaxinfer.models.norms import norm
from jaxinfer.offload.foresight import Foresight

from .engines import LAYERS, MOE


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("stacked", [True, False])
def test_scores_are_the_next_layers(kind, stacked):
    config = dataclasses.replace(MOE, norm=kind)
    rng = np.random.default_rng(0)
    whole = jax.tree.map(
        lambda leaf: np.asarray(leaf + rng.normal(size=leaf.shape), np.float32),
        init(config, jax.random.key(0)),
    )
    layers = [layer for run in unstack(whole, config).runs for layer in run]
    model = without_experts(whole)
    foresight = Foresight.of(model if stacked else unstack(model, config), config)
    hidden = np.asarray(rng.normal(size=(50, config.hidden_size)), np.float32)
    for row, (here, there) in enumerate(itertools.pairwise(LAYERS)):
        given = np.asarray(norm(hidden, layers[here].mlp_norm, config))
        scores = np.asarray(norm(hidden, layers[there].mlp_norm, config)) @ layers[there].mlp.router
        ids, _ = route(scores, config.moe)
        np.testing.assert_array_equal(foresight.tokens(row, given), np.bincount(np.ravel(ids), minlength=6))
