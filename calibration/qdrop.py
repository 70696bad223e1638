"""QDrop: learn roundings, steps and biases of a block together, with activations quantized at random (Wei et al. 2022).

Every element of an activation is quantized with probability `keep` while a block learns, so that what is learned stays good when
activations move. The steps of weights are learned with their roundings, as Genie does (Jeon et al. 2023). Blocks are the single-entry
single-exit regions of the graph; up to `merge` layers of a plain chain are one block.
"""

from __future__ import annotations

from functools import partial, update_wrapper

from qdeploy.graph.regions import blocks
from qdeploy.recipes.blockwise import Reconstruction
from qdeploy.recipes.reconstruct import Settings
from qdeploy.recipes.step import count, flag, fraction, step


@step("qdrop")
class QDrop(Reconstruction):
    """`iterations` of `batch` out of `samples`; `fisher` weighs errors by the squared gradient of the network's loss."""

    needs_biases = True

    def __init__(
        self,
        samples: int = 1024,
        iterations: int = 2000,
        batch: int = 32,
        keep: float = 0.5,
        merge: int = 3,
        fisher: bool = False,
        learn_activation_steps: bool = True,
        learn_weight_steps: bool = True,
        learn_bias: bool = True,
    ):
        self.samples = count("samples of step 'qdrop'", samples)
        settings = Settings(
            iterations=count("iterations of step 'qdrop'", iterations),
            batch=count("batch of step 'qdrop'", batch),
            keep=fraction("keep of step 'qdrop'", keep),
            learn_activation_steps=flag("learn_activation_steps of step 'qdrop'", learn_activation_steps),
            learn_weight_steps=flag("learn_weight_steps of step 'qdrop'", learn_weight_steps),
            learn_bias=flag("learn_bias of step 'qdrop'", learn_bias),
        )
        parted = partial(blocks, merge=count("merge of step 'qdrop'", merge))
        self.partition, self.phases, self.fisher = update_wrapper(parted, blocks), (settings,), flag("fisher of step 'qdrop'", fisher)
