import inspect

import pytest

from speclm import errors

BUILTINS = {
    "OptionError": ValueError,
    "UnknownNameError": LookupError,
    "VocabularyMismatchError": ValueError,
    "PromptError": ValueError,
    "TreeBudgetError": ValueError,
    "TopologyError": ValueError,
    "DraftError": ValueError,
    "ProposerContractError": AssertionError,
    "CacheError": TypeError,
    "KernelError": ValueError,
    "BusyError": RuntimeError,
    "PatchError": RuntimeError,
    "ServerError": RuntimeError,
    "NumericalError": ArithmeticError,
    "UnsupportedModelError": TypeError,
    "CheckpointError": ValueError,
    "DataError": ValueError,
    "FeatureError": ValueError,
    "MissingAssetError": FileNotFoundError,
    "SaveError": OSError,
    "UploadError": OSError,
    "EngineError": RuntimeError,
    "MeasurementError": RuntimeError,
}
CLASSES = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if kind.__module__ == errors.__name__
}


def test_every_error_is_listed_here():
    assert CLASSES.keys() == {*BUILTINS, "SpeclmError"}


@pytest.mark.parametrize("name", BUILTINS)
def test_error_can_be_caught_as_ours_and_as_the_builtin(name):
    for caught in (errors.SpeclmError, BUILTINS[name]):
        with pytest.raises(caught, match="what happened"):
            raise CLASSES[name]("what happened")


@pytest.mark.parametrize("name", CLASSES)
def test_name_ends_in_error_and_the_class_is_documented(name):
    assert name.endswith("Error")
    assert CLASSES[name].__doc__
