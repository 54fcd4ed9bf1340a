"""What an output file holds after a run that ended early, and how to go on, in words that are true of it."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file that is held open is to be found.

    Attributes:
      path: under which it can be opened now; None if it was removed, or moved to where nobody can tell.
      removed: no name leads to it any more: what it holds goes when it is closed.
      in_its_way: something else stands where it was opened.
    """

    path: str | None
    removed: bool = False
    in_its_way: bool = False


def find(descriptor: int, path: str) -> Place:
    """Whether `path` still leads to the open file, and what does if not."""
    held = os.fstat(descriptor)
    if _leads_to(path, held):
        return Place(path)
    in_its_way = os.path.lexists(path)
    if not held.st_nlink:
        return Place(None, removed=True, in_its_way=in_its_way)
    try:
        elsewhere = os.readlink(f"/proc/self/fd/{descriptor}")  # of Linux
    except OSError:
        return Place(None, in_its_way=in_its_way)
    return Place(elsewhere if _leads_to(elsewhere, held) else None, in_its_way=in_its_way)


def _leads_to(path: str, held: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), held)
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a closed journal leaves behind.

    Attributes:
      output: as the user named it; "-" is standard output.
      resumable: it is a file; nothing can be read back from a pipe or a device.
      place: of the file.
      rows: whole rows in it, those of earlier runs included.
      unsure: of these, the last ones, that a disk with a fault may not have kept.
    """

    output: str
    resumable: bool
    place: Place
    rows: int
    unsure: int = 0

    def words(self, *, overwrite: bool) -> str:
        """One line for people. `overwrite`: the command was told to start anew."""
        again = "the same command" + (" without --overwrite" if overwrite and self.resumable else "")
        if not self.resumable:
            name = "standard output" if self.output == "-" else self.output
            return f"nothing can be resumed from {name}: {again} starts anew; with -o FILE it could go on"
        if self.place.removed:
            first = self._before_again()
            return f"its {self.rows:,} rows are lost; {first}the same command answers them again"
        if self.place.path is None:
            return f"its {self.rows:,} rows are where it went; move it back and {again} goes on from there"
        if self.place.path != self.output:
            safe = f"{self.rows:,} rows are safe in {self.place.path}"
            return f"{safe}; move it back to {self.output} and {again} goes on from there"
        safe = f"{self.rows - self.unsure:,} finished rows are safe in {self.output}"
        doubt = f", {self.unsure:,} after them may not be" if self.unsure else ""
        return f"{safe}{doubt}; {again} goes on from there"

    def _before_again(self) -> str:
        if self.place.in_its_way:
            return "move away what is there now, and "
        folder_is_there = os.path.isdir(os.path.dirname(os.path.abspath(self.output)))
        return "" if folder_is_there else "make its folder again, and "
