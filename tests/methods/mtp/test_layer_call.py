"""A decoder of one layer, run without the decoder around it."""

from speclm.methods.mtp.layer_call import LayerRunner
from tests.methods.mtp.mtp_bases import ONE, make_base
from tests.models import WINDOW


def test_masks_of_a_window_are_those_of_the_layer(tmp_path):
    decoder = make_base(tmp_path, "mimo_v2_flash").blocks[0][0]
    assert LayerRunner(decoder).call.window == WINDOW


def test_decoders_that_do_more_than_run_their_layer_are_run_whole(tmp_path):
    decoder = make_base(tmp_path, ONE).blocks[0][0]
    forward = decoder.forward
    decoder.forward = lambda **inputs: _scaled(forward(**inputs))
    assert LayerRunner(decoder).call is None


def _scaled(output):
    output.last_hidden_state = 2 * output.last_hidden_state
    return output
