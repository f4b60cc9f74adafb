"""`xdl generate`: streamed text from a model of a run."""

import io

import pytest
import torch
from eval_support import config, finished_run, tiny_llama, tiny_tokenizer

from xlstm_distill.evaluate.generate import encode_prompt, generate, main


def text_of(model, tokenizer, prompt, **options):
    out = io.StringIO()
    tokens = encode_prompt(tokenizer, prompt, raw=True)
    generate(model, tokenizer, tokens, **{"max_new_tokens": 8, "temperature": 0.0, **options}, out=out)
    return out.getvalue()


def test_greedy_text_is_the_likeliest_next_token_again_and_again():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokens = encode_prompt(tokenizer, "abc", raw=True)
    for _ in range(8):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    expected = tokenizer.decode(tokens[0, 3:], skip_special_tokens=True)
    assert text_of(model, tokenizer, "abc").rstrip("\n") == expected.rstrip("\n")


def test_sampling_depends_on_the_seed():
    model, tokenizer = tiny_llama(), tiny_tokenizer()

    def sample(seed):
        torch.manual_seed(seed)
        return text_of(model, tokenizer, "abc", temperature=1.0, max_new_tokens=16)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_the_chat_template_wraps_the_prompt_unless_raw():
    tokenizer = tiny_tokenizer(chat=True)
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi", raw=False)[0]) == "<user> Hi <assistant>"
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi", raw=True)[0]) == "Hi"


def test_the_command_prints_text_of_the_named_model(tmp_path, capsys):
    finished_run(tmp_path, config())
    assert main([str(tmp_path), "abc", "--model", "aligned", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["abc"], "merged: is not finished; finished: window, aligned, teacher"),
        (["abc", "--model", "poetry"], "poetry: is no model of this run"),
        (["abc", "--max-new-tokens", "0"], "--max-new-tokens 0: expected at least 1"),
        (["abc", "--temperature", "-1"], "--temperature -1.0: expected a number ≥ 0"),
        (["", "--model", "aligned"], "the prompt is empty"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, arguments, message):
    finished_run(tmp_path, config())
    assert main([str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main([str(tmp_path), "abc"]) == 2
    assert "not a run folder" in capsys.readouterr().err
