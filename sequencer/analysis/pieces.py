"""The results of an evaluation that is done piece by piece and can be interrupted between any two of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sequencer.config.errors import RequestError
from sequencer.config.request import describe_differences
from sequencer.declared import UndeclaredContent, parse_json
from sequencer.files import write_csv, write_json
from sequencer.printing import printable

Setting = dict[str, str | int | float | None]


class Piece(BaseModel):
    """The result of a piece: what it depends on besides the model, and how many images were classified correctly."""

    setting: Setting
    images: int
    hits: int
    unreadable: int

    @property
    def top1(self) -> float:
        """Fraction of the images that were classified correctly."""
        return self.hits / self.images


class Content(BaseModel):
    """The file of the results."""

    model: Setting
    pieces: dict[str, Piece]


class Ledger:
    """The pieces that are done, in a JSON file that is written again after each.

    Attributes:
        pieces: Result of each piece by its name.
    """

    def __init__(self, path: Path, model: Setting) -> None:
        """Reads the file, if there is one.

        Args:
            path: The file.
            model: Identifies the model; all pieces of a file are of one model.

        Raises:
            RequestError: The file is damaged or of another model.
        """
        self.path, self.model = path, model
        self.pieces: dict[str, Piece] = {}
        try:
            content = parse_json(Content, path.read_bytes(), printable(path))
        except FileNotFoundError:
            return
        except (OSError, UndeclaredContent) as error:
            raise RequestError(f"{error}\nremove it, or name another folder with --output") from error
        self._check(content.model, model)
        self.pieces = content.pieces

    def missing(self, wanted: Mapping[str, Setting]) -> list[str]:
        """Names of the wanted pieces that are not done, in order.

        Args:
            wanted: The setting of each piece by its name.

        Raises:
            RequestError: A piece was done with another setting.
        """
        for name, setting in wanted.items():
            if name in self.pieces:
                self._check(self.pieces[name].setting, setting)
        return [name for name in wanted if name not in self.pieces]

    def complete(self, wanted: Mapping[str, Setting], compute: Callable[[str, str], tuple[int, int, int]]) -> None:
        """Computes the missing pieces, and writes the file after each.

        Args:
            wanted: The setting of each piece by its name.
            compute: Returns the numbers of images, hits and unreadable images of a piece, given its name and a
                description for a progress bar.

        Raises:
            RequestError: A piece was done with another setting.
        """
        missing = self.missing(wanted)
        for number, name in enumerate(missing, start=1):
            images, hits, unreadable = compute(name, f"{name} ({number} of {len(missing)})")
            self.pieces[name] = Piece(setting=wanted[name], images=images, hits=hits, unreadable=unreadable)
            write_json(self.path, Content(model=self.model, pieces=self.pieces).model_dump())

    def write_csv(self, path: Path) -> None:
        """Writes a row for each piece: numbers of images, and top-1 with its 95% interval by Wilson's score."""
        from sequencer.analysis.statistics import wilson  # imported here because scipy takes half a second

        header = ("piece", "images", "hits", "unreadable", "top1", "top1_low", "top1_high")
        rows = [
            (name, piece.images, piece.hits, piece.unreadable, *wilson(piece.hits, piece.images))
            for name, piece in self.pieces.items()
        ]
        write_csv(path, header, rows)

    def _check(self, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        if differences := describe_differences(there, here):
            raise RequestError(
                f"{printable(self.path)} holds other results: {printable(differences)}\n"
                "name another folder with --output"
            )
