"""Names of the local evaluation tasks, which are made from a run's own held-out data."""

from collections.abc import Iterable

PREFIX = "local_"
WITHOUT_SOURCE = ("recall", "addition")
PER_SOURCE = ("cloze", "words", "answers", "perplexity")


def local_names(sources: Iterable[str]) -> list[str]:
    """Names of all local tasks of a run with these data sources."""
    plain = [PREFIX + kind for kind in WITHOUT_SOURCE]
    return plain + [f"{PREFIX}{kind}_{source}" for source in sources for kind in PER_SOURCE]
