"""Putting a `generate` on a model object leaves no trace once it is taken off."""

import copy
import pickle

import pytest

from speclm.errors import PatchError, SpeclmError
from speclm.model.wrapping import attach, detach, enter
from tests.models import build_model


@pytest.fixture
def base():
    return build_model("llama")


def replacement(*args, **kwargs):
    return "replaced", args, kwargs


def earlier(*args, **kwargs):
    return "earlier"


def test_arguments_are_passed_on_and_nothing_is_left(base):
    before = dict(vars(base))
    attach(base, replacement, owner=1)
    assert base.generate(3, a=4) == ("replaced", (3,), {"a": 4})
    detach(base, owner=1)
    assert vars(base) == before


def test_attribute_that_stood_there_comes_back(base):
    base.generate = earlier
    attach(base, replacement, owner=1)
    detach(base, owner=1)
    assert vars(base)["generate"] is earlier


@pytest.mark.parametrize(("owner", "whose"), [(1, "this"), (2, "another")])
def test_second_patch_is_refused(base, owner, whose):
    attach(base, replacement, owner=1)
    with pytest.raises(PatchError, match=f"patched by {whose} SpecModel.*detach") as caught:
        attach(base, earlier, owner=owner)
    assert isinstance(caught.value, SpeclmError)
    assert base.generate()[0] == "replaced"


def test_only_the_owner_takes_it_off(base):
    with pytest.raises(PatchError, match=r"class's own.*expected the patch of this"):
        detach(base, owner=1)
    attach(base, replacement, owner=1)
    with pytest.raises(PatchError, match="expected the patch of this"):
        detach(base, owner=2)
    base.generate = earlier
    with pytest.raises(PatchError, match=r"earlier.*patched later has to be undone first"):
        detach(base, owner=1)


def test_block_may_begin_after_attach_but_not_twice(base):
    attach(base, replacement, owner=1)
    enter(base, replacement, owner=1)
    with pytest.raises(PatchError, match="patched by this"):
        enter(base, replacement, owner=1)
    with pytest.raises(PatchError, match="patched by another"):
        enter(base, replacement, owner=2)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copy_generates_by_itself(base, duplicate):
    attach(base, replacement, owner=1)
    copied = duplicate(base)
    assert copied.generate.__self__ is copied
    assert copied.generate.__func__ is type(base).generate


def test_copy_has_what_stood_there_before(base):
    base.generate = earlier
    attach(base, replacement, owner=1)
    assert copy.deepcopy(base).generate is earlier
