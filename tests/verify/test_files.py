import json

import pytest

from speclm.verify.files import write_whole


def test_a_record_is_written_into_folders_that_are_made(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_whole(path, {"x": [1, 2.5]})
    write_whole(path, {"x": [3]})

    assert json.loads(path.read_text()) == {"x": [3]}
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_leaves_the_old_record(tmp_path):
    path = tmp_path / "b.json"
    write_whole(path, {"x": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_whole(path, {"x": object()})

    assert json.loads(path.read_text()) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]
