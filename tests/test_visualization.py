"""Pictures are read back pixel by pixel: what is hot, where, and when."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from keras_memory import visualization

HOT = visualization.SEQUENTIAL[-1]
COLD = visualization.SEQUENTIAL[0]
WHITE = [255, 255, 255]


def is_colour(image, colour):
    return np.all(image == np.asarray(colour), axis=-1)


def plot_columns(image, colour):
    """Columns of `colour` within the plot, so without the colour bar."""
    end = visualization.LEFT + visualization.PLOT_WIDTH
    return np.flatnonzero(is_colour(image, colour)[:, :end].any(axis=0))


def one_hot(places, count):
    return np.eye(count)[np.asarray(places)]


@pytest.fixture
def copy_task():
    """Five steps in, a delimiter, five steps out; T=11, N=13, W=3, 7 bits."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2, (5, 7))
    inputs, targets = np.zeros((11, 8)), np.zeros((11, 7))
    inputs[:5, :7], inputs[5, 7], targets[6:] = bits, 1, bits
    written = one_hot([0, 1, 2, 3, 4] + [5] * 6, 13)[:, None]
    read = one_hot([7] * 6 + [0, 1, 2, 3, 4], 13)[:, None]
    memory = np.cumsum(written[:, 0, :, None] * [1.0, -1.0, 0.5], axis=0)
    return {
        "inputs": inputs,
        "targets": targets,
        "outputs": targets,
        "mask": np.arange(11) > 5,
        "trace": {
            "write_weighting": written,
            "read_weighting": read,
            "memory": memory,
        },
        "title": "copy",
    }


# ---------------------------------------------------------------- colorize


def test_the_ends_of_the_scale_have_the_ends_of_the_palette():
    image = visualization.colorize([[2.0, 6.0]], low=2.0, high=6.0)
    assert image.dtype == "uint8" and image.shape == (1, 2, 3)
    np.testing.assert_array_equal(image, [[COLD, HOT]])


def test_an_anchor_and_the_middle_between_two_are_met():
    anchors = visualization.SEQUENTIAL
    image = visualization.colorize([[1 / 8, 3 / 16]])
    np.testing.assert_array_equal(image[0, 0], anchors[1])
    middle = (anchors[1] + anchors[2]) / 2
    np.testing.assert_allclose(image[0, 1], middle, atol=0.5)


def test_values_outside_of_the_scale_are_clipped():
    image = visualization.colorize([[-3.0, 9.0, -np.inf, np.inf]])
    np.testing.assert_array_equal(image, [[COLD, HOT, COLD, HOT]])


def test_nan_has_a_colour_that_no_number_has():
    image = visualization.colorize([[np.nan, 0.0]])
    np.testing.assert_array_equal(image[0, 0], visualization.NAN_COLOUR)
    numbers = np.linspace(-1, 1, 1001)[None]
    for palette in (visualization.SEQUENTIAL, visualization.DIVERGING):
        colours = visualization.colorize(numbers, -1, 1, palette).astype(int)
        far = np.abs(colours - visualization.NAN_COLOUR).sum(axis=-1)
        assert far.min() > 60


def luminance(image):
    linear = (image / 255.0) ** 2.2
    return linear @ [0.2126, 0.7152, 0.0722]


def test_the_sequential_palette_brightens_all_the_way():
    image = visualization.colorize(np.linspace(0, 1, 101)[None])
    assert np.all(np.diff(luminance(image[0])) > 0)


def test_the_diverging_palette_is_lightest_and_grey_at_zero():
    image = visualization.colorize(
        np.linspace(-1, 1, 101)[None], -1, 1, visualization.DIVERGING
    )[0]
    light = luminance(image)
    assert light.argmax() == 50 and np.ptp(image[50]) == 0
    assert image[0, 2] > image[0, 0] and image[-1, 0] > image[-1, 2]
    np.testing.assert_allclose(light[:50], light[:50:-1], atol=0.06)


@pytest.mark.parametrize("low, high", [(1, 1), (2, 1), (0, np.nan)])
def test_a_scale_without_extent_is_refused(low, high):
    with pytest.raises(ValueError, match=f"`high` must be .* high={high}"):
        visualization.colorize([[0.5]], low, high)


# ------------------------------------------------------------------- panel


