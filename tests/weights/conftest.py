"""What the tests of weights share."""
import pytest
from foreign_models import OfficialShape, shaken


@pytest.fixture(scope='session')
def official_state():
    "The tensors of an official model, every one shaken."
    return {k: v.clone() for k, v in shaken(OfficialShape()).state_dict().items()}
