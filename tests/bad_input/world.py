"""The models and data that all calls share."""

import keras
from small import cross_entropy, digits, weights

import keras_dalign as kd

N = 40


def network(**last):
    """A network of batch normalisation, a feature layer and ten outputs."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((64,), name="pixels"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(12, "relu", name="features"),
            keras.layers.Dense(10, name="logits", **last),
        ]
    )


class World:
    """The models and data that all calls share.

    Attributes:
        x, y: Digits, `(40, 64)` and `(40,)`.
        base: A plain model, compiled.
        exploring: An aligned model, compiled with `DAlign`.
        exploiting: An aligned model whose gates are set, compiled with SGD.
        quadratic: A quadratic head with one output.
    """

    def __init__(self):
        self.x, self.y = digits(N)
        self.base = network()
        self.base.compile("sgd", cross_entropy())
        self.exploring = kd.align(network(), n_samples=N, seed=0)
        self.exploring.compile(kd.DAlign("sgd"), cross_entropy())
        self.exploiting = kd.align(network(), n_samples=N, seed=0)
        self.exploiting.start_exploiting(width=3)
        self.exploiting.compile("sgd", cross_entropy())
        self.quadratic = keras.Sequential(
            [keras.Input((64,)), kd.QuadraticHead(1, width=4, seed=0)]
        )
        self._forecast = None
        self._certificate = None

    def weights(self):
        """All weights of all models."""
        models = (self.base, self.exploring, self.exploiting, self.quadratic)
        return [array for model in models for array in weights(model)]

    @property
    def forecast(self):
        """A forecast of the exploiting model, computed once."""
        if self._forecast is None:
            self._forecast = kd.forecast(self.exploiting, self.x, self.y)
        return self._forecast

    @property
    def certificate(self):
        """A certificate of the base model, computed once."""
        if self._certificate is None:
            self._certificate = kd.certify(self.base, self.x, self.y)
        return self._certificate


def stream(world):
    """Batches that never end."""
    return iter(lambda: (world.x, world.y), None)
