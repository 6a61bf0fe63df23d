"""conf/ as a tree of files: where it lies, which choices each group has, and what a combination of choices composes to.

A folder of the user's own (`pift --conf DIR`) is searched before the shipped one, so a method, a reward or a prompt set
is one file in DIR/method/, DIR/reward/ or DIR/prompts/. Composing is Hydra's; it takes 0.1 s, so it is done once per
combination of group choices and the values are set afterwards (orchestrator.grid).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from orchestrator.errors import UserError
from orchestrator.overrides import close

GROUPS = ("model", "reward", "prompts", "method", "sweep", "executor", "tracking", "resources")


def conf_dir() -> Path:
    """The shipped conf/: inside the installed package, or beside it in a checkout."""
    for folder in (Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"conf/config.yaml is neither in {Path(__file__).parent} nor beside it: reinstall the package")


class ConfTree:
    """The shipped conf/ below the user's folders; the last folder given is searched first."""

    def __init__(self, extra: Sequence[Path] = ()) -> None:
        for folder in extra:
            if not folder.is_dir():
                raise UserError(f"--conf {folder} is not a folder; give one that holds method/, reward/, prompts/, ...")
        self.folders = [*(folder.resolve() for folder in reversed(list(extra))), conf_dir().resolve()]
        self.defaults = self._defaults()
        self._composed: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}

    def _defaults(self) -> dict[str, str]:
        """Group -> its choice in config.yaml."""
        path = self.find("config")
        listed = self.read(path).get("defaults") or []
        found = {
            str(group): str(name) for entry in listed if isinstance(entry, Mapping) for group, name in entry.items()
        }
        if missing := [group for group in GROUPS if group not in found]:
            raise UserError(
                f"{path}: its defaults list lacks {', '.join(missing)}; take the shipped one as the example"
            )
        return found

    def find(self, name: str) -> Path:
        """The file of "config" or "group/choice": the first in the search path."""
        return next(path for folder in self.folders if (path := folder / f"{name}.yaml").is_file())

    def choices(self, group: str) -> list[str]:
        """The names that `group=` takes."""
        return sorted({path.stem for folder in self.folders for path in (folder / group).glob("*.yaml")})

    def problems(self, group: str, choice: Any) -> list[str]:
        """What is wrong with `group=choice`."""
        known = self.choices(group)
        if choice in known:
            return []
        if isinstance(choice, list):
            return [
                f"{group}={_shown(choice)} is a list; several values are {group}={','.join(map(str, choice)) or 'a,b'}"
            ]
        where = " or ".join(str(folder / group) for folder in self.folders if (folder / group).is_dir())
        near = close(str(choice), known)
        return [f"{group}={_shown(choice)} is not known; choose one of {', '.join(known)} ({where}){near}"]

    def read(self, path: Path) -> dict[str, Any]:
        """One file as plain data, for the files that are read before anything is composed."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        try:
            content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {_first_lines(error)}") from None
        if not isinstance(content, dict):
            raise UserError(f"{path} is not a file of `key: value` lines")
        return cast(dict[str, Any], content)

    def compose(self, choices: Mapping[str, str]) -> dict[str, Any]:
        """Every setting for one choice per group, a plain dict with its interpolations unresolved; read-only."""
        wanted = tuple(sorted(choices.items()))
        if wanted not in self._composed:
            self._composed[wanted] = self._compose([f"{group}={choice}" for group, choice in wanted])
        return self._composed[wanted]

    def _compose(self, overrides: list[str]) -> dict[str, Any]:
        from hydra import compose, initialize_config_dir
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        *users, last = self.folders
        _searched_first()[:] = users
        try:
            with initialize_config_dir(str(last), job_name="pift", version_base="1.3"):
                content = OmegaConf.to_container(compose("config", overrides), resolve=False)
        except (HydraException, OmegaConfBaseException, YAMLError, OSError) as error:
            folders = ", ".join(str(folder) for folder in self.folders)
            what = " ".join(overrides)
            raise UserError(f"the files in {folders} do not fit together ({what}): {_first_lines(error)}") from None
        return cast(dict[str, Any], content)


@functools.cache
def _searched_first() -> list[Path]:
    """What Hydra searches, in this order, before the folder it is initialised with; to be changed in place."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    folders: list[Path] = []

    class UserFolders(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for folder in reversed(folders):
                search_path.prepend("pift --conf", f"file://{folder}")

    Plugins.instance().register(UserFolders)
    return folders


def _shown(value: Any) -> str:
    return "''" if value in ("", None) else str(value)


def _first_lines(error: Exception, count: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:count]) or type(error).__name__
