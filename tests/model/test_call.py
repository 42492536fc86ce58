"""What `generate` says of arguments that nothing takes."""

import pytest

from speclm import SpecModel
from speclm.errors import OptionError
from tests.models import prompts, shared_model


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("num_draft_token", "did you mean 'num_draft_tokens'?"),
        ("num_draft_tokens", "pass it to SpecModel.from_pretrained"),
        ("max_new_token", "did you mean 'max_new_tokens'?"),
        ("wings", "drop 'wings'"),
    ],
)
def test_argument_that_nothing_takes_is_named_with_what_to_do(name, remedy):
    spec = SpecModel(shared_model("llama", 0), None)
    for others in ({}, {"num_beams": 2}):  # decoded here, and left to the base
        with pytest.raises(OptionError, match=rf"\['{name}'\] are not used") as caught:
            spec.generate(**prompts(1), **{name: 5}, **others)
        assert str(caught.value).endswith(remedy)


def test_other_errors_of_values_are_not_renamed():
    with pytest.raises(ValueError, match="top_k"):
        SpecModel(shared_model("llama", 0), None).generate(
            **prompts(1), do_sample=True, top_k=-2, max_new_tokens=2
        )
