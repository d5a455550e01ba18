"""Shapes and dtypes of the annotations are checked while the tests run. Files with slow tests come first."""

from collections import Counter

from jaxtyping import install_import_hook

install_import_hook(["envs", "shared", "algorithms"], "beartype.beartype")


def pytest_collection_modifyitems(items):
    # else one of the processes is left with minutes of them at the end
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
