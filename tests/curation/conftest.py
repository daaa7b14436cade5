"""A tiny WordNet, so that tests need none installed; those that want the installed one ask for it."""

import pytest

from tests.curation.dictionary import write_dictionary


@pytest.fixture(scope="session", autouse=True)
def tiny_wordnet(tmp_path_factory):
    """Folder of the dictionary that is found where none is named."""
    folder = write_dictionary(tmp_path_factory.mktemp("wordnet"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WNSEARCHDIR", str(folder))
        yield folder