@pytest.mark.parametrize("row, column", [(0, 0), (2, 5), (6, 10)])
def test_a_hot_cell_lands_where_it_belongs(row, column):
    values = np.zeros((7, 11))
    values[row, column] = 1.0
    image = visualization.panel(values, "one", cell=(5, 3))
    top = visualization.TOP + 3 * row
    left = visualization.LEFT + 5 * column
    expected = np.zeros(image.shape[:2], bool)
    expected[top : top + 3, left : left + 5] = True
    end = visualization.LEFT + 5 * 11
    hot = is_colour(image, HOT)
    np.testing.assert_array_equal(hot[:, :end], expected[:, :end])


def test_the_colour_bar_runs_from_high_at_the_top_to_low():
    image = visualization.panel(np.full((7, 11), 0.5), "bar", cell=(5, 9))
    bar = image[:, visualization.LEFT + 5 * 11 + 1 :]
    hot = np.argwhere(is_colour(bar, HOT))
    cold = np.argwhere(is_colour(bar, COLD))
    assert hot[0, 0] == visualization.TOP
    assert cold[-1, 0] == visualization.TOP + 7 * 9 - 1
    assert len(hot) == len(cold) == 10  # as wide as the bar


def test_panels_have_a_good_size():
    for rows, steps in ((128, 41), (8, 41), (1, 1), (13, 7), (300, 600)):
        height, width, _ = visualization.panel(
            np.zeros((rows, steps)), ""
        ).shape
        assert 80 < height < 520 and 140 < width < 800, (rows, steps)
    height, width, _ = visualization.panel(np.zeros((128, 40)), "").shape
    assert 640 <= width <= 800 and 384 <= height <= 480


