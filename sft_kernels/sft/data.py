"""Conversations from JSONL, checked line by line before anything is trained."""

from .dataset import nothing_usable
from .formats import Unfit
from .rows import DataError as DataError
from .rows import record_of
from .sources import Source


def read_jsonl(path, bad=None):
    """All records of a file, as a list; :class:`~.sources.Source` says what the file may be.

    A line is ``{"messages": [{"role": …, "content": …}, …]}``, optionally with ``"tools"``, or ``{"text": …}``, or one
    of the shapes of :mod:`.rows`. The first bad line raises :class:`~.rows.DataError`; given a list as ``bad``, each is
    appended there and left out. A file without any record raises in either case.
    """
    refused = []
    records = [*stream(Source(path), None if bad is None else refused.append)]
    if not records:
        raise DataError(path, None, nothing_usable(len(refused), iter(refused)))
    if bad is not None:
        bad += refused
    return records


def stream(source, refuse=None):
    """Yield the records of a :class:`~.sources.Source`. ``refuse`` is called with the :class:`~.rows.DataError` of each
    bad line; without it the first one is raised."""
    for number, line in source.lines():
        try:
            record = record_of(source.path, number, line)
        except Unfit as unfit:
            error = DataError(source.path, number, unfit.at(source.path))
            if refuse is None:
                raise error from unfit
            refuse(error)
        else:
            yield record
