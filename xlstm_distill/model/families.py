"""The teachers whose attention can be replaced: softmax attention with RoPE, GQA, optional biases and QK-norm."""

FAMILIES = ("llama", "qwen2", "qwen3", "olmo2", "olmo3")
"""`model_type` in transformers."""


def check_family(model_type: str) -> None:
    """Raise `ValueError` in one line for a teacher that is not known."""
    if model_type not in FAMILIES:
        raise ValueError(f"teacher of type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