def test_text_is_drawn_in_the_margins():
    values = np.zeros((20, 30))
    with_text = visualization.panel(values, "title", cell=(9, 9))
    bare = visualization.panel(values, "", x_label="", y_label="", cell=(9, 9))
    top, left = visualization.TOP, visualization.LEFT
    bottom = top + 20 * 9

    def ink(image):
        return image.min(axis=-1) < 200

    assert ink(with_text)[: top - 4].any() and not ink(bare)[: top - 9].any()
    assert ink(with_text)[:, : left // 3].any()
    assert not ink(bare)[:, : left // 3].any()
    assert ink(with_text)[bottom + 22 :].any()
    assert len(bare) == bottom + 22  # no line for a label that is not there
    assert ink(bare)[bottom + 6 :, left:].any()  # numbers stay


def test_a_long_title_is_not_cut():
    image = visualization.panel([[0.0]], "a title much wider than its panel")
    assert is_colour(image[: visualization.TOP - 6, -4:], WHITE).all()
    assert not is_colour(image[: visualization.TOP - 6, -80:], WHITE).all()


def test_masked_columns_are_grey_and_still_told_apart():
    values = np.zeros((2, 3))
    values[0] = 1.0
    image = visualization.panel(values, "", cell=(4, 4), mask=[1, 0, 0.5])
    top, left = visualization.TOP, visualization.LEFT
    cells = image[top : top + 8 : 4, left : left + 12 : 4].astype(int)
    np.testing.assert_array_equal(cells[:, [0, 2]], [[HOT] * 2, [COLD] * 2])
    assert np.all(np.ptp(cells[:, 1], axis=-1) == 0)
    assert cells[0, 1, 0] > cells[1, 1, 0] + 20


def test_with_very_many_slots_no_hot_one_is_lost():
    values = np.zeros((5003, 2))
    values[4999, 0], values[0, 1] = 1.0, -1.0
    image = visualization.panel(values, "", -1, 1, cell=(10, 1))
    assert len(image) < 700
    block = 10  # ceil(5003 / 512)
    rows, columns = np.nonzero(
        is_colour(image, HOT)[:, : visualization.LEFT + 20]
    )
    assert set(rows) == {visualization.TOP + 4999 // block}
    assert set(columns) == set(visualization.LEFT + np.arange(10))
    assert is_colour(image[visualization.TOP, visualization.LEFT + 15], COLD)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"values": np.zeros(3)},
            r"`values` .*\(rows, columns\).*shape \(3,\)",
        ),
        ({"values": np.zeros((2, 3, 5))}, r"without a batch axis.*\(2, 3, 5\)"),
        ({"values": np.zeros((3, 0))}, r"no empty axis.*shape \(3, 0\)"),
        ({"cell": (0, 4)}, r"at least one pixel.*cell=\(0, 4\)"),
        ({"mask": np.ones(5)}, r"'values': 3, 'mask': 5"),
        ({"low": 1.0}, r"`high` must be above `low`"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, message):
    arguments = {"values": np.zeros((2, 3)), "title": "", **arguments}
    with pytest.raises(ValueError, match=message):
        visualization.panel(**arguments)


# ------------------------------------------------------------------- stack


def test_a_stack_keeps_its_panels_and_is_white_elsewhere():
    first = np.full((3, 7, 3), 10, "uint8")
    second = np.full((5, 2, 3), 20, "uint8")
    image = visualization.stack([first, second])
    np.testing.assert_array_equal(image[:3], first)
    np.testing.assert_array_equal(image[-5:, :2], second)
    assert is_colour(image[3:-5], WHITE).all()
    assert is_colour(image[-5:, 2:], WHITE).all()
    np.testing.assert_array_equal(visualization.stack([first]), first)


def test_a_headline_goes_above():
    panel = np.full((3, 300, 3), 10, "uint8")
    image = visualization.stack([panel], "headline")
    np.testing.assert_array_equal(image[-3:], panel)
    assert (image[:-3].min(axis=-1) < 100).any()


@pytest.mark.parametrize(
    "panels, message",
    [
        ([], "at least one image"),
        ([np.zeros((2, 2, 3))], "uint8 array .* float64"),
        ([np.zeros((2, 2), "uint8")], r"\(H, W, 3\).*shape \(2, 2\)"),
    ],
)
def test_only_images_are_stacked(panels, message):
    with pytest.raises(ValueError, match=message):
        visualization.stack(panels)


# -------------------------------------------------------- composed pictures


def test_slots_run_down_and_time_runs_right():
    image = visualization.weightings(one_hot([2, 3, 5], 7), "reads")
    width, height = 64, 16  # of a cell: the largest, as three steps are few
    top = visualization.TOP + height // 2
    left = visualization.LEFT + width // 2
    cells = image[top:, left:][: 7 * height : height, : 3 * width : width]
    hot = is_colour(cells, HOT)
    np.testing.assert_array_equal(hot, one_hot([2, 3, 5], 7).T == 1)


def test_each_head_has_a_panel_on_one_time_axis():
    weighting = np.zeros((11, 3, 5))
    weighting[4, :, 2] = 1.0
    image = visualization.weightings(weighting, "reads")
    hot = is_colour(image, HOT)[:, : visualization.LEFT + 640]
    starts = np.flatnonzero(np.diff(hot.any(axis=1).astype(int)) == 1)
    assert len(starts) == 3 and len(set(np.diff(starts))) == 1
    cell = 640 // 11
    expected = visualization.LEFT + cell * 4 + np.arange(cell)
    np.testing.assert_array_equal(plot_columns(image, HOT), expected)


def test_one_head_looks_as_none():
    weighting = np.random.default_rng(0).random((11, 5))
    np.testing.assert_array_equal(
        visualization.weightings(weighting, "reads"),
        visualization.weightings(weighting[:, None], "reads"),
    )


def test_weightings_keep_their_scale():
    faint = visualization.weightings(np.full((11, 5), 0.25), "reads")
    expected = visualization.colorize([[0.25]])[0, 0]
    top, left = visualization.TOP, visualization.LEFT
    np.testing.assert_array_equal(faint[top, left], expected)


def test_the_difference_shows_the_wrong_bits_where_the_loss_counts():
    target, output = np.zeros((11, 7)), np.zeros((11, 7))
    output[9, 3] = output[1, 2] = 1.0
    counts = np.arange(11) > 5
    image = visualization.target_and_output(target, output, counts)
    cell = 640 // 11
    expected = visualization.LEFT + cell * 9 + np.arange(cell)
    np.testing.assert_array_equal(plot_columns(image, HOT), expected)
    everywhere = visualization.target_and_output(target, output)
    assert len(plot_columns(everywhere, HOT)) == 2 * cell
    hot = is_colour(image, HOT)[:, expected].any(axis=1)
    assert np.sum(np.diff(hot.astype(int)) == 1) == 2  # output, difference


def test_a_film_strip_shows_first_and_last_on_one_symmetric_scale():
    memory = np.zeros((11, 5, 3))
    memory[0, 1, 0] = 2.0  # rust, only in the first frame
    memory[10, 3, 2] = -4.0  # deepest blue, only in the last
    image = visualization.memory_film_strip(memory, frames=2)
    top, left = visualization.TOP, visualization.LEFT
    width, height, gap = 16, 16, visualization.GAP
    half = visualization.colorize([[0.75]], palette=visualization.DIVERGING)
    np.testing.assert_array_equal(image[top + height, left], half[0, 0])
    last = left + 3 * width + gap
    corner = image[top + 3 * height, last + 2 * width]
    np.testing.assert_array_equal(corner, visualization.DIVERGING[0])
    zero = visualization.DIVERGING[4]
    np.testing.assert_array_equal(image[top, left], zero)


@pytest.mark.parametrize(
    "steps, frames, shown", [(11, 4, 4), (3, 8, 3), (1, 8, 1)]
)
def test_a_film_strip_has_at_most_so_many_frames(steps, frames, shown):
    image = visualization.memory_film_strip(np.zeros((steps, 5, 3)), frames)
    row = image[visualization.TOP + 16, visualization.LEFT - 2 :]
    zero = is_colour(row, visualization.DIVERGING[4])
    assert np.sum(np.diff(zero.astype(int)) == 1) == shown


def test_a_single_frame_is_the_last():
    memory = np.arange(11.0)[:, None, None] * np.ones((5, 3))
    image = visualization.memory_film_strip(memory, frames=1)
    corner = image[visualization.TOP, visualization.LEFT]
    np.testing.assert_array_equal(corner, visualization.DIVERGING[-1])


def test_a_film_strip_survives_nan_and_infinity():
    memory = np.ones((2, 5, 3))
    memory[0, 0, 0], memory[1, 0, 0] = np.nan, np.inf
    image = visualization.memory_film_strip(memory)
    assert is_colour(image, visualization.NAN_COLOUR).any()


def test_a_task_picture_is_the_same_step_in_every_panel(copy_task):
    for key in ("inputs", "targets", "outputs"):
        copy_task[key] = np.zeros_like(copy_task[key])
        copy_task[key][7, 1] = 1.0
    for key in ("write_weighting", "read_weighting"):
        copy_task["trace"][key] = np.zeros((11, 2, 13))
        copy_task["trace"][key][7, :, 4] = 1.0
    image = visualization.task_picture(**copy_task)
    cell = 640 // 11
    expected = visualization.LEFT + cell * 7 + np.arange(cell)
    np.testing.assert_array_equal(plot_columns(image, HOT), expected)
    hot = is_colour(image, HOT)[:, expected[0]].astype(int)
    assert np.sum(np.diff(hot) == 1) == 3 + 2 + 2  # bits, two heads each


def test_a_task_picture_adds_the_memory_where_it_is_traced(copy_task):
    rust = visualization.DIVERGING[-1]
    with_memory = visualization.task_picture(**copy_task)
    del copy_task["trace"]["memory"]
    without = visualization.task_picture(**copy_task)
    assert is_colour(with_memory, rust).any()
    assert not is_colour(without, rust).any()
    np.testing.assert_array_equal(with_memory[: len(without)], without)


def test_a_task_picture_greys_what_the_loss_ignores(copy_task):
    greyed = visualization.task_picture(**copy_task)
    copy_task["mask"] = None
    plain = visualization.task_picture(**copy_task)
    changed = np.any(greyed != plain, axis=-1)
    left, cell = visualization.LEFT, 640 // 11
    rows = changed[:, left]  # only cells: the titles begin alike
    assert rows.sum() == 3 * 7 * 16  # target, output, difference
    columns = np.flatnonzero(changed[rows].any(axis=0))
    np.testing.assert_array_equal(columns, left + np.arange(6 * cell))


def test_mismatched_lengths_are_named(copy_task):
    copy_task["inputs"] = copy_task["inputs"][:7]
    with pytest.raises(ValueError, match="time steps.*'Input': 7, .*: 11"):
        visualization.task_picture(**copy_task)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["trace"].pop("read_weighting"), "must hold .*'memory'"),
        (lambda c: c.update(targets=np.zeros((11, 5))), r"target \(11, 5\)"),
        (lambda c: c.update(mask=np.ones(5)), "'mask': 5"),
        (lambda c: c.update(inputs=np.zeros((2, 11, 8))), "batch axis"),
        (
            lambda c: c["trace"].update(memory=np.zeros((5, 13, 3))),
            "'memory': 5",
        ),
    ],
)
def test_a_task_picture_names_what_does_not_fit(copy_task, change, message):
    change(copy_task)
    with pytest.raises(ValueError, match=message):
        visualization.task_picture(**copy_task)


