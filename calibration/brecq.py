"""BRECQ: learn the roundings of a block's weights, then the steps of its activations (Li et al. 2021).

While the weights learn, activations are float; then the steps of activations are learned on the finished weights. Blocks are the
single-entry single-exit regions of the graph; up to `merge` layers of a plain chain are one block. With `fisher`, errors are weighed by
the squared gradient of the network's loss at the block's output, as the paper derives it; its authors' code does without.
"""

from __future__ import annotations

from functools import partial, update_wrapper

from qdeploy.graph.regions import blocks
from qdeploy.recipes.blockwise import Reconstruction
from qdeploy.recipes.reconstruct import Settings
from qdeploy.recipes.step import count, flag, step


@step("brecq")
class BRECQ(Reconstruction):
    """`iterations` for the weights and `step_iterations` for the steps of activations, of `batch` out of `samples`."""

    needs_biases = True

    def __init__(
        self,
        samples: int = 1024,
        iterations: int = 2000,
        step_iterations: int = 500,
        batch: int = 32,
        merge: int = 3,
        fisher: bool = False,
    ):
        self.samples = count("samples of step 'brecq'", samples)
        size = count("batch of step 'brecq'", batch)
        weights = Settings(
            iterations=count("iterations of step 'brecq'", iterations),
            batch=size,
            keep=0.0,
            learn_activation_steps=False,
            learn_weight_steps=False,
        )
        steps = Settings(
            iterations=count("step_iterations of step 'brecq'", step_iterations), batch=size, keep=1.0, learn_rounding=False
        )
        parted = partial(blocks, merge=count("merge of step 'brecq'", merge))
        self.partition, self.phases = update_wrapper(parted, blocks), (weights, steps)
        self.fisher = flag("fisher of step 'brecq'", fisher)
