import torch

from raydist.paths.on_device import OnDevice


def test_one_copy_a_device_that_outlives_inference_mode():
    constant = OnDevice(torch.arange(3.0))
    with torch.inference_mode():
        moved = constant(torch.device("meta"))
    assert moved.device.type == "meta"
    assert not moved.is_inference()
    assert constant(torch.device("meta")) is moved
    assert constant(torch.device("cpu")).tolist() == [0.0, 1.0, 2.0]
