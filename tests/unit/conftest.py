"""Fixtures of more than one module."""

import pytest
from tiny_models import make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of tiny models by model_type and options of make_tiny, each made once a module; not to be changed."""
    folders = {}

    def get(model_type, **options):
        key = (model_type, *sorted(options.items()))
        if key not in folders:
            folders[key] = make_tiny(model_type, tmp_path_factory.mktemp(model_type), **options)
        return folders[key]

    return get
