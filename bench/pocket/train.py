"""Trains the pocket model: `python -m bench.pocket.train --folder FOLDER`; the same command goes on after any interruption."""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from optax.contrib import MuonDimensionNumbers, muon
from tokenizers import Tokenizer

from bench.pocket import hints, network, start, tokenizer
from bench.pocket.data import Data, Rows
from bench.pocket.plan import PLAN, Stage, at
from bench.pocket.tokenizer import BOS, CONTEXT, EOS, VOCABULARY
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.decoder import init, unstack
from jaxinfer.models.families import from_hugging_face
from jaxinfer.models.layers import Decoder

ARCHITECTURE: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": CONTEXT,
    "sliding_window": None,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
Params = dict[str, jax.Array]
BALANCE, Z = 0.3, 1e-3  # weights of the routers' losses
HINTS = 0.5  # weight of the probes' loss
PROBES = "probes"  # among the parameters, in training only
ADAM_SHARE = 0.2  # AdamW's rate over Muon's
SAVE_SECONDS = 180.0


class Trainer:
    """The model, its optimizer, and one step of training.

    Attributes:
      params: float32, by path in the model; and the probes.
      step: steps done.
    """

    def __init__(self, seed: int, *, architecture: Mapping[str, Any] = ARCHITECTURE):
        self.config: ModelConfig = from_hugging_face(dict(architecture), None)
        model = unstack(init(self.config, jax.random.key(seed), jnp.float32), self.config)
        model = start.prepare(model, self.config, seed)
        paths, self._tree = jax.tree.flatten_with_path(model)
        self.params: Params = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
        self._names = list(self.params)
        wide, slots = self.config.hidden_size, 2 * hints.SLOTS
        self.params[PROBES] = wide**-0.5 * jax.random.normal(jax.random.key(seed), (slots, wide, wide))
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0),
            muon(
                1.0,
                beta=0.95,
                adam_b2=0.98,
                adam_learning_rate=ADAM_SHARE,
                weight_decay=0.01,
                muon_weight_dimension_numbers=_matrices,
            ),
        )
        self.state = self.optimizer.init(self.params)
        self.step = 0
        self._update = jax.jit(self._one, donate_argnums=(0, 1))

    def model(self, params: Params | None = None) -> Decoder:
        """The engine's own parameters, layer by layer."""
        params = params or self.params
        return jax.tree.unflatten(self._tree, [params[name] for name in self._names])

    def advance(self, rows: Rows, rate: float) -> tuple[network.Losses, jax.Array]:
        """One step; its losses and the norm of its gradient."""
        self.params, self.state, losses, size = self._update(self.params, self.state, rows, rate)
        self.step += 1
        return losses, size

    def _one(self, params, state, rows: Rows, rate):
        def total(params):
            losses = network.losses(
                self.model(params),
                self.config,
                jnp.asarray(rows.ids),
                jnp.asarray(rows.positions),
                jnp.asarray(rows.weights),
                jnp.asarray(rows.hints),
                params[PROBES],
            )
            return losses.nll + BALANCE * losses.balance + Z * losses.z + HINTS * losses.hints, losses

        slope, losses = jax.grad(total, has_aux=True)(params)
        change, state = self.optimizer.update(slope, state, params)
        params = jax.tree.map(lambda p, c: p + rate * c, params, change)
        return params, state, losses, optax.tree.norm(slope)


def _matrices(params: Params) -> dict[str, MuonDimensionNumbers | None]:
    """Which axes Muon orthogonalises: each head, each expert by itself; the rest is AdamW's."""
    axes = {
        "qkv": MuonDimensionNumbers(0, 3),
        ".out": MuonDimensionNumbers((0, 1), 2),
        "gate_up": MuonDimensionNumbers(1, 3),
        "down": MuonDimensionNumbers(1, 2),
        PROBES: MuonDimensionNumbers(1, 2),
    }
    return {name: next((a for key, a in axes.items() if name.endswith(key)), None) for name in params}


