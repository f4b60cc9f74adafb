"""The priors that a source's targets were written with: `SOURCE/priors/DIGEST.bin`.

A sample names its prior by digest, so shards that were captured apart may lie in one source.
"""

from functools import lru_cache
from pathlib import Path

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import write_bytes_atomic
from xlstm_distill.data.codec import CodecError, Prior, prior_of

FOLDER = "priors"


def path_of(source: Path, digest: str) -> Path:
    """File of a prior of the source in the folder `source`."""
    return source / FOLDER / f"{digest}.bin"


def write_prior(source: Path, prior: Prior) -> None:
    """Keep a prior, durably."""
    write_bytes_atomic(path_of(source, prior.digest), prior.to_bytes())


@lru_cache(maxsize=64)
def read_prior(source: Path, digest: str) -> Prior:
    """The prior of this digest.

    Raises:
        Mistake: it is missing or damaged.
    """
    path = path_of(source, digest)
    advice = f"copy it anew, or remove {source} and launch again to make the targets anew"
    try:
        prior = Prior.from_bytes(path.read_bytes())
    except FileNotFoundError as error:
        raise Mistake(f"{path}: missing; {advice}") from error
    except CodecError as error:
        raise Mistake(f"{path}: damaged ({error}); {advice}") from error
    if prior.digest != digest:
        raise Mistake(f"{path}: damaged, holds the prior {prior.digest}; {advice}")
    return prior


def prior_for(data: bytes, source: Path) -> Prior | None:
    """The prior that a sample's targets name; None where they name none.

    Raises:
        CodecError: the targets are damaged.
        Mistake: the prior is missing or damaged.
    """
    digest = prior_of(data)
    return read_prior(source, digest) if digest else None
