"""`metrics.jsonl`: one line per record, no line twice after a resume, a line that was cut does no harm."""

import numpy as np
import pytest

from xlstm_distill.runtime.metrics import Metrics, read_metrics


def write(folder, steps, **settings):
    with Metrics(folder, 9, **settings) as metrics:
        for step in steps:
            metrics.log(step, {"loss/ce": step / 2})


def test_every_record_has_time_step_total_and_its_values(tmp_path):
    write(tmp_path, [1, 2])
    first, second = read_metrics(tmp_path)
    assert (first["step"], second["step"], first["total"], second["loss/ce"]) == (1, 2, 9, 1.0)
    assert second["time"] >= first["time"] > 1e9


@pytest.mark.parametrize(("resume_at", "kept"), [(None, [0, 1, 2, 3]), (2, [0, 1, 2]), (0, [0]), (-1, [])])
def test_after_a_resume_the_later_lines_are_dropped(tmp_path, resume_at, kept):
    write(tmp_path, range(4))
    write(tmp_path, [7], resume_at=resume_at)
    assert [record["step"] for record in read_metrics(tmp_path)] == [*kept, 7]


def test_after_a_resume_what_is_logged_at_the_same_step_joins_its_line(tmp_path):
    with Metrics(tmp_path, 9) as metrics:
        for step in (0, 1, 2):
            metrics.log(step, {"loss": step + 0.5})
    with Metrics(tmp_path, 9, resume_at=1) as metrics:
        metrics.log(1, {"validation/loss": 7.0})
        metrics.log(2, {"loss": 8.0})
        metrics.log(2, {"more": 1.0})
    assert [{k: v for k, v in r.items() if k not in ("time", "total")} for r in read_metrics(tmp_path)] == [
        {"step": 0, "loss": 0.5},
        {"step": 1, "loss": 1.5, "validation/loss": 7.0},
        {"step": 2, "loss": 8.0},
        {"step": 2, "more": 1.0},
    ]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    write(tmp_path, [2], resume_at=1)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_rank_that_does_not_write_makes_nothing(tmp_path):
    write(tmp_path / "job", [1], enabled=False)
    assert not (tmp_path / "job").exists()
    assert read_metrics(tmp_path / "job") == []


def test_a_resume_after_a_torn_line_appends_on_a_line_of_its_own(tmp_path):
    write(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "st')
    write(tmp_path, [2])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, [1, 2, 3], tensorboard=True)
    write(tmp_path, [3, 4], tensorboard=True, resume_at=2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss/ce")
    assert {event.step: event.value for event in events} == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}
    assert len(events) == 4


def test_tensorboard_shows_an_image_at_its_step_pixel_by_pixel(tmp_path):
    import io

    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    with Metrics(tmp_path, 9, tensorboard=True) as metrics:
        metrics.image("gates/output_gate", 3, lambda: picture)
        metrics.image("gates/none", 3, lambda: None)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["images"] == ["gates/output_gate"]
    (event,) = board.Images("gates/output_gate")
    assert event.step == 3
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), picture)


@pytest.mark.parametrize("settings", [{"enabled": False, "tensorboard": True}, {"tensorboard": False}])
def test_where_nobody_looks_nothing_is_drawn(tmp_path, settings):
    with Metrics(tmp_path, 9, **settings) as metrics:
        metrics.image("gates/output_gate", 1, lambda: pytest.fail("drawn"))


def test_tensorboard_shows_a_text_as_it_was_given(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(tmp_path, 9, tensorboard=True) as metrics:
        metrics.text("config", 3, "**bold**")
    with Metrics(tmp_path / "quiet", 9) as metrics:
        metrics.text("config", 3, "nobody looks")
    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tensors("config/text_summary")
    assert (event.step, event.tensor_proto.string_val[0]) == (3, b"**bold**")
