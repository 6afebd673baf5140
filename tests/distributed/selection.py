"""What the tests that were selected need, so that a module's fixture trains nothing for the others."""

from __future__ import annotations

from typing import Any

import pytest


def selected(request: pytest.FixtureRequest, *names: str) -> list[Any]:
    """The values of these parameters in the selected tests of a fixture's module: once each, in the tests' order.

    Of several names the values are tuples, of the tests that have all of them.
    """
    items = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    parameters = [item.callspec.params for item in items if hasattr(item, "callspec")]
    values = [tuple(each[name] for name in names) for each in parameters if each.keys() >= set(names)]
    return list(dict.fromkeys(value[0] if len(names) == 1 else value for value in values))