class Checkpoints:
    """Orbax checkpoints of a trainer by step; the newest few stay."""

    def __init__(self, folder: Path, keep: int = 3):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, trainer: Trainer) -> None:
        tree = {"params": trainer.params, "state": _plain(trainer.state)}
        self._manager.save(trainer.step, args=ocp.args.StandardSave(tree))

    def restore(self, trainer: Trainer) -> bool:
        """Puts the newest checkpoint into the trainer, if there is one."""
        step = self._manager.latest_step()
        if step is None:
            return False
        like = {"params": trainer.params, "state": _plain(trainer.state)}
        tree = self._manager.restore(step, args=ocp.args.StandardRestore(like))
        trainer.params, trainer.step = tree["params"], step
        leaves = [tree["state"][key] for key in sorted(tree["state"])]
        trainer.state = jax.tree.unflatten(jax.tree.structure(trainer.state), leaves)
        return True


def _plain(state: Any) -> dict[str, jax.Array]:
    """Leaves by number: Orbax knows dictionaries better than optax's nested states."""
    return {f"{index:05d}": jnp.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(state))}


def load_tokenizer(folder: Path) -> Tokenizer:
    """Of this training: made once, then kept beside its checkpoints."""
    file = folder / "tokenizer" / "tokenizer.json"
    if not file.exists():
        tokenizer.save(tokenizer.train(), file.parent)
    return Tokenizer.from_file(str(file))


def run(folder: Path, seed: int, plan: tuple[Stage, ...], most: float = float("inf")) -> Trainer:
    """Trains until the plan ends or `most` seconds have passed; saves every few minutes and at the end."""
    data = Data(load_tokenizer(folder), seed)
    trainer, checkpoints = Trainer(seed), Checkpoints(folder / "checkpoints")
    if checkpoints.restore(trainer):
        print(f"going on from step {trainer.step}", flush=True)
    began = saved = shown = time.perf_counter()
    recent: list[Any] = []
    tokens = 0
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())  # save, then stop
    with ThreadPoolExecutor(1) as maker:
        ahead = _order(maker, data, plan, trainer.step)
        while ahead is not None and time.perf_counter() - began < most and not asked.is_set():
            rows, shape, rate = ahead[0].result(), ahead[1], ahead[2]
            ahead = _order(maker, data, plan, trainer.step + 1)
            losses, size = trainer.advance(rows, rate)
            recent.append((shape[1], losses, size))
            tokens += shape[0] * shape[1]
            if trainer.step % 25 == 0:
                jax.block_until_ready(trainer.params)
                now = time.perf_counter()
                _show(trainer.step, recent, rate, tokens / (now - shown), now - began)
                recent, tokens, shown = [], 0, now
            if time.perf_counter() - saved > SAVE_SECONDS:
                checkpoints.save(trainer)
                saved = time.perf_counter()
    checkpoints.save(trainer)
    return trainer


def _order(maker: ThreadPoolExecutor, data: Data, plan: tuple[Stage, ...], step: int):
    found = at(plan, step)
    if found is None:
        return None
    stage, shape, rate = found
    return maker.submit(data.batch, step, *shape, stage.mix), shape, rate


def _show(step: int, recent: list[Any], rate: float, speed: float, seconds: float) -> None:
    recent = sorted(recent, key=lambda r: r[0])
    nll = " ".join(
        f"{length}:{np.mean([float(r[1].nll) for r in group]):.3f}"
        for length, found in itertools.groupby(recent, key=lambda r: r[0])
        for group in [list(found)]
    )
    load = np.mean([np.asarray(r[1].load) for r in recent], axis=0)
    norm = np.mean([float(r[2]) for r in recent])
    hinted = np.mean([float(r[1].hints) for r in recent])
    print(
        f"step {step:5d} nll {nll} | hints {hinted:.3f} | load {load.min():.2f}-{load.max():.2f} | grad {norm:.2f} | rate {rate:.4f} | "
        f"{speed:,.0f} tokens/s | {seconds:.0f} s",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pocket.train", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="checkpoints and the tokenizer; read to go on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after these; go on another time"
    )
    options = parser.parse_args(argv)
    os.makedirs(options.folder, exist_ok=True)
    run(options.folder, options.seed, PLAN, options.seconds)


if __name__ == "__main__":
    main()
