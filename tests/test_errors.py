"""The tree of errors: what each one is, carries, and keeps when it crosses a process."""

import copy
import pickle

import pytest

from vattention import errors
from vattention.errors import (
    BackendError,
    BackendUnavailable,
    Closed,
    ConfigError,
    OutOfPages,
    OutOfSlots,
    SequenceTooLong,
    StaleSequence,
    VAttentionError,
)

EXAMPLES = [
    (VAttentionError("m"), Exception, {}),
    (ConfigError("m"), ValueError, {}),
    (
        OutOfPages("m", needed=4, free=3, reclaimable=2, budget=1 << 40),
        MemoryError,
        {"needed": 4, "free": 3, "reclaimable": 2, "budget": 1 << 40},
    ),
    (OutOfSlots("m"), VAttentionError, {}),
    (Closed("m"), RuntimeError, {}),
    (SequenceTooLong("m"), ValueError, {}),
    (StaleSequence("m"), LookupError, {}),
    (BackendError("m", call="cuMemMap", code=2), RuntimeError, {"call": "cuMemMap", "code": 2}),
    (BackendUnavailable("m"), BackendError, {"call": "", "code": 0}),
    (
        BackendUnavailable("m", call="cuInit", code=100),
        RuntimeError,
        {"call": "cuInit", "code": 100},
    ),
]
IDS = [type(error).__name__ for error, _, _ in EXAMPLES]


def test_examples_cover_every_public_error():
    assert {type(error).__name__ for error, _, _ in EXAMPLES} == set(errors.__all__)


@pytest.mark.parametrize(("error", "caught_as", "attributes"), EXAMPLES, ids=IDS)
def test_error_is_caught_as_its_builtin(error, caught_as, attributes):
    with pytest.raises(caught_as) as caught:
        raise error
    assert isinstance(caught.value, VAttentionError)
    assert str(error) == "m"
    assert vars(error) == attributes


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(("error", "caught_as", "attributes"), EXAMPLES, ids=IDS)
def test_error_survives_pickling(error, caught_as, attributes, protocol):
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert again.args == error.args == ("m",)
    assert str(again) == "m"
    assert vars(again) == attributes


def test_copy_keeps_what_was_added_to_the_error():
    error = OutOfPages("m", needed=1, free=0, reclaimable=0, budget=0)
    error.where = "rank 3"
    for again in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert (again.where, again.needed) == ("rank 3", 1)


def test_amounts_are_keyword_only_and_required():
    with pytest.raises(TypeError):
        OutOfPages("m", 1, 2, 3, 4)
    with pytest.raises(TypeError):
        OutOfPages("m", needed=1, free=2, reclaimable=3)
    with pytest.raises(TypeError):
        BackendError("m")
