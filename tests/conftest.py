import keras
import pytest


@pytest.fixture(scope="session", autouse=True)
def two_cpus():
    """Two logical devices, which TensorFlow must be given before it starts."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    return ["cpu:0", "cpu:1"]
