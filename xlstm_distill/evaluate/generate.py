"""`xdl generate RUN PROMPT`: text from a model of a run, streamed token by token."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from xlstm_distill.contract.exitcode import DONE, MISTAKE, Mistake
from xlstm_distill.evaluate.collect import read_config
from xlstm_distill.evaluate.models import find_model, load_model, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, raw: bool) -> "Tensor":
    """Tokens [1, T] of a prompt: a user's turn of a chat where the tokenizer has a template, unless `raw`.

    Raises:
        Mistake: there is nothing in it.
    """
    if tokenizer.chat_template and not raw:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    if not tokens.numel():
        raise Mistake("generate: the prompt is empty")
    return tokens.long()


def generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tokens: "Tensor",
    *,
    max_new_tokens: int,
    temperature: float,
    out: TextIO,
) -> None:
    """Stream the continuation of `tokens` [1, T] to `out`, greedy at temperature 0.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        tokens: the prompt.
        max_new_tokens: at most so many; fewer where the model ends its turn.
        temperature: ≥ 0.
        out: receives the text as it comes, and a newline at the end.
    """
    import torch
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(text, end="\n" if stream_end else "", file=out, flush=True)

    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    tokens = tokens.to(model.device)
    with torch.inference_mode():
        model.generate(  # type: ignore[operator]
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of `generate`."""
    parser = argparse.ArgumentParser(prog="xdl generate", description="Text from a model of a run.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("prompt")
    parser.add_argument("--model", default="merged", help="merged, aligned, window, teacher or an expert's name")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the prompt")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """`generate RUN_DIR PROMPT [--model NAME] …`; returns the exit code."""
    arguments = parse(argv)
    try:
        if arguments.max_new_tokens < 1:
            raise Mistake(f"--max-new-tokens {arguments.max_new_tokens}: expected at least 1")
        if not arguments.temperature >= 0:
            raise Mistake(f"--temperature {arguments.temperature}: expected a number ≥ 0")
        config = read_config(arguments.run)
        place = find_model(arguments.run / "jobs", config, arguments.model)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.manual_seed(arguments.seed)
        tokenizer = load_tokenizer(place)
        tokens = encode_prompt(tokenizer, arguments.prompt, arguments.raw)
        model = load_model(place, config.strategy.precision)
        generate(
            model,
            tokenizer,
            tokens,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            out=sys.stdout,
        )
    except Mistake as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    return DONE
