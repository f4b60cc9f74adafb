"""Shards in an object store: a folder here mirrors it, and what is missing or damaged is fetched when it is needed.

The downloads are streaming's: `s3://`, `gs://`, `oci://`, `azure://`, `hf://`, `sftp://`, …, with the packages and the
credentials that it asks for, and `file://` for a folder.
"""

import errno
import json
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import beside, hash_value, write_json

NOTE = ".remote"
"""Names the remote folder, in the folder that mirrors it; hidden, so no manifest counts it."""
TRIES, PAUSE, TIMEOUT = 4, 2.0, 300.0
"""Attempts, seconds before the second one (twice as many before each further one), and seconds that one may take."""


def is_remote(folder: str) -> bool:
    """Whether a setting names an object store."""
    return "://" in folder


def mirror(url: str, below: Path) -> Path:
    """The folder below `below` that mirrors `url`; empty at first. Ranks and jobs share it."""
    folder = below / hash_value(url)
    if not (folder / NOTE).exists():
        write_json(folder / NOTE, {"url": url})
    return folder


@lru_cache(maxsize=4096)
def _url_of(folder: Path) -> str:
    for parent in (folder, *folder.parents[:3]):
        if (parent / NOTE).is_file():
            url = json.loads((parent / NOTE).read_text(encoding="utf-8"))["url"]
            return "/".join([url.rstrip("/"), *folder.relative_to(parent).parts])
    return ""


def checked(file: Path, problem: Callable[[], str], tries: int = TRIES) -> str:
    """What is wrong with `file`, in one word; empty when it is right, if need be after fetching it (again).

    Args:
        file: in a folder that mirrors a remote one, or in any other, where nothing is fetched.
        problem: looks at the file as it is.
        tries: attempts.

    Returns:
        `problem()`'s last answer, with what became of the attempts where there is a remote.
    """
    wrong, url, reason = problem(), _url_of(file.parent), ""
    if not wrong or not url:
        return wrong
    for attempt in range(tries):
        if file.exists() or attempt:
            print(f"{file}: {wrong}{reason}; fetching it from {url}", flush=True)
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        reason = _fetch(f"{url}/{file.name}", file)
        if not (wrong := problem()):
            return ""
    return f"{wrong}, after {tries} attempt{'s' * (tries > 1)} to fetch it from {url}{reason}"


def _fetch(url: str, file: Path) -> str:
    """Put a copy of `url` at `file`, and say why where that fails."""
    file.parent.mkdir(parents=True, exist_ok=True)
    copied = beside(file)
    downloader = _downloader(url.split("://")[0])
    try:
        copied.unlink(missing_ok=True)
        downloader.download(url.removeprefix("file://"), str(copied), TIMEOUT)
        copied.replace(file)
    except Exception as error:  # every store has kinds of its own
        copied.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        return f" ({' '.join(str(error).split())[:200] or type(error).__name__})"
    return ""


@lru_cache(maxsize=8)
def _downloader(scheme: str) -> Any:
    from xlstm_distill.data.shards import import_streaming

    import_streaming()
    from streaming.base.storage.download import CloudDownloader

    try:
        return CloudDownloader.get(None if scheme == "file" else f"{scheme}://")
    except ValueError as error:
        raise Mistake(f"data.shards={scheme}://…: not a store that mosaicml-streaming knows; use s3, gs, …") from error
    except ImportError as error:
        raise Mistake(f"data.shards={scheme}://…: needs the Python package {error.name}; install it") from error


def bring(file: Path, tries: int = TRIES) -> None:
    """Make sure that a file of a mirrored folder is there, in so many attempts; elsewhere nothing is done.

    Raises:
        Mistake: it cannot be fetched.
    """
    wrong = checked(file, lambda: "" if file.is_file() else "missing", tries)
    if wrong and _url_of(file.parent):
        raise Mistake(f"{file}: {wrong}; mend data.shards, or the store")
