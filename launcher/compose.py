"""`configs/` and `key=value` → a checked, frozen `Config`, and where each of its values came from.

Hydra composes the groups. The file of the teacher names a recipe, which names the rest, so the teacher is read first.
`key=value` is parsed by Hydra's grammar and checked against the schema before it is set, so that a wrong key is
answered with the nearest right one.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launcher.budget import budget_origins, with_budgets
from launcher.checks import check
from launcher.keys import hint_of, known_keys
from launcher.union import union_origins, with_unions
from xlstm_distill.contract.data import data_folder
from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import read_yaml
from xlstm_distill.contract.schema import Config, build, unknown_key

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

COMMAND_LINE = "command line"
DEFAULT = "default"
BASE_60 = re.compile(r"^[0-9]+(:[0-9]{1,2})+$")


@dataclass(frozen=True)
class Resolved:
    """A configuration and the origin of its values."""

    config: Config
    origins: Mapping[str, str]
    """Dotted key of every leaf → file of `configs/`, `command line`, or `default` (the schema's)."""
    choices: Mapping[str, str]
    """Group → file taken, e.g. `{"teacher": "smollm2-135m"}`."""


@dataclass(frozen=True)
class Overrides:
    """A command line, parsed: choices of groups, values of keys, keys to delete."""

    choices: dict[str, str]
    values: dict[str, Any]
    deleted: tuple[str, ...]


def compose(overrides: Sequence[str], flags: Mapping[str, Any] | None = None) -> Resolved:
    """Resolve `configs/` under `overrides`.

    Args:
        overrides: `key=value`, `group=file` or `~key`, as on the command line.
        flags: values by dotted key that no grammar touches (from `--name` and the like); they win.

    Raises:
        Mistake: an unknown key or file, a value of the wrong type, or one that cannot work.
    """
    folders = config_folders()
    given = parse(overrides, folders)
    choices = with_recipe(given, folders)
    raw, origins, taken = load(choices, folders)
    for key in given.deleted:
        _delete(raw, origins, key)
    for key, value in {**given.values, **(flags or {})}.items():
        gone = _set(raw, key, value)
        origins = {known: where for known, where in origins.items() if not known.startswith(gone)}
        origins.update(dict.fromkeys((path for path, _ in leaves(value, key)), COMMAND_LINE))
    stated = build(Config, absolute_paths(interpolated(raw)))
    united = with_unions(stated)
    check(united)
    config = with_budgets(united)
    origins.update({**union_origins(stated, united), **budget_origins(united, config)})
    return Resolved(config, {key: origins.get(key, DEFAULT) for key, _ in leaves(asdict(config))}, taken)


def config_folders() -> list[Path]:
    """Where configuration files are looked up, the first first: `$XDL_CONFIG_DIR`, then the packaged `configs/`."""
    own = os.environ.get("XDL_CONFIG_DIR")
    if own and not Path(own).is_dir():
        raise Mistake(f"XDL_CONFIG_DIR={own}: no such folder")
    return [*([Path(own).absolute()] if own else []), data_folder("configs")]


def options(group: str, folders: Sequence[Path]) -> list[str]:
    """Names of the files of a group."""
    return sorted({file.stem for folder in folders for file in (folder / group).glob("*.yaml")})


def parse(overrides: Sequence[str], folders: Sequence[Path]) -> Overrides:
    """Sort a command line into choices, values and deletions.

    Raises:
        Mistake: not of the form `key=value`, an unknown key, or an unknown file of a group.
    """
    given = Overrides({}, {}, ())
    deleted = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if equals and key in ("stage", "experts"):  # plain words, whatever Hydra's grammar makes of them
            given.values[key] = value if key == "stage" else _words(value)
            continue
        override = _parse_one(text)
        if override.is_delete():
            deleted.append(override.key_or_group)
        elif _is_choice(override, folders):
            given.choices[override.key_or_group] = _choice(override.key_or_group, override.value(), folders)
        else:
            given.values[override.key_or_group] = _value(override, value)
    return Overrides(given.choices, given.values, tuple(deleted))


def _words(text: str) -> list[str]:
    return [word.strip(" '\"") for word in text.strip("[] ").split(",") if word.strip(" '\"")]


def _parse_one(text: str) -> "Override":
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if "=" not in text and not text.startswith("~"):
        raise Mistake(f"{text!r}: expected key=value{_as_option(text)}")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise Mistake(
            f"{text!r}: not understood ({reason}); put a value with special signs in quotes: key=\\'…\\'"
        ) from error


def _as_option(text: str) -> str:
    return "; options such as --name stand before the first key=value" if text.startswith("-") else ""


def _is_choice(override: "Override", folders: Sequence[Path]) -> bool:
    key = override.key_or_group
    return not isinstance(override.value(), Mapping) and any((folder / key).is_dir() for folder in folders)


def _choice(group: str, name: Any, folders: Sequence[Path]) -> str:
    known = options(group, folders)
    if str(name) not in known:
        nearest = get_close_matches(str(name), known, n=1, cutoff=0.0)
        raise Mistake(f"{group}={name}: no such file; the nearest is {group}={nearest[0]} (all: {', '.join(known)})")
    return str(name)


def _value(override: "Override", text: str) -> Any:
    """The value of a key, as the schema's type wants it: `revision=007` and `name=1e3` stay text."""
    key = override.key_or_group
    hint = hint_of(key)
    if hint is None:
        raise Mistake(unknown_key(key, known_keys()))
    if hint is str and override.is_sweep_override():
        return text  # exclude=node3,node5
    if override.is_sweep_override():
        raise Mistake(f"{key}={text}: write a list as {key}=[a,b], and text with a comma in quotes")
    value = override.value()
    return text if hint is str and isinstance(value, bool | int | float) else value


def with_recipe(given: Overrides, folders: Sequence[Path]) -> dict[str, str]:
    """The choices, with the recipe that the teacher's file names unless one was given."""
    if "recipe" in given.choices:
        return given.choices
    if "teacher.recipe" in given.values:
        return {**given.choices, "recipe": _choice("recipe", given.values["teacher.recipe"], folders)}
    teacher = given.choices.get("teacher")
    recipe = (_read(find(f"teacher/{teacher}", folders)) if teacher else {}).get("recipe")
    return {**given.choices, "recipe": _choice("recipe", recipe, folders)} if recipe else given.choices


def find(path: str, folders: Sequence[Path]) -> Path:
    """The file of a configuration named without its ending, in the first folder that has it."""
    found = [folder / f"{path}.yaml" for folder in folders if (folder / f"{path}.yaml").is_file()]
    if not found:
        raise Mistake(f"{path}.yaml: in none of {', '.join(map(str, folders))}")
    return found[0]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Mistake(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content or {}, Mapping):
        raise Mistake(f"{path}: expected keys and values")
    return dict(content or {})


def load(choices: Mapping[str, str], folders: Sequence[Path]) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
    """Hydra's composition: (nested values with interpolations, dotted key → file, group → file's name)."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
    from hydra.core.plugins import Plugins
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    Plugins.instance()  # registers the readers of file:// and pkg://
    search_path = ConfigSearchPathImpl()
    search_path.append("hydra", "pkg://hydra.conf")
    for number, folder in enumerate(folders):
        search_path.append("main" if number == len(folders) - 1 else "own", f"file://{folder}")
    search_path.append("schema", "structured://")
    loader = ConfigLoaderImpl(search_path)
    arguments = [f"{group}={name}" for group, name in choices.items()]
    try:
        with _times_as_text():
            composed = loader.load_configuration("config", arguments, RunMode.RUN)
            parts = loader.compute_defaults_list("config", arguments, RunMode.RUN).defaults
        nested = dict(OmegaConf.to_container(composed, resolve=False))  # type: ignore[arg-type]
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise Mistake(f"{folders[0]}: {' '.join(str(error).split())}") from error
    paths = [(str(part.config_path), part.package or "") for part in parts]
    paths = [(path, package) for path, package in paths if not path.startswith("hydra")]
    raw = {str(key): value for key, value in nested.items() if key != "hydra"}
    taken = {group: name for group, _, name in (path.rpartition("/") for path, _ in paths) if group}
    return raw, dict(_origins(paths, folders)), taken


@contextmanager
def _times_as_text() -> Iterator[None]:
    """While Hydra reads YAML 1.1, which takes an unquoted 12:00:00 for a number to the base 60, 43200: Slurm would be
    asked for as many minutes."""
    before = yaml.SafeLoader.yaml_implicit_resolvers
    text = ("tag:yaml.org,2002:str", BASE_60)
    yaml.SafeLoader.yaml_implicit_resolvers = {
        first: [text, *found] if first.isdigit() else found for first, found in before.items()
    }
    try:
        yield
    finally:
        yaml.SafeLoader.yaml_implicit_resolvers = before


def _origins(paths: Sequence[tuple[str, str]], folders: Sequence[Path]) -> Iterator[tuple[str, str]]:
    for path, package in paths:
        file = find(path, folders)
        content = {key: value for key, value in _read(file).items() if key != "defaults"}
        shown = str(file) if file.parents[path.count("/")] != folders[-1] else f"configs/{path}.yaml"
        for key, _ in leaves(content, package.removeprefix("_global_")):
            yield key, shown


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested mapping's leaves; an empty mapping is a leaf."""
    if not isinstance(value, Mapping) or (not value and key):
        yield key, value
        return
    for name, inner in value.items():
        yield from leaves(inner, f"{key}.{name}" if key else str(name))


def _set(raw: dict[str, Any], key: str, value: Any) -> tuple[str, ...]:
    """Put a value, or into a mapping the values of another. Returns how the keys begin that it replaced."""
    *parents, last = key.split(".")
    place = raw
    for name in parents:
        inner = place.get(name)
        place[name] = place = dict(inner) if isinstance(inner, Mapping) else {}
    if isinstance(value, Mapping) and isinstance(place.get(last), Mapping):
        place[last] = {**place[last], **value}
        return tuple(f"{key}.{name}." for name in value)
    place[last] = value
    return (f"{key}.",)


def _delete(raw: dict[str, Any], origins: dict[str, str], key: str) -> None:
    *parents, last = key.split(".")
    place: Any = raw
    for name in parents:
        place = place.get(name) if isinstance(place, Mapping) else None
    if not isinstance(place, dict) or last not in place:
        raise Mistake(f"~{key}: there is nothing to delete")
    del place[last]
    for known in [k for k in origins if k == key or k.startswith(f"{key}.")]:
        del origins[known]


def interpolated(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with `${…}` resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.create(dict(raw)), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise Mistake(f"a ${{…}} in the configuration: {str(error).splitlines()[0]}") from error


def absolute_paths(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` with paths of local files made absolute: jobs run from other folders."""
    for section, key in (("student", "init_from"), ("data", "shards")):
        _absolute(raw.get(section), key)
    if isinstance(raw.get("teacher"), dict) and raw["teacher"].get("source") == "folder":
        _absolute(raw["teacher"], "path")
    experts = raw.get("expert")
    holders = [raw.get("data"), *(experts.values() if isinstance(experts, dict) else ())]
    mixtures = [holder.get("sources") if isinstance(holder, dict) else None for holder in holders]
    for sources in [*mixtures, raw["eval"].get("texts") if isinstance(raw.get("eval"), dict) else None]:
        for source in sources.values() if isinstance(sources, dict) else ():
            if isinstance(source, dict) and source.get("kind") in ("text", "jsonl", "parquet"):
                _absolute(source, "path")
    return raw


def _absolute(holder: Any, key: str) -> None:
    if isinstance(holder, dict) and isinstance(path := holder.get(key), str) and path and "://" not in path:
        holder[key] = os.path.abspath(os.path.expanduser(path))
