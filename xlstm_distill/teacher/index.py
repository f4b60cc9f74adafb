"""`targets.json`, beside the shards of a split: whose targets they carry, and how these were made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlstm_distill.contract.exitcode import Mistake
from xlstm_distill.contract.files import hash_value, write_json
from xlstm_distill.contract.schema import Config
from xlstm_distill.data.codec import VERSION
from xlstm_distill.data.shards import read_index

NOTE = "targets.json"


def index_of(config: Config, fetched: Path) -> dict[str, Any]:
    """What the targets of a run have to say of themselves, whichever shard they stand in.

    Args:
        config: of the run.
        fetched: output of its `fetch` job.
    """
    sidecar = json.loads((fetched / "teacher.json").read_text(encoding="utf-8"))
    sampler = config.sampler
    return {
        "teacher": config.teacher.name,
        "weights": sidecar["weights"],
        "tokenizer": sidecar["tokenizer"],
        "chat_template": chat_template_hash(fetched / "teacher"),
        "reset_at_documents": config.student.reset_at_documents,
        "top_k": config.cache.top_k,
        "sampler": sampler,
        "seed": config.seed if sampler != "topk" else None,
        "temperature": 1,
        "codec": VERSION,
    }


def data_digest(folder: Path) -> str:
    """Of one split of the token shards: of its index, which has the hash of every shard."""
    return hash_value(read_index(folder))


def chat_template_hash(teacher: Path) -> str:
    """Of the chat template in an HF folder, or `none`."""
    if (teacher / "chat_template.jinja").is_file():
        return hash_value((teacher / "chat_template.jinja").read_text(encoding="utf-8"))
    if (teacher / "tokenizer_config.json").is_file():
        template = json.loads((teacher / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
        return hash_value(template) if template else "none"
    return "none"


def write_note(folder: Path, note: Mapping[str, Any]) -> None:
    """Write the note of the shards in `folder`."""
    write_json(folder / NOTE, dict(note))


def read_note(folder: Path) -> dict[str, Any]:
    """The note of the shards in `folder`.

    Raises:
        Mistake: there is none, or it is damaged.
    """
    path = folder / NOTE
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Mistake(f"{folder}: holds no teacher targets (no {NOTE}); run stage=cache") from error
    except ValueError as error:
        raise Mistake(f"{path}: damaged, not JSON; remove {folder.parent} and launch again") from error
    if not isinstance(note, dict):
        raise Mistake(f"{path}: damaged, not a note; remove {folder.parent} and launch again")
    return note


def check_targets(folder: Path, expected: Mapping[str, Any]) -> None:
    """Refuse targets that are not the run's.

    Args:
        folder: one split of one source, with teacher targets.
        expected: what its note has to say, key by key.

    Raises:
        Mistake: there are no targets, or one value differs; the line shows both.
    """
    note = read_note(folder)
    for key, value in expected.items():
        if note.get(key) != value:
            raise Mistake(
                f"{folder / NOTE}: made with {key}={note.get(key)}, this run has {key}={value}; "
                f"use the settings that they were made with, or cache anew with --restart cache"
            )