@pytest.mark.parametrize(
    "draw, message",
    [
        (
            lambda: visualization.weightings(np.zeros((2, 3, 5, 7)), ""),
            r"\(T, heads, N\) or \(T, N\).*\(2, 3, 5, 7\)",
        ),
        (
            lambda: visualization.weightings(np.zeros((0, 3, 5)), ""),
            r"no empty axis.*\(0, 3, 5\)",
        ),
        (
            lambda: visualization.memory_film_strip(np.zeros((5, 7))),
            r"`memory` .*\(T, N, W\).*\(5, 7\)",
        ),
        (
            lambda: visualization.memory_film_strip(np.zeros((2, 3, 5)), 0),
            "frames=0",
        ),
        (
            lambda: visualization.target_and_output(
                np.zeros((5, 7)), np.zeros((3, 7))
            ),
            r"target \(5, 7\), output \(3, 7\)",
        ),
    ],
)
def test_wrong_ranks_and_empty_axes_are_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


# ----------------------------------------------------------------- encoding


def decode(data):
    with Image.open(io.BytesIO(data)) as file:
        frames = []
        for index in range(getattr(file, "n_frames", 1)):
            file.seek(index)
            frames.append(np.array(file.convert("RGB")))
        return file.format, file.info, frames


def test_png_is_lossless():
    image = np.random.default_rng(0).integers(0, 256, (7, 11, 3), "uint8")
    kind, _, frames = decode(visualization.encode_png(image))
    assert kind == "PNG"
    np.testing.assert_array_equal(frames[0], image)


