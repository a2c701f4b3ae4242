"""What ``import fewbit`` offers is what it says it offers."""

from __future__ import annotations

import importlib
import pkgutil
import types

import pytest

import fewbit

PACKAGES = sorted(module.name for module in pkgutil.walk_packages(fewbit.__path__, "fewbit.") if module.ispkg)


def test_names_are_in_order_and_once() -> None:
    constants = [name for name in fewbit.__all__ if name.isupper()]
    classes = [name for name in fewbit.__all__ if name[0].isupper() and not name.isupper()]
    functions = [name for name in fewbit.__all__ if name[0].islower()]
    assert [*sorted(constants), *sorted(classes), *sorted(functions)] == fewbit.__all__
    assert len(set(fewbit.__all__)) == len(fewbit.__all__)


def test_names_are_the_public_ones() -> None:
    public = {
        name
        for name, value in vars(fewbit).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    assert public == set(fewbit.__all__)


@pytest.mark.parametrize("name", fewbit.__all__)
def test_every_name_is_documented(name: str) -> None:
    value = getattr(fewbit, name)
    if callable(value):
        assert value.__doc__ and not value.__doc__.startswith(f"{name}(")


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_export_what_they_name(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__doc__
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name), f"{package}.{name}"


def test_version() -> None:
    from importlib.metadata import version

    assert fewbit.__version__ == version("fewbit")
