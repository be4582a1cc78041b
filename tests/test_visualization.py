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


def test_levels_limit_the_colours_and_keep_zero_and_the_ends():
    numbers = np.linspace(-1, 1, 1001)[None]
    scale = -1, 1, visualization.DIVERGING
    image = visualization.colorize(numbers, *scale, levels=5)
    assert len(np.unique(image[0], axis=0)) == 5
    np.testing.assert_array_equal(
        image[0, [0, 500, 1000]], visualization.DIVERGING[[0, 4, 8]]
    )
    np.testing.assert_array_equal(image[0, 600], visualization.DIVERGING[4])
    np.testing.assert_array_equal(image[0, 630], visualization.DIVERGING[6])


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


def test_usage_is_drawn_slot_by_slot_over_time():
    usage = np.zeros((11, 5))
    usage[7, 3] = 1.0
    image = visualization.slots_over_time(usage, "Usage")
    np.testing.assert_array_equal(cell_of(image, 3, 7), HOT)
    np.testing.assert_array_equal(cell_of(image, 3, 6), COLD)
    usage[2, 1] = -1.0  # beyond 0 to 1 the scale goes along
    image = visualization.slots_over_time(usage, "Usage")
    np.testing.assert_array_equal(cell_of(image, 1, 2), COLD)
    assert not (cell_of(image, 3, 6) == COLD).all()


def test_links_have_rows_and_columns_and_a_scale_from_0():
    linkage = np.zeros((11, 5, 5))
    linkage[10, 3, 1] = 1.0
    image = visualization.linkage_film_strip(linkage, frames=2)
    top, left = visualization.TOP, visualization.LEFT
    last = left + 5 * 16 + visualization.GAP
    hot = np.argwhere(is_colour(image[:, : last + 5 * 16], HOT))
    assert hot.min(axis=0).tolist() == [top + 3 * 16, last + 16]
    assert hot.max(axis=0).tolist() == [top + 4 * 16 - 1, last + 2 * 16 - 1]


def test_links_that_were_kept_in_their_places():
    linkage = np.array([[0.5, 0.25], [0.0, 1.0], [0.125, 0.0]])
    columns = np.array([[2, 1], [0, 2], [1, 0]], "float32")
    expected = [[0, 0.25, 0.5], [0, 0, 1], [0, 0.125, 0]]
    dense = visualization.dense_linkage(linkage, columns)
    np.testing.assert_array_equal(dense, expected)
    np.testing.assert_array_equal(
        visualization.dense_linkage([[linkage]], [[columns]]), [[expected]]
    )
    # Of a state of zeros.
    dense = visualization.dense_linkage(linkage, np.zeros_like(columns))
    np.testing.assert_array_equal(dense[:, 0], linkage.sum(axis=1))
    for wrong in (columns[:, :1], columns[0]):
        with pytest.raises(ValueError, match="`linkage` and `columns`.*Rec"):
            visualization.dense_linkage(linkage, wrong)


