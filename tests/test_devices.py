"""Which devices Python reads at no cost."""

import torch

from speclm.devices import device_path, is_host


def test_only_a_cpu_is_read_at_no_cost():
    assert is_host(torch.device("cpu"))
    assert not is_host(torch.device("cuda"))
    assert not is_host(torch.device("meta"))


def test_inside_the_device_path_a_cpu_acts_as_an_accelerator():
    with device_path():
        assert not is_host(torch.device("cpu"))
    assert is_host(torch.device("cpu"))
