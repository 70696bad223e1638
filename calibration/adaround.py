"""AdaRound: learn for every weight whether it is rounded up or down, layer by layer (Nagel et al. 2020).

Each layer, with the activation function behind it, gets the inputs that the quantized layers before it make, and learns to give the
outputs of the float layer; `qdeploy.numerics.learned_rounding` has the formulas. Scales stay as they are.
"""

from __future__ import annotations

from qdeploy.graph.regions import layers
from qdeploy.recipes.blockwise import Reconstruction
from qdeploy.recipes.reconstruct import Settings
from qdeploy.recipes.step import count, fraction, step


@step("adaround")
class AdaRound(Reconstruction):
    """`iterations` of `batch` out of `samples`; `rate` is Adam's.

    `regularizer` is the weight of the pull to 0 and 1, as a share of the outputs' energy.
    """

    def __init__(self, samples: int = 1024, iterations: int = 2000, batch: int = 32, rate: float = 1e-2, regularizer: float = 5e-4):
        self.samples = count("samples of step 'adaround'", samples)
        settings = Settings(
            iterations=count("iterations of step 'adaround'", iterations),
            batch=count("batch of step 'adaround'", batch),
            keep=1.0,
            learn_activation_steps=False,
            learn_weight_steps=False,
            learn_bias=False,
            rounding_rate=fraction("rate of step 'adaround'", rate),
            regularizer=fraction("regularizer of step 'adaround'", regularizer, high=100),
        )
        self.partition, self.phases = layers, (settings,)