def test_gates_are_drawn_head_by_head(copy_task):
    for key in ("inputs", "targets", "outputs"):
        copy_task[key] = np.zeros_like(copy_task[key])
    gate = np.zeros((11, 2))
    gate[7, 1] = 1.0
    copy_task["trace"] = {
        "free_gate": gate,
        "read_weighting": np.zeros((11, 13)),
    }
    image = visualization.task_picture(**copy_task)
    assert hot_rows(image) == [visualization.LEFT + 640 // 11 * 7]


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


def test_a_task_picture_shows_one_block_after_the_other(copy_task, monkeypatch):
    rows, strips = [], []
    over_time = visualization._over_time
    film_strip = visualization.memory_film_strip

    def recording(given, *arguments):
        rows.extend(title for title, *_ in given)
        return over_time(given, *arguments)

    def recording_strip(memory, **arguments):
        strips.append((memory, arguments["title"]))
        return film_strip(memory, **arguments)

    monkeypatch.setattr(visualization, "_over_time", recording)
    monkeypatch.setattr(visualization, "memory_film_strip", recording_strip)
    of_one = copy_task["trace"]
    one = {
        "read_weighting": of_one["read_weighting"][:, 0],
        "write_weighting": of_one["write_weighting"][:, 0],
        "memory": of_one["memory"],
    }
    copy_task["trace"] = {
        f"block{block}/{name}": values + block
        for block in range(2)
        for name, values in one.items()
    }
    visualization.task_picture(**copy_task)
    assert rows[4:] == [
        "Block0/write weighting",
        "Block0/read weighting",
        "Block1/write weighting",
        "Block1/read weighting",
    ]
    assert [title for _, title in strips] == ["Block0/memory", "Block1/memory"]
    for block, (memory, _) in enumerate(strips):
        np.testing.assert_array_equal(memory, one["memory"] + block)


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


def cell_of(image, row, column, columns=11):
    """The colour at the middle of a cell of the topmost panel, 16 rows high."""
    x = visualization.LEFT + 640 // columns * column + 20
    return image[visualization.TOP + 16 * row + 8, x]


def without_headline(copy_task, **changes):
    return visualization.task_picture(**copy_task | {"title": ""} | changes)


def test_inputs_with_a_sign_have_a_scale_with_a_sign(copy_task):
    inputs = np.zeros((11, 8))
    inputs[3, 2], inputs[4, 1] = -4.0, 2.0
    image = without_headline(copy_task, inputs=inputs)
    anchors = visualization.DIVERGING
    np.testing.assert_array_equal(cell_of(image, 2, 3), anchors[0])
    np.testing.assert_array_equal(cell_of(image, 1, 4), anchors[6])
    np.testing.assert_array_equal(cell_of(image, 0, 0), anchors[4])


@pytest.mark.parametrize("outlier, zero", [(1.0, COLD), (1.5, None)])
def test_inputs_from_0_to_1_keep_their_scale(copy_task, outlier, zero):
    inputs = np.zeros((11, 8))
    inputs[3, 2] = outlier
    image = without_headline(copy_task, inputs=inputs)
    zero = visualization.DIVERGING[4] if zero is None else zero
    np.testing.assert_array_equal(cell_of(image, 0, 0), zero)


def test_targets_and_outputs_reach_to_high(copy_task):
    digits = np.arange(11.0)[:, None] % 5
    image = visualization.target_and_output(digits, digits, high=4.0)
    expected = visualization.colorize(digits.T, high=4.0)[0]
    for step in range(11):
        colour = cell_of(image, 0, step)
        np.testing.assert_array_equal(colour, expected[step])
    assert len(plot_columns(image, HOT)) == 2 * (640 // 11)  # 4 at two steps
    changes = {"targets": digits, "outputs": digits, "mask": None, "trace": {}}
    picture = without_headline(
        copy_task, inputs=np.zeros((11, 8)), high=4.0, **changes
    )
    np.testing.assert_array_equal(
        plot_columns(picture, HOT), plot_columns(image, HOT)
    )


def hot_rows(image):
    hot = is_colour(image, HOT)[:, : visualization.LEFT + 640]
    rows = hot.any(axis=1)
    starts = np.flatnonzero(np.diff(rows.astype(int)) == 1) + 1
    return [np.flatnonzero(hot[start])[0] for start in starts]


def test_every_weighting_is_drawn_and_write_comes_first(copy_task):
    for key in ("inputs", "targets", "outputs"):
        copy_task[key] = np.zeros_like(copy_task[key])
    places = {"read": 3, "usage": 7, "write": 5}
    copy_task["trace"] = {}
    for name, step in places.items():
        weighting = np.zeros((11, 13))
        weighting[step, 4] = 1.0
        copy_task["trace"][f"{name}_weighting"] = weighting
    copy_task["trace"]["other"] = np.ones((11, 13))
    image = visualization.task_picture(**copy_task)
    cell = 640 // 11
    expected = [visualization.LEFT + cell * step for step in (5, 3, 7)]
    assert hot_rows(image) == expected


def test_signed_inputs_may_hold_nan(copy_task):
    inputs = np.zeros((11, 8))
    inputs[3, 2], inputs[4, 1], inputs[5, 0] = -2.0, np.nan, np.inf
    image = without_headline(copy_task, inputs=inputs)
    nan = visualization.NAN_COLOUR
    np.testing.assert_array_equal(cell_of(image, 1, 4), nan)
    anchors = visualization.DIVERGING
    np.testing.assert_array_equal(cell_of(image, 2, 3), anchors[0])
    np.testing.assert_array_equal(cell_of(image, 0, 5), anchors[-1])


def test_without_memory_the_rest_of_the_picture_stays(copy_task):
    one_line = {"read_weighting": copy_task["trace"]["read_weighting"]}
    more = visualization.task_picture(**copy_task | {"trace": one_line})
    image = visualization.task_picture(**copy_task | {"trace": {}})
    assert len(image) < len(more) - 13 * 16
    above = len(image) - 30  # to the numbers of the last time axis
    np.testing.assert_array_equal(image[:above], more[:above, : image.shape[1]])


def test_mismatched_lengths_are_named(copy_task):
    copy_task["inputs"] = copy_task["inputs"][:7]
    with pytest.raises(ValueError, match="time steps.*'Input': 7, .*: 11"):
        visualization.task_picture(**copy_task)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda c: c.update(trace={"memory": c["trace"]["memory"]}),
            r"empty or hold a weighting.*keys \['memory'\]",
        ),
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


# ------------------------------------------------------------------- frames


def frame_cells(frame, slots, columns, left=visualization.LEFT):
    """The colours of cells of 16 x 16 pixels."""
    image = frame[visualization.TOP :, left:]
    return image[8 : 16 * slots : 16, 8 : 16 * columns : 16]


@pytest.fixture
def sequence():
    """Twelve steps, seven slots, four columns; three is the largest."""
    memory = np.zeros((12, 7, 4))
    memory[4:, 2, 1], memory[11, 5, 3] = 1.5, -3.0
    read = np.zeros((12, 2, 7))
    read[:, 0, 3] = read[11, 1, 6] = 1.0
    write = one_hot(np.arange(12) % 7, 7)
    return memory, {"write_weighting": write, "read_weighting": read}


def test_a_frame_is_a_moment_of_the_memory_on_one_scale(sequence):
    frames = visualization.sequence_frames(*sequence, "Copy")
    assert len(frames) == 12 and len({frame.shape for frame in frames}) == 1
    for step in (0, 3, 4, 11):
        expected = visualization.colorize(
            sequence[0][step], -3, 3, visualization.DIVERGING
        )
        np.testing.assert_array_equal(frame_cells(frames[step], 7, 4), expected)


def test_weightings_lie_beside_their_slots(sequence):
    memory, weightings = sequence
    frames = visualization.sequence_frames(memory, weightings, "Copy")
    beside = visualization.LEFT + 4 * 16
    for step, frame in enumerate(frames):
        plot = frame[visualization.TOP + 8 :, beside : -2 * visualization.RIGHT]
        hot = is_colour(plot[: 7 * 16 : 16], HOT)
        starts = np.argwhere(np.diff(hot.astype(int), prepend=0) == 1)
        slots = starts[starts[:, 1].argsort(kind="stable"), 0].tolist()
        assert slots == [step % 7, 3] + [6] * (step == 11)


def test_each_weighting_has_as_many_columns_as_heads(sequence):
    memory, _ = sequence
    every = {"x": np.ones((12, 3, 7)), "y": np.ones((12, 7))}
    frame = visualization.sequence_frames(memory, every, "")[0]
    row = is_colour(frame[visualization.TOP + 8], HOT)
    edges = np.flatnonzero(np.diff(row.astype(int)))
    np.testing.assert_array_equal(np.diff(edges)[::2], [3 * 16, 16])


@pytest.mark.parametrize("most, steps", [(1, [11]), (2, [0, 11]), (64, None)])
def test_there_are_at_most_so_many_frames(sequence, most, steps):
    every = visualization.sequence_frames(*sequence, "Copy")
    frames = visualization.sequence_frames(*sequence, "Copy", most)
    chosen = every if steps is None else [every[step] for step in steps]
    np.testing.assert_array_equal(frames, chosen)


def test_frames_have_one_size_and_their_step_under_a_long_title(sequence):
    title = "a title that is much wider than the picture below, by any measure"
    frames = visualization.sequence_frames(*sequence, title)
    assert len({frame.shape for frame in frames}) == 1
    headlines = {f[: visualization.TOP - 2].tobytes() for f in frames}
    assert len(headlines) == 12


def test_frames_without_weightings_show_the_memory(sequence):
    frames = visualization.sequence_frames(sequence[0], {}, "Copy")
    assert not any(is_colour(frame, HOT).any() for frame in frames)
    corner = frame_cells(frames[11], 7, 4)[5, 3]
    np.testing.assert_array_equal(corner, visualization.DIVERGING[0])


def test_with_very_many_slots_the_rows_stay_aligned():
    memory, read = np.zeros((1, 1500, 2)), np.zeros((1, 1500))
    memory[0, 1200, 0], read[0, 1200] = 1.0, 1.0
    (frame,) = visualization.sequence_frames(memory, {"read": read}, "")
    plot = frame[:, : -2 * visualization.RIGHT]
    for colour in (visualization.DIVERGING[-1], HOT):
        rows = np.flatnonzero(is_colour(plot, colour).any(axis=1))
        np.testing.assert_array_equal(rows, [visualization.TOP + 1200 // 3])


def test_frames_make_a_small_and_faithful_gif(sequence):
    random = np.random.default_rng(0)
    memory = random.normal(size=(12, 7, 4))
    frames = visualization.sequence_frames(memory, sequence[1], "Copy")
    data = visualization.encode_gif(frames)
    _, _, decoded = decode(data)
    error = np.abs(np.subtract(decoded, frames, dtype="int64"))
    assert len(decoded) == 12 and error.max() <= 24
    assert len(data) < 60_000


@pytest.mark.parametrize(
    "change, message",
    [
        ({"memory": np.zeros((7, 4))}, r"`memory` .*\(T, N, W\).*\(7, 4\)"),
        ({"weightings": {"read": np.zeros((5, 7))}}, "'memory': 12, 'read': 5"),
        (
            {"weightings": {"read": np.zeros((12, 5))}},
            "as many slots.*memory 7, {'read': 5}",
        ),
        ({"weightings": {"read": np.zeros(12)}}, r"heads, N\).*\(12,\)"),
        ({"most": 0}, "`most` must be at least 1.*most=0"),
    ],
)
def test_frames_that_do_not_fit_are_refused(sequence, change, message):
    memory, weightings = sequence
    arguments = {"memory": memory, "weightings": weightings, "title": ""}
    with pytest.raises(ValueError, match=message):
        visualization.sequence_frames(**arguments | change)


# ------------------------------------------------------------------- curves


WIDTH, HEIGHT = visualization.PLOT_WIDTH, visualization.PLOT_HEIGHT
LEFTMOST = visualization.LEFT + visualization.INSET
RIGHTMOST = visualization.LEFT + WIDTH - 1 - visualization.INSET
TOPMOST = visualization.TOP + visualization.INSET
LOWEST = visualization.TOP + HEIGHT - 1 - visualization.INSET
GRID = tuple(bytes.fromhex(visualization.GRID[1:]))


def draw(series, **options):
    return visualization.curves(series, "title", "x", "y", **options)


def inside(image):
    """What is within the frame."""
    rows = slice(visualization.TOP, visualization.TOP + HEIGHT)
    return image[rows, visualization.LEFT : visualization.LEFT + WIDTH]


def at(image, x, y):
    """The pixel where both axes run from 0 to 1."""
    row = round(LOWEST + y * (TOPMOST - LOWEST))
    return image[row, round(LEFTMOST + x * (RIGHTMOST - LEFTMOST))].tolist()


def tint(colour, strength):
    return np.round(255 - strength * (255 - colour)).astype(int).tolist()


def test_points_have_the_colour_of_their_series():
    x = np.array([0.0, 0.25, 1.0])
    series = {"up": (x, [0, 0.5, 1.0]), "down": (x, [0.9, 0.25, 0.125])}
    image = draw(series)
    for (_, y), colour in zip(series.values(), visualization.LINES):
        for point in zip(x, y):
            assert at(image, *point) == colour.tolist()


def test_lines_join_the_points_and_leave_the_rest_white():
    image = draw({"line": ([0, 1], [0, 1])})
    for share in (0.26, 0.55, 0.85):
        assert at(image, share, share) == visualization.LINES[0].tolist()
        assert at(image, share, share + 0.03) == WHITE
        assert at(image, share, share - 0.03) == WHITE


def test_a_line_is_smooth_at_its_edges():
    shades = inside(draw({"line": ([0, 1], [0, 1])}))
    assert len(np.unique(shades.reshape(-1, 3), axis=0)) > 8


@pytest.mark.parametrize("points", [2, 200])
def test_few_points_are_dots_and_many_are_not(points):
    x = np.linspace(0, 1, points)
    image = draw({"flat": (x, np.full(points, 1.0))})
    thick = is_colour(image, visualization.LINES[0])[:, RIGHTMOST].sum()
    assert (thick > 6) == (points == 2)


def test_runs_are_their_mean_in_a_band_from_lowest_to_highest():
    runs = np.repeat([[0.2], [0.3], [1.0]], 100, axis=1)
    image = draw({"runs": (np.linspace(0, 1, 100), runs)})
    colour = visualization.LINES[0]
    band = tint(colour, visualization.BAND)
    assert at(image, 0.33, 0.5) == colour.tolist()
    for y in (0.22, 0.27, 0.35, 0.63, 0.98):
        assert at(image, 0.33, y) == band
    for y in (0.05, 0.18):
        assert at(image, 0.33, y) == WHITE
    for y in (0.2, 0.3, 1.0):
        assert at(image, 0.33, y) not in (band, WHITE, colour.tolist())


def test_a_band_follows_the_runs_without_seams():
    x = np.linspace(0, 1, 500)
    image = draw({"runs": (x, [x * 0.5, x])})
    band = tint(visualization.LINES[0], visualization.BAND)
    assert at(image, 0.5, 0.33) == at(image, 0.9, 0.63) == band
    assert at(image, 0.5, 0.22) == at(image, 0.9, 0.96) == WHITE
    row = round(LOWEST + 0.45 * (TOPMOST - LOWEST))
    start, end = (
        round(LEFTMOST + s * (RIGHTMOST - LEFTMOST)) for s in (0.65, 0.78)
    )
    assert is_colour(image[row, start:end], band).all()


def test_one_run_has_no_band():
    x = np.linspace(0, 1, 100)
    one = draw({"run": (x, x[None])})
    np.testing.assert_array_equal(one, draw({"run": (x, x)}))
    band = tint(visualization.LINES[0], visualization.BAND)
    assert not is_colour(one[:, RIGHTMOST + 10 :], band).any()
    two = draw({"run": (x, [x, x * 0.5])})
    assert is_colour(two[:, RIGHTMOST + 10 :], band).any()  # in the legend


@pytest.mark.parametrize("hole", [np.nan, np.inf])
def test_a_hole_breaks_a_line(hole):
    y = np.full(101, 0.5)
    y[[0, 40, 41, 42, 60, 62]] = 1.0, hole, hole, hole, hole, hole
    image = draw({"broken": (np.linspace(0, 1, 101), y)})
    colour = visualization.LINES[0].tolist()
    for x in (0.2, 0.385, 0.435, 0.61, 0.9):
        assert at(image, x, 0.5) == colour
    assert at(image, 0.41, 0.5) in (WHITE, list(GRID))
    alone = round(LEFTMOST + 0.61 * (RIGHTMOST - LEFTMOST))
    middle = round((LOWEST + TOPMOST) / 2)
    dot = is_colour(image, colour)[middle - 3, alone - 6 : alone + 7]
    assert 1 <= dot.sum() <= 7


def test_the_mean_ends_with_the_first_run_that_ends():
    runs = np.repeat([[0.25], [1.0]], 100, axis=1)
    runs[1, 50:] = np.nan
    image = draw({"runs": (np.linspace(0, 1, 100), runs)})
    colour = visualization.LINES[0]
    assert at(image, 0.33, 0.625) == colour.tolist()
    assert at(image, 0.7, 0.625) == WHITE
    assert at(image, 0.7, 0.45) == WHITE  # no band
    assert at(image, 0.7, 0.25) != WHITE  # but the run that goes on
    assert at(image, 0.7, 1.0) == list(GRID)


def test_one_point_is_a_dot():
    image = inside(draw({"dot": ([7], [3])}))
    count = is_colour(image, visualization.LINES[0]).sum()
    assert 30 < count < 70


def test_runs_of_one_point_have_a_band():
    image = inside(draw({"dot": ([7], [[1], [5]])}))
    band = is_colour(image, tint(visualization.LINES[0], visualization.BAND))
    assert band.any(axis=1).sum() > 0.7 * 0.8 * HEIGHT


def test_nothing_but_holes_is_an_empty_plot():
    image = inside(draw({"none": ([1, 2], [np.nan, np.nan])}))
    assert set(map(tuple, image.reshape(-1, 3))) == {tuple(WHITE), GRID}


def test_y_begins_at_zero_or_below():
    flat = draw({"flat": ([0, 1], [4.0, 4.0])})
    assert at(flat, 0.47, 1.0) == visualization.LINES[0].tolist()
    assert at(flat, 0.47, 0.0) == list(GRID)
    below = draw({"low": ([0, 1], [-1.0, -1.0]), "high": ([0, 1], [3.0, 3.0])})
    assert at(below, 0.47, 0.0) == visualization.LINES[0].tolist()
    assert at(below, 0.47, 0.25) == list(GRID)  # zero
    assert at(below, 0.47, 1.0) == visualization.LINES[1].tolist()


def test_decades_are_equally_far_and_the_lowest_is_at_the_bottom():
    x = [0, 0.25, 0.5, 1]
    image = draw({"growth": (x, [1, 10, 100, 1000])}, log_y=True)
    colour = visualization.LINES[0].tolist()
    for place, share in zip(x, (0, 1 / 3, 2 / 3, 1)):
        assert at(image, place, share) == colour
        assert at(image, 0.03, share) in (list(GRID), colour)


def test_x_by_factors_is_as_wide_as_its_numbers():
    x = [20, 200, 2000]
    image = draw({"growth": (x, [1, 10, 100])}, log_x=True, log_y=True)
    colour = visualization.LINES[0].tolist()
    for share in (0, 0.25, 0.5, 1):
        assert at(image, share, share) == colour
    ticks = is_colour(inside(image), GRID)[3]
    assert ticks.sum() == 7  # 20, 50, 100, 200, 500, 1000, 2000
    wide = draw({"wide": ([1e-3, 1e7], [1, 2])}, log_x=True)
    assert 4 <= is_colour(inside(wide), GRID)[3].sum() <= 11


def test_one_x_by_factors_is_at_the_left():
    image = draw({"dot": ([7], [3])}, log_x=True)
    assert at(image, 0, 1) == visualization.LINES[0].tolist()


def test_zeros_lie_below_the_lowest_decade():
    x = [0, 0.25, 0.5, 1]
    image = draw({"fall": (x, [100, 10, 0, 0])}, log_y=True)
    colour = visualization.LINES[0].tolist()
    for place, share in zip(x, (1, 0.5, 0, 0)):
        assert at(image, place, share) == colour
    assert at(image, 0.75, 0) == colour
    none = inside(draw({"zeros": ([0, 1], [0, 0])}, log_y=True))
    assert is_colour(none, colour).any(axis=1).argmax() > HEIGHT - 20


def test_over_many_decades_zero_stays_clear_of_the_others():
    x = np.array([0.0, 0.5, 1.0])
    image = inside(draw({"fall": (x, [0, 1e-30, 1])}, log_y=True))
    rows = np.flatnonzero(is_colour(image, GRID)[:, WIDTH - 4])
    assert len(rows) >= 4 and np.diff(rows).min() > 24


def test_the_mean_is_that_of_the_numbers_on_a_logarithmic_axis():
    image = draw({"runs": ([0, 1], [[0.2, 0.2], [19.8, 19.8]])}, log_y=True)
    share = 1.0 - np.log10(19.8 / 10) / np.log10(19.8 / 0.1)
    assert at(image, 0.47, share) == visualization.LINES[0].tolist()


def test_holes_stay_holes_on_a_logarithmic_axis():
    y = [1, np.nan, 0, 10]
    image = draw({"hole": ([0, 0.25, 0.5, 1], y)}, log_y=True)
    colour = visualization.LINES[0].tolist()
    assert at(image, 0.5, 0) == at(image, 0, 0.5) == colour
    column = image[:, round(LEFTMOST + 0.25 * (RIGHTMOST - LEFTMOST))]
    assert not is_colour(column, colour).any()


def test_the_grid_is_at_round_numbers():
    y = np.full(2, 7.3)
    image = draw({"flat": ([3.0, 41.0], y)})
    column = is_colour(image, GRID)[:, LEFTMOST + 7]
    rows = [round(LOWEST + n / 7.3 * (TOPMOST - LOWEST)) for n in range(8)]
    np.testing.assert_array_equal(np.flatnonzero(column), rows[::-1])
    row = is_colour(inside(image), GRID)[HEIGHT // 2 + 5]
    columns = np.flatnonzero(row) + visualization.LEFT
    share = (np.arange(5, 41, 5) - 3) / 38
    expected = np.round(LEFTMOST + share * (RIGHTMOST - LEFTMOST))
    np.testing.assert_array_equal(columns, expected)


@pytest.mark.parametrize(
    "numbers, texts",
    [
        ([0, 0.1, 0.2, 0.1 * 3], "0 0.1 0.2 0.3"),
        ([-0.0, 2, 4], "0 2 4"),
        ([0, 500, 1500], "0 500 1,500"),
        ([0, 5000, 10000], "0 5k 10k"),
        ([0, 200000, 1200000], "0 0.2M 1.2M"),
        ([-2e9, 0], "-2G 0"),
        ([1e-5], "1e-5"),
        ([0.001], "0.001"),
    ],
)
def test_numbers_at_the_axes_are_short(numbers, texts):
    assert visualization._texts(np.asarray(numbers)) == texts.split()


def test_wide_numbers_move_the_plot_and_do_not_meet_the_label():
    image = draw({"tiny": ([0, 1], [0, 4e-4])})
    ink = (image.min(axis=-1) < 200)[visualization.TOP : LOWEST, :60]
    assert ink[:, :24].any() and not ink[:, 23:26].any()


def test_a_mark_is_a_dashed_line_and_data_stays_below_its_text():
    series = {"flat": ([0, 10], [1.0, 1.0])}
    plain = inside(draw(series))
    image = inside(draw(series, marks={"longest in training": 5.0}))
    middle = round(visualization.INSET + 0.5 * (WIDTH - 17))
    dark = image[:, middle].max(axis=-1) < 120
    assert 0.4 < dark.mean() < 0.7
    assert np.sum(np.diff(dark.astype(int)) == 1) > 30
    strip = image[: visualization.MARK_ROW]
    assert (strip[:, middle + 5 : middle + 60].min(axis=-1) < 150).any()
    colour = visualization.LINES[0]
    highest = is_colour(image, colour).any(axis=1).argmax()
    moved = highest - is_colour(plain, colour).any(axis=1).argmax()
    assert moved == visualization.MARK_ROW


def test_marks_beyond_the_data_widen_the_axis_and_their_text_stays_inside():
    series = {"flat": ([0, 5], [1.0, 1.0])}
    marks = {"a long text at the very end": 10.0, "start": 0.0}
    image = draw(series, marks=marks)
    colour = visualization.LINES[0]
    assert (
        is_colour(inside(image), colour).any(axis=0)[WIDTH // 2 + 8 :].sum()
        == 0
    )
    rows = slice(
        visualization.TOP + visualization.MARK_ROW,
        visualization.TOP + 2 * visualization.MARK_ROW,
    )
    ink = (image[rows].min(axis=-1) < 150)[:, RIGHTMOST - 150 : RIGHTMOST - 4]
    assert ink.any(axis=0).sum() > 70


def test_the_legend_is_beside_the_plot_in_order():
    names = ["one", "two", "three"]
    x = np.linspace(0, 1, 100)
    image = draw({name: (x, x * 0) for name in names})
    legend = image[:, visualization.LEFT + WIDTH + 2 :]
    rows = [
        np.flatnonzero(is_colour(legend, colour).any(axis=1)).mean()
        for colour in visualization.LINES[:3]
    ]
    np.testing.assert_array_equal(np.diff(rows), [20, 20])
    assert not is_colour(legend, visualization.LINES[3]).any()
    longer = draw({name * 9: (x, x * 0) for name in names})
    assert longer.shape[1] > image.shape[1] + 100
    assert is_colour(longer[:, -4:], WHITE).all()


def test_a_legend_may_be_higher_than_the_plot():
    series = {str(n): ([0, 1], [0, n]) for n in range(8)}
    image = draw(series, size=(120, 96))
    legend = image[:, visualization.LEFT + 120 + 2 :]
    for colour in visualization.LINES:
        assert is_colour(legend, colour).any()


def test_the_size_is_that_of_the_plot():
    small = draw({"a": ([0, 1], [0, 1])}, size=(300, 200))
    large = draw({"a": ([0, 1], [0, 1])}, size=(400, 250))
    assert np.subtract(large.shape, small.shape).tolist() == [50, 100, 0]


def as_seen(colours, matrix):
    """CIE Lab colours, after a simulated loss of cones (Machado et al.)."""
    seen = np.clip((colours / 255.0) ** 2.2 @ np.transpose(matrix), 0, 1)
    to_xyz = [
        [0.434, 0.376, 0.190],
        [0.213, 0.715, 0.072],
        [0.018, 0.109, 0.873],
    ]
    x, y, z = np.cbrt(seen @ np.transpose(to_xyz)).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@pytest.mark.parametrize(
    "matrix",
    [
        np.eye(3),
        [
            [0.152, 1.053, -0.205],
            [0.115, 0.786, 0.099],
            [-0.004, -0.048, 1.052],
        ],
        [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        [
            [1.256, -0.077, -0.179],
            [-0.078, 0.931, 0.148],
            [0.005, 0.691, 0.304],
        ],
    ],
    ids=["all", "no red", "no green", "no blue"],
)
def test_series_are_told_apart_by_every_eye(matrix):
    seen = as_seen(visualization.LINES, matrix)
    apart = np.linalg.norm(seen[:, None] - seen, axis=-1)
    assert apart[np.triu_indices(len(seen), 1)].min() > 15
    assert seen[:, 0].max() < 80  # and stand out from white


@pytest.mark.parametrize(
    "series, options, message",
    [
        ({}, {}, "1 to 8 lines.*0 lines"),
        ({str(n): ([0], [0]) for n in range(9)}, {}, "1 to 8 lines.*9 lines"),
        ({"a": ([0, 1], [0, 1, 2])}, {}, r"\['a'\]` .*x \(2,\), y \(1, 3\)"),
        ({"a": ([[0, 1]], [0, 1])}, {}, r"\['a'\]\[0\]`.*\(P,\).*\(1, 2\)"),
        (
            {"a": ([0, 1], np.zeros((2, 3, 5)))},
            {},
            r"\['a'\]\[1\]` .*\(S, P\) or \(P,\).*\(2, 3, 5\)",
        ),
        ({"a": ([], [])}, {}, "no empty axis"),
        ({"a": ([0, 2, 2], [0, 1, 2])}, {}, r"increase.*\[0. 2. 2.\]"),
        ({"a": ([0, np.nan], [0, 1])}, {}, "finite and increase.*nan"),
        ({"a": ([0, 1], [3, -2])}, {"log_y": True}, "logarithm.*-2.0"),
        ({"a": ([0, 1], [3, 2])}, {"log_x": True}, "logarithm.*x of 0.0"),
        ({"a": ([0], [0])}, {"marks": {"m": np.inf}}, "finite.*{'m': inf}"),
        ({"a": ([0], [0])}, {"size": (640, 50)}, r"96 .*\(640, 50\), 0 marks"),
        (
            {"a": ([0], [0])},
            {"size": (640, 100), "marks": {"m": 0}},
            r"96 .*\(640, 100\), 1 marks",
        ),
    ],
)
def test_curves_that_cannot_be_drawn_are_refused(series, options, message):
    with pytest.raises(ValueError, match=message):
        draw(series, **options)


# ------------------------------------------------------------------ entropy


@pytest.mark.parametrize(
    "weighting, bits",
    [
        (np.full(8, 1 / 8), 3.0),
        ([0, 1, 0], 0.0),
        ([0, 0, 0], 0.0),
        ([0.5, 0.25, 0.25], 1.5),
        ([0.25, 0.25, 0], 1.0),  # sums to a half, taken as it stands
    ],
)
def test_entropy_is_in_bits(weighting, bits):
    result = visualization.entropy(weighting)
    assert result == bits and not np.signbit(result)


def test_entropy_takes_the_last_axis():
    weighting = np.random.default_rng(0).dirichlet(np.ones(7), (3, 5))
    result = visualization.entropy(weighting)
    assert result.shape == (3, 5)
    expected = [[-sum(w * np.log2(w)) for w in row] for row in weighting]
    np.testing.assert_allclose(result, expected, rtol=1e-12)


def test_a_weighting_may_be_below_0_by_rounding():
    result = visualization.entropy([[1.0, -1e-7]])
    np.testing.assert_array_equal(result, [0.0])


def test_entropy_of_nan_is_nan():
    result = visualization.entropy([[np.nan, 0.5], [0.5, 0.5]])
    np.testing.assert_array_equal(result, [np.nan, 1.0])


@pytest.mark.parametrize(
    "weighting, message",
    [
        (0.5, r"\(..., N\).*shape \(\)"),
        (np.zeros((3, 0)), r"shape \(3, 0\)"),
        ([0.5, -0.25], "not be negative.*-0.25"),
    ],
)
def test_what_is_no_weighting_has_no_entropy(weighting, message):
    with pytest.raises(ValueError, match=message):
        visualization.entropy(weighting)


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


# ------------------------------------------------------------------ sphere


def a_map(channels=6):
    """90 x 180, all at 2 m but for what is ahead, at 4 m and red."""
    mean = np.zeros((90, 180, channels))
    mean[..., 2] = 2.0
    mean[40:50, 85:95, 2] = 4.0
    mean[40:50, 85:95, 3:4] = 1.0
    return mean


def test_a_sphere_is_drawn_ahead_in_the_middle():
    mean = a_map()
    image = visualization.sphere(mean, np.ones_like(mean))
    red = np.argwhere(is_colour(image, [255, 0, 0]))
    scale = round(visualization.PLOT_WIDTH / 180)
    assert len(red) == (10 * scale) ** 2
    middle = visualization.LEFT + 90 * scale
    assert abs(red[:, 1].mean() - middle) < scale
    assert abs(red[:, 0].mean() - visualization.TOP - 45 * scale) < scale
    yellow = is_colour(image[:, : visualization.LEFT + 180 * scale], HOT)
    assert yellow.sum() == (10 * scale) ** 2  # of depth, below
    assert np.argwhere(yellow)[:, 0].min() > red[:, 0].max()


def test_a_sphere_of_fewer_features_and_without_variance():
    grey = visualization.sphere(a_map(4))
    assert is_colour(grey, [255, 255, 255]).any()
    assert is_colour(grey, HOT).any()
    only_depth = visualization.sphere(a_map(6)[..., :3], farthest=4.0)
    assert len(only_depth) < len(grey)
    three = visualization.sphere(a_map(), a_map() + 1)
    assert len(three) > len(visualization.sphere(a_map()))


def test_no_map_is_refused():
    for mean, variance in (
        (np.zeros((4, 8)), None),
        (np.zeros((4, 8, 2)), None),
        (np.zeros((4, 8, 3)), np.zeros((4, 8, 4))),
    ):
        with pytest.raises(ValueError, match="must.*Received: shape"):
            visualization.sphere(mean, variance)
