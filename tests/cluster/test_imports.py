"""The collector of cycles stands still while libraries are imported."""

from __future__ import annotations

import gc

import pytest

from cluster.imports import importing


def test_what_is_imported_is_never_looked_through_again() -> None:
    try:
        with importing():
            assert not gc.isenabled()
            before = gc.get_freeze_count()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
        with pytest.raises(ImportError), importing():
            import no_such_module  # type: ignore[import-not-found]  # noqa: F401
        assert gc.isenabled()
        gc.disable()
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.unfreeze()
        gc.enable()
