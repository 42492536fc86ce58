"""What formats hold of EAGLE heads; test_checkpoint_formats.py has what is written and refused."""

from speclm.methods.eagle.checkpoint_formats import EAGLE_FORMATS
from speclm.methods.eagle.checkpoint_limits import LIMITS, unusual_parts
from tests.methods.eagle.test_checkpoint_writing import checkpoint


def test_every_format_has_limits_and_every_part_is_one_that_heads_can_have():
    assert {each.name for each in EAGLE_FORMATS} == LIMITS.keys()
    known = LIMITS["speclm"]["eagle3"].parts | LIMITS["speclm"]["eagle"].parts
    for kinds in LIMITS.values():
        for limits in kinds.values():
            assert limits.parts <= known
            assert limits.needs <= limits.parts


def test_usual_heads_have_no_unusual_parts():
    assert unusual_parts(checkpoint(kind="eagle").config) == {}
    assert unusual_parts(checkpoint().config).keys() == {"lm_head", "draft_vocab"}
    assert "2 decoder layers" in unusual_parts(checkpoint(num_layers=2).config).values()
