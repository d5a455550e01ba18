"""Shapes and dtypes of the annotations are checked while the tests run."""

from jaxtyping import install_import_hook

install_import_hook(["envs", "shared", "algorithms"], "beartype.beartype")
