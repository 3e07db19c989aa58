"""The folders of YAML files that a configuration is composed from."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sequencer.config.errors import RequestError
from sequencer.config.overrides import quoted

PACKAGE = Path(__file__).parents[1]


def conf_dir() -> Path:
    """Returns the folder of the project's YAML files: `sequencer/conf` in an installed wheel, `conf/` in a checkout."""
    packaged = PACKAGE / "conf"
    return packaged if packaged.is_dir() else PACKAGE.parent / "conf"


@dataclass(frozen=True)
class ConfigFiles:
    """The files that groups and recipes are looked up in.

    Args:
        main: folder with the primary file and the groups, one folder each.
        extra: a second folder with groups, e.g. a user's own recipes in `extra/experiment/`.
        name: the primary file, without `.yaml`.

    Raises:
        RequestError: A folder or the primary file is missing, or a choice exists in both folders.
    """

    main: Path
    extra: Path | None = None
    name: str = "config"

    def __post_init__(self) -> None:
        for flag, folder in (("--config-path", self.main), ("--config-dir", self.extra)):
            if folder is not None and not folder.is_dir():
                raise RequestError(f"{flag} {folder}: there is no such folder")
        if self.find(self.name) is None:
            raise RequestError(f"--config-name {self.name}: there is no {self.name}.yaml in {self.main}")
        for group, choices in _groups(self.extra).items() if self.extra else ():
            for choice in sorted(choices & _groups(self.main).get(group, set())):
                ours, theirs = (self._path(folder, group, choice) for folder in (self.main, self.extra))
                raise RequestError(f"{group}={choice} exists twice: {ours} and {theirs}\nrename the second one")

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The choices of each group, sorted."""
        found = {group: set(choices) for group, choices in _groups(self.main).items()}
        for group, choices in _groups(self.extra).items() if self.extra else ():
            found.setdefault(group, set()).update(choices)
        return {group: sorted(choices) for group, choices in found.items()}

    @property
    def lines(self) -> list[str]:
        """The override that adds the second folder to Hydra's search path."""
        return [] if self.extra is None else [f"hydra.searchpath=[{quoted(f'file://{self.extra.absolute()}')}]"]

    def find(self, config_path: str) -> Path | None:
        """Returns the file of a path such as `data/cifar10`, or None if it is in neither folder."""
        folders = [self.main] if self.extra is None else [self.main, self.extra]
        return next((path for folder in folders if (path := self._path(folder, config_path)).is_file()), None)

    @staticmethod
    def _path(folder: Path | None, *parts: str) -> Path:
        assert folder is not None
        return folder.joinpath(*parts[:-1], f"{parts[-1]}.yaml")


def _groups(folder: Path) -> dict[str, set[str]]:
    """Returns the choices of each group in a folder; folders inside a group (Hydra's own groups) are left out."""
    return {
        group.name: choices
        for group in sorted(folder.iterdir())
        if group.is_dir() and (choices := {path.stem for path in group.glob("*.yaml")})
    }
