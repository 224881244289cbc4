import pytest


def pytest_collection_modifyitems(items):
    for item in items:  # NumPy's, from the interpreter, on NaN and 6 / 0
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
