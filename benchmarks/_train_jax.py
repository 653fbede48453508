"""The training step of fvjax, and its parts. A worker's program (_worker.py).

Named `plain` it differentiates convolutions as jax.value_and_grad does, instead of by fvjax._convolutions.
"""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from _worker import resident, serve_parts, started, timed

from fvjax import nets, training
from fvjax._convolutions import refined
from fvjax.interpolants import constant_noise, draw_paths
from fvjax.losses import batch_loss, squared_error
from fvjax.nets import _linen
from fvjax.training import _step
from fvjax.types import Array, Model, Pair


def model_of(settings: dict[str, Any]) -> Model:
    """The U-Net; lists in JSON were tuples."""
    options: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in settings["network"].items()}
    return nets.unet(tuple(settings["dims"]), **options)


class Counted:
    """A training step that counts how often it is traced."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step = step
        self.traces = 0

    def __call__(self, state: Any, batch: Any) -> Any:
        """The step."""
        self.traces += 1
        return self.step(state, batch)


def counted_step(settings: dict[str, Any], model: Model, optimizer: Any) -> Counted:
    """The step as the CIFAR-10 experiment makes it."""
    made = training.make_train_step(
        model.apply,
        constant_noise(0.0),
        optimizer,
        source=training.standard_normal,
        dropout=settings["network"]["dropout"] > 0,
        ema_decay=settings["ema_decay"],
        axis_name=training.AXIS,
    )
    return Counted(made)


def optimizer_of(settings: dict[str, Any]) -> Any:
    """Clipped Adam with warm-up, as the CIFAR-10 experiment makes it."""
    names = ("learning_rate", "warmup", "clip")
    return training.adam(400_001, schedule="constant", **{name: settings[name] for name in names})


class Training:
    """State and step of a run, and the inputs of its parts."""

    def __init__(self, settings: dict[str, Any], *, plain: bool) -> None:
        self.settings = settings
        self.convolutions: Callable[..., Any] = (lambda function: function) if plain else refined
        self.model = model_of(settings)
        self.apply: Any = self.model.apply  # called with a key, which the type of a velocity field does not know
        self.optimizer = optimizer_of(settings)
        with mock.patch.object(_step, "refined", self.convolutions):
            self.counted = counted_step(settings, self.model, self.optimizer)
        self.parallel = training.parallelize(self.counted)
        self.state = self.initial()
        pixels = np.random.default_rng(0).integers(0, 256, (settings["batch"], *settings["dims"]), np.uint8)
        self.x1 = pixels.astype(np.float32) / np.float32(127.5) - 1
        self.keys = jax.random.split(jax.random.key(1), len(pixels))

    def initial(self) -> training.TrainState:
        """The state before the first step."""
        return jax.jit(lambda key: training.init_state(key, self.model, self.optimizer))(jax.random.key(0))

    def step(self) -> float:
        """One training step."""
        self.state, loss = self.parallel(self.state, self.x1)
        return float(loss)

    @cached_property
    def updated(self) -> list[Any]:
        """A state for the parts, and a gradient to update it with; the step's own state is donated at every step."""
        state = self.initial()
        return [state, jax.block_until_ready(self.gradient(state.params, dropout=True)[1])]

    @cached_property
    def path(self) -> Any:
        """Fixed paths."""
        x0 = jax.random.normal(jax.random.key(2), self.x1.shape)
        return draw_paths(jax.random.key(3), Pair(x0, jnp.asarray(self.x1)), constant_noise(0.0))

    def _loss(self, params: Any, draws: Any) -> Array:
        path, key = draws
        field = self.apply if key is None else partial(self.apply, key=key)
        return squared_error(field, reduction="mean")(params, path)

    @cached_property
    def _gradient(self) -> Any:
        return jax.jit(jax.value_and_grad(self.convolutions(lambda p, draws: batch_loss(self._loss, p, draws))))

    def gradient(self, params: Any, *, dropout: bool) -> Any:
        """Loss and gradient at fixed paths."""
        return self._gradient(params, (self.path, self.keys if dropout else None))

    @cached_property
    def _forward(self) -> Any:
        return jax.jit(lambda p, path: batch_loss(self._loss, p, (path, None)))

    def forward(self) -> Array:
        """Loss at fixed paths, without dropout."""
        return self._forward(self.updated[0].params, self.path)

    @cached_property
    def _update(self) -> Any:
        decay = self.settings["ema_decay"]
        return jax.jit(partial(_step._updated, optimizer=self.optimizer, ema_decay=decay), donate_argnums=0)

    def update(self) -> None:
        """Clips a gradient, and updates the parameters and their average."""
        state, gradient = self.updated
        self.updated[0] = jax.block_until_ready(self._update(state, gradient))

    def dropout_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of all that goes into a dropout layer, for one example."""
        shapes: list[tuple[int, ...]] = []

        def look(call: Callable[..., Any], arguments: Any, options: Any, context: Any) -> Any:
            if isinstance(context.module, _linen.Dropout):
                shapes.append(arguments[0].shape)
            return call(*arguments, **options)

        with nn.intercept_methods(look):
            x = jnp.zeros(self.settings["dims"])
            jax.eval_shape(lambda p: self.apply(p, jnp.zeros(()), x, key=self.keys[0]), self.state.params)
        return shapes

    @cached_property
    def _ones(self) -> list[Array]:
        return [jnp.ones((len(self.keys), *shape)) for shape in self.dropout_shapes()]

    @cached_property
    def _dropout(self) -> Any:
        layer = _linen.Dropout(self.settings["network"]["dropout"], deterministic=False)

        def of_example(key: Any, arrays: list[Array]) -> list[Any]:
            keys = [jax.random.fold_in(key, i) for i in range(len(arrays))]
            return [layer.apply({}, x, rngs={"dropout": k}) for k, x in zip(keys, arrays, strict=True)]

        return jax.jit(jax.vmap(of_example))

    def dropout(self) -> Any:
        """What the dropout layers do, on arrays of their shapes."""
        return self._dropout(self.keys, self._ones)


def build(name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """A training process that has made its first steps; then the seconds of the part that is asked for."""
    base = resident("VmRSS")
    run = Training(settings, plain=name == "plain")
    facts: dict[str, Any] = dict(started(run.step, base))
    facts["parameters"] = sum(p.size for p in jax.tree.leaves(run.state.params))
    facts["dropout_elements"] = settings["batch"] * sum(int(np.prod(shape)) for shape in run.dropout_shapes())
    parts: dict[str, Callable[[], Any]] = {
        "step": run.step,
        "gradient_dropout": lambda: run.gradient(run.updated[0].params, dropout=True),
        "gradient": lambda: run.gradient(run.updated[0].params, dropout=False),
        "forward": run.forward,
        "dropout": run.dropout,
        "update": run.update,
    }

    def measured(part: str) -> dict[str, Any]:
        seconds = timed(lambda: jax.block_until_ready(parts[part]()))
        return {"seconds": seconds, "traces": run.counted.traces}

    return facts, measured


if __name__ == "__main__":
    serve_parts(build)
