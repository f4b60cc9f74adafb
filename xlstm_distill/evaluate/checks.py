"""Whether a run came out as it should: alignment, held-out KL, heads that are shut."""

from xlstm_distill.contract.gates import heads_shut
from xlstm_distill.evaluate.collect import Results

LAYER_LIMIT, MEAN_LIMIT = 0.8, 0.5
"""Alignment should leave at most these shares of the untrained error, in each layer and on average."""


def checks(results: Results) -> list[tuple[bool, str]]:
    """Whether the run came out as it should: `(passed, what was found)`, in words."""
    return [*_alignment_checks(results), *_heldout_checks(results)]


def _alignment_checks(results: Results) -> list[tuple[bool, str]]:
    before, after = results.align.get("error_before"), results.align.get("error_after")
    if not before or not after:
        return []
    shares = [a / b if b else 0.0 for a, b in zip(after, before, strict=True)]
    high = [f"{layer} ({share:.2f})" for layer, share in enumerate(shares) if share >= LAYER_LIMIT]
    mean = sum(after) / sum(before)
    found = [
        (
            not high,
            f"alignment error of every layer below {LAYER_LIMIT} of untrained"
            + (f": not so in layers {_few(high)}" if high else f" (highest {max(shares):.2f})"),
        ),
        (mean < MEAN_LIMIT, f"mean alignment error below {MEAN_LIMIT} of untrained ({mean:.2f})"),
    ]
    gates = results.align.get("output_gate")
    if gates:
        shut = [f"{layer}.{head}" for layer, head in heads_shut(gates)]
        found.append((not shut, "no head shut" + (f": layer.head {_few(shut)}" if shut else "")))
    return found


def _few(names: list[str], most: int = 5) -> str:
    """The first of `names`, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _heldout_checks(results: Results) -> list[tuple[bool, str]]:
    models = {m.name: m for m in results.models}
    found = []
    pairs = [("window", "aligned"), *(("aligned", name) for name in results.distill), ("aligned", "merged")]
    for worse, better in pairs:
        if any(name not in models or not models[name].heldout for name in (worse, better)):
            continue
        a, b = models[worse].heldout, models[better].heldout
        changes = {source: (a[source]["kl"], b[source]["kl"]) for source in a if source in b}
        words = ", ".join(f"{source} {old:.3f} → {new:.3f}" for source, (old, new) in changes.items())
        # An expert is judged by its own domain; every other student by all.
        own = results.distill.get(better, {}).get("validation", {}).get("end", changes)
        judged = [new < old for source, (old, new) in changes.items() if source in own]
        on = f" on {', '.join(own)}" if better in results.distill else ""
        found.append((bool(judged) and all(judged), f"held-out KL, {worse} → {better}, lower{on}: {words}"))
    return found
