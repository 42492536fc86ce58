import shlex

import torch

from speclm.drafting.formats import Engine, random_inputs


def test_commands_survive_the_shell_whatever_the_folder_is_called():
    command = """serve $base --heads $heads --config '{"model": "$heads_in_json"}'"""
    engine = Engine("software", "all", command)
    name = """my "heads'; rm -r"""
    words = shlex.split(engine.command_for(base="a base", heads=name))
    assert words[:4] == ["serve", "a base", "--heads", name]
    assert words[5] == '{"model": "my \\"heads\'; rm -r"}'


def test_random_inputs_are_the_same_at_every_call():
    first, second = random_inputs((2, 3), (4,)), random_inputs((2, 3), (4,))
    assert [tensor.shape for tensor in first] == [(2, 3), (4,)]
    assert all(map(torch.equal, first, second))
