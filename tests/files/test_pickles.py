import pytest

from speclm.errors import CheckpointError
from speclm.files.pickles import MAX_STEPS, require_plain_pickle
from speclm.files.weights import weights_of
from tests.fuzzing.mutations import PICKLES, archive


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("wrap", [bytes, archive])
def test_pickles_of_anything_but_tensors_are_refused(tmp_path, name, wrap):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(wrap(PICKLES[name]))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: .*expected .*state dict"):
        weights_of(file)


def test_compressed_and_long_pickles_are_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(archive(b"\x80\x02}.", method=8))
    with pytest.raises(ValueError, match="compressed"):
        require_plain_pickle(file)
    file.write_bytes(archive(b"\x80\x02" + b"N0" * (MAX_STEPS // 2) + b"}."))
    with pytest.raises(ValueError, match="instructions"):
        require_plain_pickle(file)
