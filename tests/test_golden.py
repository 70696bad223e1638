"""Every scale file of every target against one that was written by hand, for the toy network of `toy.py`.

tests/golden/<backend>/<format>/<file> was worked out from the vendor's document (or from docs/encodings.md), not copied from output.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from toy import toy

from qdeploy.core.backend import Backend, Format, backends

GOLDEN = Path(__file__).parent / "golden"
WRITTEN = [(backend, form) for backend in backends for form in backend.formats if form.write is not None]


@pytest.mark.parametrize(("backend", "form"), WRITTEN, ids=lambda value: value.name)
def test_the_scale_files_of_the_toy_network_are_those_worked_by_hand(backend: Backend, form: Format) -> None:
    assert form.write is not None
    made = form.write(toy(backend))
    assert tuple(made) == form.files
    for name, text in made.items():
        assert text == (GOLDEN / backend.name / form.name / name).read_text(), name


@pytest.mark.parametrize("backend", list(backends), ids=lambda value: value.name)
def test_a_format_names_its_files_exactly_where_it_writes_some(backend: Backend) -> None:
    assert len({form.name for form in backend.formats}) == len(backend.formats) > 0
    for form in backend.formats:
        assert (form.write is not None) == bool(form.files)
        assert form.model == "float16" or form.model == "qdq" or form.files, "a float model alone quantizes nothing"
