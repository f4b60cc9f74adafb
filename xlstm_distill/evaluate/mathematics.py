"""Answers to mathematical questions compared by what they mean: ½ is 1/2, 0.5 and \\frac{1}{2} (Math-Verify).

The comparison parses what a model wrote and hands it to sympy, where `9^{9^{9^9}}` takes all time and memory there is.
So it runs in a process of its own with limits, which is killed and started again when an answer takes too long.

This replaces the comparison of texts in lm-eval's GSM8K and MATH tasks: their `exact_match` is Math-Verify's.
"""

import json
import resource
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

SECONDS = 20.0
"""For one answer; Math-Verify gives up after five for each of three steps where it can."""
START_SECONDS = 120.0
"""For the process's first answer: sympy has to be imported, perhaps from a slow disk."""
MEMORY = 4 << 30
"""Bytes of addresses that the process may have."""


class Grader:
    """The process, started when it is needed."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, gold: str, answer: str) -> bool:
        """Whether the last thing in `answer` that reads as one is `gold`; False where it cannot be found out in time.

        Args:
            gold: the right answer, in LaTeX or plain.
            answer: what a model wrote, in whole sentences.

        Raises:
            RuntimeError: the process does not start: Math-Verify is missing.
        """
        if self._process is None and not self._ask(("1", "1"), START_SECONDS):
            raise RuntimeError("the answers cannot be compared: pip install 'xdl[eval]' brings math-verify")
        return self._ask((gold, answer), self.seconds)

    def _ask(self, question: tuple[str, str], seconds: float) -> bool:
        if self._process is None:
            command = [sys.executable, "-P", __file__]  # imports nothing of this project
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], seconds)[0] and (line := process.stdout.readline()):
                return line == b"1\n"
        self.close()
        return False

    def close(self) -> None:
        """End the process."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None


GRADER = Grader()
"""Of this process."""


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's hook: the score of one answer.

    Args:
        doc: the item; `answer` is the right one, of GSM8K after `####` at the end of a solution.
        results: what the model wrote.
    """
    gold = str(doc["answer"]).rsplit("####", 1)[-1].strip()
    return {"exact_match": float(GRADER(gold, results[0]))}


def same(gold: str, answer: str) -> bool:
    """What the process does: Math-Verify's judgement, here and now."""
    from math_verify import parse, verify

    marked = "$" in gold.replace("\\$", "") or "\\boxed" in gold  # \$ is a dollar, not the bound of a formula
    return bool(verify(parse(gold if marked else f"${gold}$"), parse(answer)))


def main() -> None:
    """Answer one question per line until there are no more."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        try:
            right = same(*json.loads(line))
        except Exception:
            right = False
        sys.stdout.write(f"{int(right)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
