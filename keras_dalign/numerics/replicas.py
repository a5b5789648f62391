"""Replicas: the devices and processes that share the rows of a sum.

Rows are split into as many shares of equal length as there are replicas. The last
shares are padded with rows of zeros, so any number of rows fits any number of replicas.
The backend's own collective operations move, gather and sum the data.

All processes must call the same functions with the same arrays. Results that are not
shared are computed by each process. If such a result decides on the next step, all
processes use the numbers of the first one (`from_first`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_dalign.numerics import device

Rows = Callable[[slice], np.ndarray]


class Replicas:
    """One device of one process. Subclasses are for several.

    Attributes:
        count: Number of shares that rows are split into.
        processes: Number of processes.
        process: Index of this process.
        batch_divisor: A number that must divide the size of every batch given to Keras.
    """

    count = 1
    processes = 1
    process = 0
    batch_divisor = 1

    def put(self, array: np.ndarray) -> Any:
        """An array as a float32 tensor that is copied to every replica."""
        return device.put(array)

    def put_rows(self, rows: slice, shape: tuple[int, ...], values: Rows) -> Any:
        """A float32 tensor whose rows are shared by the replicas.

        Args:
            rows: The rows.
            shape: Shape of a row.
            values: Returns the values of a slice of rows, shape `(rows, *shape)`. It is
                called for the shares of this process only.

        Returns:
            The tensor, for functions from `compiled` and for `gathered`.
        """
        del shape
        return device.put(values(rows))

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that every replica computes on its share of the rows.

        Args:
            function: Takes and returns tensors; uses `keras.ops`. It maps tensors of
                rows to tensors of rows, or to partial sums over rows.

        Returns:
            The compiled function.
        """
        return device.compiled(function)

    def predict(self, model: keras.Model, x: Any) -> Any:
        """The outputs of a model for a batch, whose rows the replicas share.

        Args:
            model: The model.
            x: Inputs: arrays of rows. `count` must divide their number.

        Returns:
            The outputs for the whole batch, in every process.
        """
        return model.predict_on_batch(x)

    def gathered(self, tensor: Any, n: int) -> np.ndarray:
        """The first `n` rows of a tensor of rows, in every process."""
        return device.fetch(tensor)[:n]

    def summed(self, tensor: Any) -> np.ndarray:
        """The sum of the replicas' partial sums, bit for bit equal in all processes."""
        return device.fetch(tensor)

    def from_first(self, array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The array of the first process, in every process."""
        return array

    def from_all(self, array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The arrays of all processes, shape `(processes, *array.shape)`."""
        return array[None]

    def any(self, flag: Any) -> bool:
        """Whether a flag is set in any process."""
        if self.processes == 1:
            return bool(flag)
        return bool(self.from_all(np.asarray([float(bool(flag))])).any())

    def check_alike(self, facts: dict[str, Any]) -> None:
        """Checks that all processes were given the same model and data.

        Args:
            facts: The values to compare, by name: numbers, strings, arrays, or
                structures of these.

        Raises:
            ValueError: If a value differs between processes. It is raised in every
                process.
        """
        if self.processes == 1:
            return
        own = np.asarray([_digest(fact) for fact in facts.values()])
        differ = np.any(self.from_all(own) != own, axis=0)
        # If one process differs from the others, all must stop.
        differ = np.any(self.from_all(differ.astype("float64")), axis=0)
        if not differ.any():
            return
        names = [name for name, other in zip(facts, differ, strict=True) if other]
        received = "; ".join(f"{name} {_describe(facts[name])}" for name in names)
        raise ValueError(
            f"The {self.processes} processes must be given the same model and the same "
            "data, in the same order: each works on its share of them. Received: "
            f"different {' and '.join(names)} ({received} in process {self.process}). "
            "Load all samples in every process, and call "
            "keras.utils.set_random_seed with one seed before the model is made."
        )

    def alike(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of a stream, each compared with those of the other processes.

        The end of the stream is compared, too: a process that continued alone would
        wait for the others for ever.

        Args:
            batches: The stream of this process.

        Yields:
            The batches.

        Raises:
            ValueError: If another process reads other batches. It is raised in every
                process.
        """
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:
                self.check_alike({"batches": repr(error)})
                raise
            self.check_alike({"batches": "at their end" if batch is None else batch})
            if batch is None:
                return
            yield batch

    def _share(
        self, rows: slice, index: int, shape: tuple[int, ...], values: Rows
    ) -> np.ndarray:
        """The rows of one replica, padded with zeros."""
        length = -(-(rows.stop - rows.start) // self.count)
        start = min(rows.start + index * length, rows.stop)
        stop = min(start + length, rows.stop)
        share = np.zeros((length, *shape), "float32")
        if stop > start:
            share[: stop - start] = values(slice(start, stop))
        return share


class _StrategyReplicas(Replicas):
    """The replicas of a `tf.distribute` strategy."""

    def __init__(self, strategy: Any) -> None:
        import tensorflow as tf  # noqa: PLC0415  (only where it is the backend)

        self._tf = tf
        self._strategy = strategy
        self._devices = strategy.extended.worker_devices
        self.count = int(strategy.num_replicas_in_sync)
        self.processes = self.count // len(self._devices)
        resolver = strategy.cluster_resolver
        self.process = (resolver.task_id or 0) if self.processes > 1 else 0
        self._gather = tf.function(lambda tensor: strategy.gather(tensor, axis=0))
        self._sum = tf.function(
            lambda tensor: strategy.reduce("SUM", tensor, axis=None)
        )

    @functools.cached_property
    def _order(self) -> np.ndarray:
        """The positions of the replicas' shares in what the strategy gathers."""
        ids = self._values(lambda index: np.asarray([index]))
        return np.argsort(device.fetch(self._gather(ids)))

    def put_rows(self, rows: slice, shape: tuple[int, ...], values: Rows) -> Any:
        return self._values(lambda index: self._share(rows, index, shape, values))

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled, strategy = device.compiled(function), self._strategy
        return self._tf.function(lambda *tensors: strategy.run(compiled, args=tensors))

    def predict(self, model: keras.Model, x: Any) -> Any:
        if model.distribute_strategy is not self._strategy:
            return model.predict_on_batch(x)

        def shared(leaf: np.ndarray) -> Any:
            shares = np.split(leaf, self.count)
            return self._values(lambda index: shares[index])

        return model.predict_on_batch(keras.tree.map_structure(shared, x))

    def gathered(self, tensor: Any, n: int) -> np.ndarray:
        found = device.fetch(self._gather(tensor))
        shares = found.reshape(self.count, -1, *found.shape[1:])[self._order]
        return shares.reshape(found.shape)[:n]

    def summed(self, tensor: Any) -> np.ndarray:
        return device.fetch(self._sum(tensor))

    def from_first(self, array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if self.processes == 1:
            return array
        zeros = np.zeros_like(array)
        given = self._values(lambda index: zeros if index else array)
        return device.fetch(self._sum(given))

    def from_all(self, array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if self.processes == 1:
            return array[None]

        def of_replica(index: int) -> np.ndarray:
            given = np.zeros((self.count, *array.shape))
            given[index] = array
            return given

        found = device.fetch(self._sum(self._values(of_replica)))
        return found[:: len(self._devices)]

    def _values(self, of_replica: Callable[[int], np.ndarray]) -> Any:
        """Tensors of the replicas of this process, each on its device."""

        def put(context: Any) -> Any:
            index = int(context.replica_id_in_sync_group)
            with self._tf.device(self._devices[index % len(self._devices)]):
                return self._tf.convert_to_tensor(of_replica(index))

        return self._strategy.experimental_distribute_values_from_function(put)


class _MeshReplicas(Replicas):
    """The devices of a `keras.distribution` on JAX, along its batch dimension."""

    def __init__(self, distribution: Any) -> None:
        import jax  # noqa: PLC0415  (only where it is the backend)

        self._jax = jax
        mesh = distribution.device_mesh.backend_mesh
        spec, named = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
        self._by_rows = named(mesh, spec(distribution.batch_dim_name))
        self._everywhere = named(mesh, spec())
        self.count = int(mesh.shape[distribution.batch_dim_name])
        self.processes = jax.process_count()
        self.process = jax.process_index()
        # Every process gives Keras its own batches.
        self.batch_divisor = max(self.count // self.processes, 1)
        self._replicate = jax.jit(lambda tensor: tensor, out_shardings=self._everywhere)

    def put(self, array: np.ndarray) -> Any:
        array = np.asarray(array, "float32")
        # Unlike `device_put`, this does not compare the array between processes.
        return self._jax.make_array_from_callback(
            array.shape, self._everywhere, lambda index: array[index]
        )

    def put_rows(self, rows: slice, shape: tuple[int, ...], values: Rows) -> Any:
        length = -(-(rows.stop - rows.start) // self.count)

        def share(index: tuple[slice, ...]) -> np.ndarray:
            return self._share(rows, (index[0].start or 0) // length, shape, values)

        return self._jax.make_array_from_callback(
            (length * self.count, *shape), self._by_rows, share
        )

    def predict(self, model: keras.Model, x: Any) -> Any:
        if self.processes == 1:
            # With several processes, each would need access to all rows.
            x = self._jax.device_put(x, self._by_rows)
        return model.predict_on_batch(x)

    def gathered(self, tensor: Any, n: int) -> np.ndarray:
        return device.fetch(self._replicate(tensor))[:n]

    def summed(self, tensor: Any) -> np.ndarray:
        # The compiled function already includes the sum over devices.
        return device.fetch(self._replicate(tensor))

    def from_first(self, array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if self.processes == 1:
            return array
        return self.from_all(array)[0]

    def from_all(self, array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        from jax.experimental import multihost_utils  # noqa: PLC0415

        # JAX would round float64 to float32.
        bits = np.ascontiguousarray(array, "float64").view("int32")
        found = np.asarray(multihost_utils.process_allgather(bits[None], tiled=True))
        return found.view("float64")


class _GroupReplicas(Replicas):
    """The processes of PyTorch's default process group, with one device each."""

    def __init__(self) -> None:
        import torch  # noqa: PLC0415  (only where it is the backend)

        self._torch, self._group = torch, torch.distributed
        self.count = self.processes = self._group.get_world_size()
        self.process = self._group.get_rank()

    def put_rows(self, rows: slice, shape: tuple[int, ...], values: Rows) -> Any:
        return device.put(self._share(rows, self.process, shape, values))

    def predict(self, model: keras.Model, x: Any) -> Any:
        own = keras.tree.map_structure(
            lambda leaf: np.split(leaf, self.count)[self.process], x
        )

        def whole(leaf: Any) -> np.ndarray:
            leaf = np.asarray(leaf)
            shares = self._all_gather(device.put(leaf, leaf.dtype.name))
            return np.concatenate(shares) if leaf.ndim else leaf

        return keras.tree.map_structure(whole, model.predict_on_batch(own))

    def gathered(self, tensor: Any, n: int) -> np.ndarray:
        return np.concatenate(self._all_gather(tensor))[:n]

    def summed(self, tensor: Any) -> np.ndarray:
        total = self._reachable(tensor).clone()
        self._group.all_reduce(total)
        return device.fetch(total)

    def from_first(self, array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        given = self._reachable(device.put(array.copy(), "float64"))
        self._group.broadcast(given, src=0)
        return device.fetch(given)

    def from_all(self, array: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.stack(self._all_gather(device.put(array.copy(), "float64")))

    def _all_gather(self, tensor: Any) -> list[np.ndarray]:
        own = self._reachable(tensor).contiguous()
        found = [self._torch.empty_like(own) for _ in range(self.count)]
        self._group.all_gather(found, own)
        return [device.fetch(share) for share in found]

    def _reachable(self, tensor: Any) -> Any:
        """The tensor on a device that the group's backend supports."""
        nccl = "nccl" in str(self._group.get_backend())
        return tensor.detach() if nccl else tensor.detach().cpu()


def replicas_of(layer: Any) -> Replicas:
    """The replicas that share a layer or a model.

    - TensorFlow: those of the `MirroredStrategy` or `MultiWorkerMirroredStrategy` in
      whose scope the variables were made.
    - JAX: the devices of the `keras.distribution` that is set.
    - PyTorch: the processes of the default group of `torch.distributed`, if it is
      initialised.

    Otherwise there is one replica, a single device.

    Args:
        layer: The layer or model.

    Returns:
        The replicas.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf  # noqa: PLC0415

        known = (
            tf.distribute.MirroredStrategy,
            tf.distribute.MultiWorkerMirroredStrategy,
        )
        for variable in getattr(layer, "variables", ()):
            strategy = getattr(variable.value, "distribute_strategy", None)
            if isinstance(strategy, known) and strategy.num_replicas_in_sync > 1:
                return _of_strategy(strategy)
    elif backend == "jax":
        distribution = keras.distribution.distribution()
        if distribution is not None and distribution.device_mesh.devices.size > 1:
            return _of_mesh(distribution)
    elif backend == "torch":
        import torch  # noqa: PLC0415

        group = torch.distributed
        if (
            group.is_available()
            and group.is_initialized()
            and group.get_world_size() > 1
        ):
            return _GroupReplicas()
    return Replicas()


# Cached, so that all problems of a strategy share its compiled functions.
_of_strategy = functools.lru_cache(maxsize=1)(_StrategyReplicas)
_of_mesh = functools.lru_cache(maxsize=1)(_MeshReplicas)


def runs_on_hosts(strategy: Any) -> bool:
    """Whether a `tf.distribute` strategy, or None, spans several processes."""
    if strategy is None:
        return False
    return int(strategy.num_replicas_in_sync) > len(strategy.extended.worker_devices)


def _digest(fact: Any) -> float:
    """A 48-bit digest of a fact, as a float64 that holds it exactly."""
    digest = hashlib.blake2b(digest_size=6)
    for leaf in keras.tree.flatten(fact):
        if isinstance(leaf, (int, float, str, type(None))):
            digest.update(repr(leaf).encode())
        else:
            array = np.ascontiguousarray(keras.ops.convert_to_numpy(leaf))
            digest.update(f"{array.shape}{array.dtype}".encode())
            digest.update(array.view("uint8").data)
    return float(int.from_bytes(digest.digest(), "big"))


def _describe(fact: Any) -> str:
    """A fact as text, with arrays shown by their shapes."""
    shown = keras.tree.map_structure(
        lambda leaf: tuple(leaf.shape) if hasattr(leaf, "shape") else leaf, fact
    )
    return f"shape {shown}" if hasattr(fact, "shape") else str(shown)