def test_png_wants_an_image():
    with pytest.raises(ValueError, match="uint8 array .* float64"):
        visualization.encode_png(np.zeros((7, 11, 3)))


def test_gif_has_every_frame_in_order_and_loops_forever():
    values = np.eye(5)
    images = [visualization.colorize(values[[step]]) for step in range(5)]
    data = visualization.encode_gif(images, milliseconds=130)
    kind, info, frames = decode(data)
    assert kind == "GIF" and info["loop"] == 0 and info["duration"] == 130
    np.testing.assert_array_equal(frames, images)  # few colours: exact


def test_gif_is_exact_up_to_255_colours():
    colours = np.random.default_rng(0).integers(0, 256, (255, 3), "uint8")
    images = np.stack([colours.reshape(15, 17, 3)] * 2)
    images[1] = images[1, ::-1]
    _, _, frames = decode(visualization.encode_gif(images))
    np.testing.assert_array_equal(frames, images)


def test_gif_colours_do_not_flicker():
    """A still colour stays the same while thousands of others come and go."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (5, 29, 31, 3)).astype("uint8")
    images[:, :7], images[:, 7:11], images[:, 11:13] = 255, COLD, HOT
    _, _, frames = decode(visualization.encode_gif(images))
    assert len(frames) == 5
    for frame in frames:
        np.testing.assert_array_equal(frame[:13], frames[0][:13])
        np.testing.assert_array_equal(frame[:7], 255)
    error = np.abs(np.subtract(frames, images, dtype="int64"))
    assert error.mean() < 20


def test_gif_of_real_panels_is_close():
    random = np.random.default_rng(0)
    images = [
        visualization.panel(random.random((13, 29)), f"step {step}")
        for step in range(3)
    ]
    _, _, frames = decode(visualization.encode_gif(images))
    error = np.abs(np.subtract(frames, images, dtype="int64"))
    assert len(frames) == 3 and error.max() <= 24


def test_gif_merges_equal_frames_and_keeps_the_time():
    black, white = (
        np.zeros((2, 3, 3), "uint8"),
        np.full((2, 3, 3), 255, "uint8"),
    )
    data = visualization.encode_gif([black, black, white], milliseconds=100)
    _, _, frames = decode(data)
    assert len(frames) == 2
    with Image.open(io.BytesIO(data)) as file:
        assert file.info["duration"] == 200


@pytest.mark.parametrize(
    "sizes, milliseconds, message",
    [
        ([], 200, "one size.*0 frames"),
        ([(2, 3), (5, 3)], 200, r"one size.*\(2, 3, 3\), \(5, 3, 3\)"),
        ([(2, 3)], 3, "milliseconds=3"),
    ],
)
def test_impossible_gifs_are_refused(sizes, milliseconds, message):
    frames = [np.zeros((*size, 3), "uint8") for size in sizes]
    with pytest.raises(ValueError, match=message):
        visualization.encode_gif(frames, milliseconds)


# ---------------------------------------------------------------- no Pillow


def test_without_pillow_the_error_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    image = visualization.colorize([[0.0, 1.0]])  # colours need no Pillow
    for draw in (
        lambda: visualization.panel([[0.0]], "title"),
        lambda: visualization.encode_png(image),
        lambda: visualization.encode_gif([image]),
    ):
        with pytest.raises(ImportError, match="pip install Pillow"):
            draw()
