"""Figures are checked in Matplotlib: their arrays, labels and limits."""

import io
import warnings

import keras
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import keras_memory
from keras_memory import visualization
from keras_memory.addressing import dense_linkage
from keras_memory.addressing import entropy
from keras_memory.inspection.explanations import Explanation
from keras_memory.visualization.images import Redrawn

RNG = np.random.default_rng(3)


def one_hot(places, count):
    return np.eye(count)[np.asarray(places)]


def titles(figure):
    every = [ax.get_title(loc="left") for ax in figure.axes]
    return [title for title in every if title]


def axes(figure, title):
    (found,) = (ax for ax in figure.axes if ax.get_title(loc="left") == title)
    return found


def arrays(ax):
    return [image.get_array() for image in ax.images]


def texts(labels):
    return [label.get_text() for label in labels if label.get_text()]


def check_alike(image, other):
    """Equal except for ticks: after a partial redraw, frames lie over them."""
    assert (image != other).any(axis=2).mean() < 0.002


@pytest.fixture
def trace():
    """A trace of two sequences of 11 steps: 13 slots of 3, two read heads."""
    written = one_hot([0, 1, 2, 3, 4] + [5] * 6, 13)[:, None]
    read = one_hot([7] * 6 + [0, 1, 2, 3, 4], 13)[:, None].repeat(2, axis=1)
    memory = np.cumsum(written[:, 0, :, None] * [1.0, -1.0, 0.5], axis=0)
    gate = np.linspace(0, 1, 22).reshape(11, 2)
    parts = {
        "output": RNG.uniform(size=(11, 5)),
        "memory": memory,
        "read_weighting": read,
        "write_weighting": written,
        "write_gate": gate[:, :1],
        "free_gate": gate,
        "read_mode": RNG.uniform(size=(11, 2, 3)),
        "interpolation_gate": RNG.uniform(size=(11, 3)),
    }
    return {name: np.stack([one, 0 * one]) for name, one in parts.items()}


# Figures, images and files.


def test_a_figure_renders_in_a_notebook_and_as_an_array():
    figure = visualization.plot_weighting(one_hot([2, 3], 5))
    image = visualization.to_image(figure)
    assert image.dtype == np.uint8
    height, width, channels = image.shape
    assert (width, channels) == (640, 3)
    assert height == round(figure.get_figheight() * 100)
    with Image.open(io.BytesIO(figure._repr_png_())) as png:
        np.testing.assert_array_equal(np.asarray(png), image)


def test_the_image_of_a_subfigure_is_that_of_its_figure():
    part = Figure((2, 3), dpi=50).subfigures(2)[0]
    ax = part.subplots()
    assert visualization.plot_weighting(one_hot([2], 5), [ax]) is part
    assert visualization.to_image(part).shape == (150, 100, 3)


def test_a_figure_of_a_user_keeps_its_canvas():
    figure = Figure((2, 3), dpi=50)
    before = figure.canvas
    ax = figure.subplots()
    assert visualization.plot_weighting(one_hot([2], 5), ax) is figure
    assert visualization.to_image(figure).shape == (150, 100, 3)
    assert figure.canvas is before


def test_a_png_is_lossless_and_names_its_software():
    image = RNG.integers(0, 256, (7, 11, 3), "uint8")
    with Image.open(io.BytesIO(visualization.to_png(image, "mine"))) as png:
        np.testing.assert_array_equal(np.asarray(png), image)
        assert png.info["Software"] == "mine"
    for wrong in (image[0], image / 255, image[..., :2]):
        with pytest.raises(ValueError, match="must be .H, W, 3. uint8. Rec"):
            visualization.to_png(wrong)


def test_a_gif_has_every_frame_and_repeats():
    ramp = np.arange(256, dtype="uint8").repeat(8).reshape(32, 64)
    frames = [np.stack([ramp, ramp * 0 + i, ramp], -1) for i in (0, 90, 180)]
    with Image.open(io.BytesIO(visualization.to_gif(frames, 70))) as gif:
        assert (gif.n_frames, gif.info["loop"]) == (3, 0)
        for number, frame in enumerate(frames):
            gif.seek(number)
            assert gif.info["duration"] == 70
            shown = np.asarray(gif.convert("RGB")).astype(int)
            assert np.abs(shown - frame).mean() < 8


@pytest.mark.parametrize(
    "shapes, milliseconds, message",
    [
        ([], 100, "`images` must be a list of at least one.*Received: 0"),
        ([(2, 3, 3), (3, 3, 3)], 100, r"\(2, 3, 3\), \(3, 3, 3\)"),
        ([(2, 3, 3)], 9, "`milliseconds` must be at least 10.*Received"),
    ],
)
def test_gifs_of_wrong_frames_or_durations_are_refused(
    shapes, milliseconds, message
):
    images = [np.zeros(shape, "uint8") for shape in shapes]
    with pytest.raises(ValueError, match=message):
        visualization.to_gif(images, milliseconds)


# Weightings and slots.


@pytest.mark.parametrize("heads", [None, 1, 3])
def test_a_weighting_is_drawn_as_the_array_of_its_image(heads):
    weighting = RNG.uniform(0.5, 1, size=(11, heads or 1, 7))
    given = weighting if heads else weighting[:, 0]
    figure = visualization.plot_weighting(given, slots="all")
    drawn = [ax for ax in figure.axes if ax.images and ax.get_ylabel()]
    assert len(drawn) == (heads or 1)
    for head, ax in enumerate(drawn):
        (array,) = arrays(ax)
        np.testing.assert_array_equal(array, weighting[:, head].T)
        assert ax.images[0].get_clim() == (0, 1)
        assert ax.get_ylim() == (6.5, -0.5) and ax.get_xlim() == (-0.5, 10.5)
        assert ax.get_ylabel() == "slot"
    assert drawn[-1].get_xlabel() == "time step"
    assert not drawn[0].get_xlabel() or len(drawn) == 1


def test_small_weights_get_a_narrower_color_scale():
    for largest, end in ((0.25, 0.25), (0.5, 1.0), (0.0, 1.0)):
        weighting = np.full((3, 5), largest)
        for slots, high in (("used", end), ([1, 2], end), ("all", 1.0)):
            figure = visualization.plot_weighting(weighting, slots=slots)
            assert figure.axes[0].images[0].get_clim() == (0, high)


@pytest.mark.parametrize(
    "used, slots, shown",
    [
        ([5, 6, 7], "used", range(4, 9)),
        ([29, 30, 0, 1], "used", [28, 29, 30, 0, 1, 2]),
        ([0], "used", [30, 0, 1]),
        ([0, 8, 16, 24], "used", range(31)),
        ([5, 6, 7], "all", range(31)),
        ([5], [7, 3], [7, 3]),
    ],
)
def test_only_used_slots_are_shown_and_the_label_counts_them(
    used, slots, shown
):
    weighting = one_hot(used, 31).clip(0.01)
    ax = visualization.plot_weighting(weighting, slots=slots).axes[0]
    np.testing.assert_array_equal(arrays(ax)[0], weighting[:, list(shown)].T)
    whole = len(shown) == 31
    label = "slot" if whole else f"slot ({len(shown)} of 31)"
    assert ax.get_ylabel() == label
    for place, number in zip(ax.get_yticks(), texts(ax.get_yticklabels())):
        assert str(list(shown)[int(place)]) == number


@pytest.mark.parametrize("function", ["weighting", "linkage", "memory", "task"])
def test_used_slots_are_found_beside_nan(function):
    values = np.zeros((1, 3, 1, 31))
    values[..., 7], values[0, 1, 0, 7] = 0.5, np.nan
    if function == "linkage":
        values = values[0] * np.eye(31)
    elif function == "memory":
        values = values[0].swapaxes(1, 2)
    elif function == "weighting":
        values = values[0]
    else:
        values = {"read_weighting": values}
    draw = getattr(visualization, f"plot_{function}")
    label = draw(values).axes[0].get_ylabel()
    assert label == "slot (3 of 31)"
    values = np.full((2, 31), np.nan)
    assert visualization.plot_weighting(values).axes[0].get_ylabel() == "slot"


def test_every_slot_tick_has_the_label_of_its_slot():
    slots = list(range(1, 19, 2))
    ax = visualization.plot_weighting(one_hot([1], 31), slots=slots).axes[0]
    assert len(texts(ax.get_yticklabels())) > 2
    for place, number in zip(ax.get_yticks(), texts(ax.get_yticklabels())):
        assert str(slots[int(place)]) == number


@pytest.mark.parametrize(
    "heads, shown", [(1, ["hello"]), (2, ["hello, head 0", "head 1"])]
)
def test_a_title_is_put_over_axes_of_a_user(heads, shown):
    mine = Figure().subplots(heads)
    weighting = RNG.uniform(size=(3, heads, 5))
    figure = visualization.plot_weighting(weighting, mine, title="hello")
    assert titles(figure) == shown


def test_missing_slots_are_refused():
    for slots in ([31], [-1], [0.5], "some", []):
        with pytest.raises(ValueError, match="`slots` must be.*Received"):
            visualization.plot_weighting(one_hot([1], 31), slots=slots)


def test_plots_are_drawn_into_axes_of_a_user():
    mine = Figure().subplots(2)
    weighting = RNG.uniform(size=(11, 2, 7))
    visualization.plot_weighting(weighting, mine, names=["one", "other"])
    assert titles(mine[0].figure) == ["one", "other"]
    with pytest.raises(
        ValueError, match="`ax` must be a list of 2.*Received: 1"
    ):
        visualization.plot_weighting(weighting, mine[0])
    with pytest.raises(
        ValueError, match="`names` must be a list of 2.*Received: 3"
    ):
        visualization.plot_weighting(weighting, names=list("abc"))


# Memory, links and gates.


def test_memory_is_shown_at_some_steps_on_one_symmetric_scale():
    memory = RNG.normal(size=(11, 7, 5))
    memory[3, 2, 1], memory[4, 0, 0] = -9.0, np.nan
    figure = visualization.plot_memory(memory, frames=3)
    ax = axes(figure, "memory")
    for array, step in zip(arrays(ax), (0, 5, 10), strict=True):
        np.testing.assert_array_equal(array, memory[step])
    assert {image.get_clim() for image in ax.images} == {(-9, 9)}
    assert texts(ax.get_xticklabels()) == ["0", "5", "10"]
    assert ax.get_xlabel() == "contents after step"
    single = visualization.plot_memory(memory, frames=1)
    np.testing.assert_array_equal(arrays(single.axes[0])[0], memory[10])


def test_only_slots_with_changing_content_are_shown():
    memory = np.full((3, 31, 5), 0.5)
    memory[2, 7] = 2.0
    ax = visualization.plot_memory(memory).axes[0]
    assert ax.get_ylabel() == "slot (3 of 31)"
    assert texts(ax.get_yticklabels()) == ["6", "7", "8"]


def test_nan_has_a_color_that_no_number_has():
    memory = np.zeros((1, 3, 3))
    memory[0, 1, 1] = np.nan
    ax = visualization.plot_memory(memory, slots="all").axes[0]
    bad = ax.images[0].get_cmap().get_bad()
    numbers = matplotlib.colormaps["RdBu_r"](np.linspace(0, 1, 255))
    assert np.abs(numbers - bad).max(axis=1).min() > 0.2


def test_links_are_cropped_in_rows_and_columns():
    linkage = np.zeros((3, 31, 31))
    linkage[2, 7, 6] = 1.0
    figure = visualization.plot_linkage(linkage)
    (ax,) = (ax for ax in figure.axes if len(ax.images) == 3)
    np.testing.assert_array_equal(arrays(ax)[2], linkage[2, 5:9, 5:9])
    assert ax.get_ylabel() == "slot (4 of 31)"


def test_sparse_links_are_put_back_in_their_columns():
    linkage = np.array([[0.5, 0.25], [0.0, 1.0], [0.125, 0.0]])
    columns = np.array([[2, 1], [0, 2], [1, 0]], "float32")
    expected = [[0, 0.25, 0.5], [0, 0, 1], [0, 0.125, 0]]
    dense = dense_linkage([[linkage]], [[columns]])
    np.testing.assert_array_equal(dense, [[expected]])
    for wrong in (columns[:, :1], columns[0]):
        with pytest.raises(ValueError, match="`linkage` and `columns`.*Rec"):
            dense_linkage(linkage, wrong)


def test_gates_and_modes_are_rows_named_by_head(trace):
    one = {name: values[0] for name, values in trace.items()}
    ax = axes(visualization.plot_gates(one), "gates")
    rows = dict(zip(texts(ax.get_yticklabels()), arrays(ax)[0]))
    assert list(rows)[:3] == ["write 0", "free 0", "free 1"]
    np.testing.assert_array_equal(rows["free 1"], one["free_gate"][:, 1])
    forward = one["read_mode"][:, 1, 2]
    np.testing.assert_array_equal(rows["read 1 forward"], forward)
    writes = one["interpolation_gate"][:, 2]
    np.testing.assert_array_equal(rows["interpolation, write 0"], writes)
    assert ax.images[0].get_clim() == (0, 1)
    with pytest.raises(ValueError, match="`gates` must have a gate"):
        visualization.plot_gates({})


def test_each_write_head_has_a_panel_of_links():
    linkage = RNG.uniform(size=(3, 2, 5, 5))
    figure = visualization.plot_linkage(linkage, frames=3)
    for head in (0, 1):
        ax = axes(figure, f"links {head}: row written right after column")
        for array, step in zip(arrays(ax), range(3), strict=True):
            np.testing.assert_array_equal(array, linkage[step, head])


def test_infinities_of_a_memory_have_the_color_of_nan():
    memory = RNG.uniform(-3, 3, size=(1, 2, 3))
    memory[0, 1] = np.inf, -np.inf, 1.7e308
    figure = visualization.plot_memory(memory, slots="all")
    (array,) = arrays(figure.axes[0])
    np.testing.assert_array_equal(array.mask, [[False] * 3, [True] * 3])
    visualization.to_image(figure)
    weighting = [[0.25, np.nan], [0.25, 0.25]]
    (array,) = arrays(visualization.plot_weighting(weighting).axes[0])
    np.testing.assert_array_equal(array.mask, [[False, False], [True, False]])
    rounded = np.array([[1.004, -0.004]])  # rounded as in 16 bits
    visualization.plot_weighting(rounded)


# A whole sequence.


def test_a_task_has_everything_on_one_time_axis(trace):
    inputs, targets = RNG.uniform(size=(2, 2, 11, 5))
    counts = np.ones((2, 11)) * (np.arange(11) > 5)
    figure = visualization.plot_task(
        trace, inputs, targets, mask=counts, title="after 7 steps"
    )
    shown = titles(figure)
    assert shown[0] == "input" and shown[1].startswith("target (gray")
    assert shown[2:4] == ["output", "|target - output|"]
    assert shown[4:] == ["gates", "write 0", "read 0", "read 1", "memory"]
    assert "after 7 steps" in texts(figure.texts)
    np.testing.assert_array_equal(
        arrays(axes(figure, "|target - output|"))[0],
        np.abs(targets[0] - trace["output"][0]).T,
    )
    limits = {axes(figure, title).get_xlim() for title in shown[:-1]}
    assert limits == {(-0.5, 10.5)}
    for title, grayed in (("input", []), ("output", [(-0.5, 5.5)])):
        bounds = [p.get_extents() for p in axes(figure, title).patches]
        back = axes(figure, title).transData.inverted()
        ends = [tuple(back.transform(b)[:, 0].round(6)) for b in bounds]
        assert ends == grayed
    labels = {axes(figure, t).get_ylabel() for t in shown[5:]}
    assert labels == {"slot (10 of 13)"}  # 0 to 7 and their neighbours


def test_a_chosen_row_of_the_batch_is_drawn(trace):
    figure = visualization.plot_task(trace, row=1)
    assert not arrays(axes(figure, "output"))[0].any()
    for row in (2, -1, 0.5):
        with pytest.raises(ValueError, match="`row` must be.*Received"):
            visualization.plot_task(trace, row=row)


def test_a_figure_is_redrawn_with_other_numbers_of_the_same_shapes(trace):
    """A redraw is faster, which matters during training."""
    other = {name: values[::-1] / 2 for name, values in trace.items()}
    mask = np.ones((2, 11)) * (np.arange(11) > 5)
    options = {"slots": "all", "mask": mask, "memory": False}
    figure = visualization.plot_task(trace, title="one", **options)
    redrawn = Redrawn(figure)
    for parts, title in ((other, "other"), (trace, "one")):
        options["row"] = int(parts is other)
        again = {"title": title, "figure": figure, **options}
        assert visualization.plot_task(parts, **again) is figure
        expected = visualization.plot_task(parts, title=title, **options)
        for ax, same in zip(figure.axes, expected.axes, strict=True):
            for one, array in zip(arrays(ax), arrays(same), strict=True):
                np.testing.assert_array_equal(one, array)
        check_alike(redrawn.image(), visualization.to_image(figure))
    more = {**trace, "output": 3 * trace["output"]}  # needs another color scale
    options["figure"] = figure
    assert visualization.plot_task(more, **options) is not figure


@pytest.mark.parametrize(
    "change",
    [
        {"mask": np.ones((2, 11)) * (np.arange(11) > 3)},
        {"mask": None},
        {"slots": list(range(13))[::-1]},
        {"width": 5.0},
        {"names": "write_gate"},
        {"cleared": True},
    ],
)
def test_a_figure_is_reused_only_if_all_else_is_the_same(trace, change):
    mask, change = np.ones((2, 11)) * (np.arange(11) > 5), {**change}
    options = {"slots": [*range(13)], "mask": mask, "targets": trace["output"]}
    figure = visualization.plot_task(trace, **options)
    assert visualization.plot_task(trace, **options, figure=figure) is figure
    if "names" in change:
        trace["some_gate"] = trace.pop(change.pop("names"))
    if change.pop("cleared", False):
        figure.clear()
    options |= change
    again = visualization.plot_task(trace, **options, figure=figure)
    assert again is not figure and len(again.axes) == 8


def test_a_figure_that_cannot_be_drawn_is_unchanged(trace):
    figure = visualization.plot_task(trace)
    before, artist = figure.canvas, figure.axes[0].images[0]
    figure.axes[0].set_xlabel("$\\wrong$")
    with pytest.raises(ValueError):
        Redrawn(figure)
    assert figure.canvas is before and not artist.get_animated()


def test_targets_and_outputs_have_one_scale():
    targets, outputs = np.full((1, 3, 2), 1.5), np.full((1, 3, 2), -2.0)
    figure = visualization.plot_task({}, None, targets, outputs)
    limits = [axes(figure, t).images[0].get_clim() for t in titles(figure)]
    assert limits == [(-2, 2), (-2, 2), (0, 3.5)]


def test_heads_on_several_axes_are_named_by_their_indices():
    weighting = RNG.uniform(size=(1, 3, 2, 1, 2, 5))
    figure = visualization.plot_task({"read_weighting": weighting})
    shown = ["read 0, 0, 0", "read 0, 0, 1", "read 1, 0, 0", "read 1, 0, 1"]
    assert titles(figure) == shown
    (array,) = arrays(axes(figure, "read 1, 0, 0"))
    np.testing.assert_array_equal(array, weighting[0, :, 1, 0, 0].T)


def test_blocks_are_named_and_memory_can_be_left_out(trace):
    blocks = {f"block{b}/{name}": trace[name] for b in "01" for name in trace}
    figure = visualization.plot_task(blocks, trace["output"], memory=False)
    shown = titles(figure)
    assert shown[:3] == ["input", "block0: gates", "block0: write 0"]
    assert shown[-1] == "block1: read 1"
    figure = visualization.plot_task({}, trace["output"], trace["output"])
    assert titles(figure) == ["input", "target"]


def test_color_scales_cover_all_numbers(trace):
    inputs = RNG.normal(size=(2, 11, 5))
    targets = 4.0 * trace["output"]
    figure = visualization.plot_task({}, inputs, targets)
    low, high = axes(figure, "input").images[0].get_clim()
    assert -low == high == np.abs(inputs[0]).max()
    clim = axes(figure, "target").images[0].get_clim()
    assert clim == (0, max(1, targets[0].max()))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"inputs": np.ones((2, 7, 3))}, "T=11|T=7"),
        ({"targets": np.ones((2, 11, 3))}, "units=3"),
        ({"targets": np.ones((3, 11, 5))}, "B="),
        ({"mask": np.ones((2, 7))}, "T=11|T=7"),
        ({"inputs": "text"}, "`inputs` must be an array"),
        ({"inputs": np.ones((2, 11, 0))}, "no empty axis"),
        ({"trace": {}}, "`trace` must have outputs.*alone. Rec"),
    ],
)
def test_sequences_of_wrong_shape_are_refused(trace, arguments, message):
    with pytest.raises(ValueError, match=message):
        visualization.plot_task(**{"trace": trace, **arguments})


# Curves.


def test_several_runs_are_drawn_as_their_mean_in_a_band():
    y = np.array([[1.0, 3.0, np.nan], [3.0, 5.0, 2.0]])
    series = {"ntm": ([1, 2, 5], y), "lstm": ([1, 4], [7, 8])}
    ax = visualization.plot_curves(series, marks={"here": 3}, goal=2).axes[0]
    handles, labels = ax.get_legend_handles_labels()
    assert labels == ["ntm", "lstm", "goal: 2"]
    np.testing.assert_array_equal(handles[0].get_ydata(), [2, 4, np.nan])
    np.testing.assert_array_equal(handles[1].get_xdata(), [1, 4])
    assert handles[0].get_color() != handles[1].get_color()
    assert handles[0].get_linestyle() != handles[1].get_linestyle()
    assert len(ax.collections) == 1  # a band only for several runs
    band = ax.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(1, 1), (1, 3), (2, 5)}
    assert texts(ax.texts) == [" here"] and ax.get_ylim()[0] == 0


def test_zeros_are_at_the_bottom_of_a_log_scale():
    series = {"one": ([1, 10, 100], [100.0, 0.01, 0.0])}
    ax = visualization.plot_curves(series, log_y=True, log_x=True).axes[0]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "symlog")
    heights = ax.transData.transform([[1, y] for y in (0, 0.01, 1, 100)])[:, 1]
    assert np.all(np.diff(heights) > 10) and ax.get_ylim()[0] == 0


@pytest.mark.parametrize(
    "series, options, message",
    [
        ({}, {}, "0 lines"),
        ({f"{i}": ([1], [1]) for i in range(9)}, {}, "9 lines"),
        ({"one": ([1, 2], [1, 2, 3])}, {}, r"`series\['one'\]`.*P=2"),
        ({"one": ([2, 1], [1, 2])}, {}, "increases.*Received"),
        ({"one": ([1, 2], [-1, 2])}, {"log_y": True}, "logarithmic"),
        ({"one": ([0, 2], [1, 2])}, {"log_x": True}, "logarithmic"),
    ],
)
def test_wrong_curves_are_refused(series, options, message):
    with pytest.raises(ValueError, match=message):
        visualization.plot_curves(series, **options)


@pytest.mark.parametrize("goal", [None, 20.0])
def test_positive_numbers_fill_a_log_scale(goal):
    series = {"one": ([1, 2, 3], [100.0, np.nan, 1000.0])}
    ax = visualization.plot_curves(series, log_y=True, goal=goal).axes[0]
    assert ax.get_yscale() == "log"
    low, high = ax.transAxes.inverted().transform(
        ax.transData.transform([(1, goal or 100), (1, 1000)])
    )[:, 1]
    assert 0.03 < low < 0.2 and 0.8 < high < 0.97


def rows(steps, longest=20):
    return [
        {"step": s, "loss": 1 / s, "wrong": 10 / s, "longest": longest}
        for s in steps
    ]


def test_learning_shows_curriculum_and_goal_and_extends_ended_runs():
    run = rows([10, 20], 5) + rows([30, 40])
    figure = visualization.plot_learning(
        {"seeds": [run, rows([10, 20])]}, goals={"wrong": 0.5}
    )
    loss, wrong = figure.axes
    assert (loss.get_ylabel(), wrong.get_ylabel()) == ("loss", "wrong")
    assert wrong.get_xlabel() == "step" and texts(loss.texts) == [" up to 20"]
    handles, labels = wrong.get_legend_handles_labels()
    assert labels == ["seeds", "goal: 0.5"]
    np.testing.assert_array_equal(handles[0].get_xdata(), [10, 20, 30, 40])
    level = [(10 / step + 0.5) / 2 for step in (30, 40)]
    np.testing.assert_allclose(handles[0].get_ydata()[2:], level)


def test_the_mean_is_missing_until_every_run_has_started():
    runs = [rows([90, 95]), rows([10, 20, 90, 100])]
    ax = visualization.plot_learning({"one": runs}, names=["loss"]).axes[0]
    (line, *_), _ = ax.get_legend_handles_labels()
    assert line.get_xdata().tolist() == [10, 20, 90, 100]
    assert np.isnan(line.get_ydata()).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    "longest, marks",
    [
        ([5, 9, 7, 9, 12], [" up to 9", " up to 12"]),
        ([1, 1_000_001, 1_000_002], [" up to 1000001", " up to 1000002"]),
    ],
)
def test_marks_show_where_a_curriculum_grows(longest, marks):
    run = [{"step": s, "loss": 1, "longest": n} for s, n in enumerate(longest)]
    figure = visualization.plot_learning({"one": run})
    assert texts(figure.axes[0].texts) == marks


@pytest.mark.parametrize("count", [1, 2])
def test_validation_at_unknown_epochs_is_left_out(count):
    history = {"loss": [3, 2, 1], "val_loss": [1, 2][:count]}
    assert len(visualization.plot_learning({"one": history}).axes) == 1
    with pytest.raises(ValueError, match="`runs`.*without .'val_loss'"):
        visualization.plot_learning({"one": history}, names=["val_loss"])


def test_curves_of_large_numbers_are_drawn():
    visualization.plot_curves({"one": ([1e17], [1.0])})


def test_learning_accepts_keras_histories():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    x = np.ones((4, 3), "float32")
    history = model.fit(x, x[:, :1], epochs=3, verbose=0)
    for run in (history, history.history):
        figure = visualization.plot_learning({"one": run}, names=["mae"])
        (ax,) = figure.axes
        line = ax.get_legend_handles_labels()[0][0]
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
        np.testing.assert_allclose(line.get_ydata(), history.history["mae"])
    with pytest.raises(ValueError, match="`runs`.*without .'other'"):
        visualization.plot_learning({"one": history}, names=["other"])
    with pytest.raises(ValueError, match="at least one run"):
        visualization.plot_learning({})


def points(ax, label):
    lines = dict(zip(*reversed(ax.get_legend_handles_labels())))
    return np.transpose(lines[label].get_data()).tolist()


def test_learning_shows_only_the_available_metrics():
    """Includes validation at every second epoch, and rows of other metrics."""
    history = {"loss": [6, 5, 4, 3, 2, 1], "val_loss": [5, 3, 1]}
    more = [{"loss": 2.0, "val_loss": None}, {"loss": 1.0, "longest": 5}]
    more += [{"loss": 1.0, "val_loss": 7, "longest": 9}]
    figure = visualization.plot_learning({"one": history, "more": more})
    loss, validation = figure.axes
    assert points(loss, "more") == [[1, 2], [2, 1], [3, 1]]
    assert points(validation, "one") == [[2, 5], [4, 3], [6, 1]]
    assert points(validation, "more") == [[3, 7]]
    assert texts(loss.texts) == [" up to 9"]
    ticks = loss.get_xticks()
    np.testing.assert_array_equal(ticks, ticks.round())


def test_validation_at_every_second_epoch_is_put_at_its_epochs():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((4, 3), "float32")
    options = {"validation_data": (x, x[:, :1]), "validation_freq": 2}
    history = model.fit(x, x[:, :1], epochs=4, verbose=0, **options)
    figure = visualization.plot_learning({"one": history, "two": history})
    assert [x for x, _ in points(figure.axes[1], "one")] == [2, 4]


# Maps.


@pytest.fixture
def sphere():
    mean = RNG.uniform(0.2, 0.8, size=(5, 10, 6))
    mean[..., 2] = 3.0
    mean[0, :, 2] = 0.01
    variance = RNG.uniform(0.01, 0.02, size=(5, 10, 6))
    variance[:2, :, 2] = 1e4
    return mean, variance


def test_unseen_parts_of_a_map_are_gray(sphere):
    figure = visualization.plot_sphere(*sphere)
    shown, depth, deviation = (
        arrays(axes(figure, title))[0]
        for title in ("map", "depth, m", "standard deviation of depth, m")
    )
    np.testing.assert_array_equal(shown[0], 0.75)
    np.testing.assert_array_equal(shown[1:], sphere[0][1:, :, 3:])
    np.testing.assert_array_equal(depth.mask.all(axis=1), [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(deviation.mask.all(axis=1), [1, 1, 0, 0, 0])
    gray = axes(figure, "depth, m").images[0].get_cmap().get_bad()
    np.testing.assert_allclose(gray, (0.75, 0.75, 0.75, 1))
    image = axes(figure, "standard deviation of depth, m").images[0]
    low, high = image.get_clim()  # only seen pixels count
    assert 0.1 <= low < high <= 0.02**0.5
    assert axes(figure, "depth, m").images[0].get_clim() == (0, 3)


def test_maps_without_colors_or_variance_are_drawn(sphere):
    mean, variance = sphere
    assert titles(visualization.plot_sphere(mean[..., :3])) == ["depth, m"]
    figure = visualization.plot_sphere(mean[..., :4], farthest=7.0, title="x")
    (gray,) = arrays(axes(figure, "x"))
    np.testing.assert_array_equal(gray[2], mean[2, :, 3:4].repeat(3, axis=1))
    assert axes(figure, "depth, m").images[0].get_clim() == (0, 7)
    nothing = np.full((3, 6, 3), 0.01), np.full((3, 6, 3), 1e4)
    visualization.to_image(visualization.plot_sphere(*nothing))
    with pytest.raises(ValueError, match="columns, rows and depth.*Received"):
        visualization.plot_sphere(mean[..., :2])
    with pytest.raises(ValueError, match="`variance`.*H=5"):
        visualization.plot_sphere(mean, variance[1:])


@pytest.mark.parametrize("shape", [(2000, 2, 6), (2, 2000, 6)])
def test_a_map_of_any_shape_is_large_enough_to_see(shape):
    figure = visualization.plot_sphere(np.ones(shape), np.ones(shape))
    height, _, _ = visualization.to_image(figure).shape
    assert 200 < height < 2200
    for ax in figure.axes:
        assert ax.get_window_extent().height > 30


def test_nan_and_infinity_in_a_map_count_as_unseen(sphere):
    mean, variance = sphere[0].copy(), sphere[1].copy()
    mean[3, 1, 2], mean[3, 2, 4], variance[3, 3, 2] = np.nan, np.inf, np.nan
    figure = visualization.plot_sphere(mean, variance)
    shown, depth, deviation = (arrays(ax)[0] for ax in figure.axes)
    np.testing.assert_array_equal(shown[3, 1:3], 0.75)
    np.testing.assert_array_equal(depth.mask[3, :5], [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(deviation.mask[3, :5], [0, 1, 1, 1, 0])


# Animations.


def test_an_animation_shows_memory_beside_heads(trace):
    animation = visualization.animate(trace, title="copy", max_steps=5)
    frames = animation.images()
    assert len(frames) == 5
    assert len({frame.shape for frame in frames}) == 1
    figure = animation._fig
    contents, heads = figure.axes
    assert contents.get_ylabel() == "slot (10 of 13)"
    (shown,) = arrays(contents)
    last = trace["memory"][0, 10, np.arange(-1, 9) % 13]
    np.testing.assert_array_equal(shown, last)
    assert texts(heads.get_xticklabels()) == ["write 0", "read 0", "read 1"]
    assert texts(figure.texts) == ["copy after step 10 (0 to 10)"]
    check_alike(frames[-1], visualization.to_image(figure))


def test_a_rendered_animation_does_not_warn_when_deleted(trace):
    animation = visualization.animate(trace, max_steps=3)
    animation.images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        animation.__del__()


@pytest.mark.parametrize("slots, end", [("used", 0.25), ("all", 1.0)])
def test_an_animation_scales_weights_like_a_picture(slots, end):
    spread = np.full((1, 3, 1, 5), 0.25)
    trace = {"memory": np.ones((1, 3, 5, 2)), "read_weighting": spread}
    animation = visualization.animate(trace, slots=slots)
    animation.images()
    assert animation._fig.axes[1].images[0].get_clim() == (0, end)


def test_an_animation_is_saved_and_shown_in_a_notebook(trace, tmp_path):
    animation = visualization.animate(trace, max_steps=3)
    animation.save(tmp_path / "memory.gif", writer="pillow")
    with Image.open(tmp_path / "memory.gif") as gif:
        assert gif.n_frames == 3
    assert animation._repr_html_().startswith('<img src="data:image/gif;base64')
    only = visualization.animate({"memory": trace["memory"]}, slots="all")
    assert len(only.images()) == 11
    with pytest.raises(ValueError, match="`trace` must have a 'memory'"):
        visualization.animate({"output": trace["output"]})


# In one call.


def test_a_trace_is_a_picture_in_a_notebook():
    layer = keras_memory.NTMLayer(3, memory_slots=7, slot_size=5)
    trace = keras_memory.trace(layer, np.ones((2, 11, 4), "float32"))
    assert trace._repr_png_().startswith(b"\x89PNG")
    assert "memory: (2, 11, 7, 5)" in repr(trace) and len(repr(trace)) < 600
    for parts in ({}, {"usage": trace["memory"]}, {"read_weighting": None}):
        assert type(trace)(parts)._repr_png_() is None
    assert isinstance(trace, dict)


def test_plot_draws_layers_and_models():
    x = RNG.uniform(size=(2, 11, 4)).astype("float32")
    layer = keras_memory.NTMLayer(
        3, memory_slots=7, slot_size=5, return_sequences=True, name="low"
    )
    figure = keras_memory.plot(layer, x, row=1)
    np.testing.assert_array_equal(arrays(axes(figure, "input"))[0], x[1].T)
    assert "write 0" in titles(figure)
    last = keras_memory.NTMLayer(3, memory_slots=7, slot_size=5, name="high")
    model = keras.Sequential([keras.Input((None, 4)), layer, last])
    shown = titles(keras_memory.plot(model, x, memory=False))
    assert {"low: write 0", "high: read 0"} <= set(shown)
    with pytest.raises(TypeError, match="a model with such.*Received"):
        keras_memory.plot(keras.Sequential([keras.layers.Dense(1)]), x)


@pytest.fixture
def x():
    return RNG.uniform(size=(2, 12, 4)).astype("float32")


def ntm(**options):
    options = {"return_sequences": True, **options}
    return keras_memory.NTMLayer(3, memory_slots=7, slot_size=5, **options)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.memory, self.dense = ntm(), keras.layers.Dense(2)

    def call(self, inputs):
        return self.dense(self.memory(inputs))


def test_plot_draws_an_unbuilt_model(x):
    figure = keras_memory.plot(Subclassed(), x)
    assert titles(figure)[:3] == ["input", "output", "gates"]
    outputs, traces = keras_memory.recurrent.trace_model(Subclassed(), x)
    assert len(traces) == 1 and outputs.shape == (2, 12, 2)


def test_plot_shows_all_sequences_in_one_time_order(x):
    layer = ntm(go_backwards=True)
    trace = keras_memory.trace(layer, x)
    figure = keras_memory.plot(layer, x, title="one")
    (array,) = arrays(axes(figure, "input"))
    np.testing.assert_array_equal(array, x[0, ::-1].T)
    (array,) = arrays(axes(figure, "output"))
    np.testing.assert_array_equal(array, trace["output"][0].T)
    assert texts(figure.texts) == ["one, from the last input to the first"]
    both = keras.layers.Bidirectional(ntm(name="ntm"))
    figure = keras_memory.plot(keras.Sequential([both]), x, slots="all")
    (array,) = arrays(axes(figure, "input"))
    np.testing.assert_array_equal(array, x[0].T)
    back = keras_memory.trace(both.backward_layer, x)["write_weighting"]
    (array,) = arrays(axes(figure, "backward_ntm (right to left): write 0"))
    np.testing.assert_allclose(array, back[0, ::-1, 0].T, atol=1e-6)


@pytest.mark.parametrize("is_model", [False, True])
def test_plot_follows_the_order_of_a_backward_layer(x, is_model):
    layer = ntm(go_backwards=True)
    outputs = np.asarray(layer(x))
    mask = np.ones((2, 12)) * (np.arange(12) > 3)
    given = {"inputs": x[..., :2], "targets": outputs, "mask": mask}
    model = keras.Sequential([layer]) if is_model else layer
    figure = keras_memory.plot(model, x, **given)
    (array,) = arrays(axes(figure, "input"))
    np.testing.assert_array_equal(array, x[0, ::-1, :2].T)
    (array,) = arrays(axes(figure, "|target - output|"))
    np.testing.assert_allclose(array, 0, atol=1e-6)
    with pytest.raises(ValueError, match="`inputs`.*Received"):
        keras_memory.plot(model, x, inputs=x[0])


@pytest.mark.parametrize(
    "layers, shown",
    [
        ([keras.layers.AveragePooling1D(2), ntm()], ["output", "gates"]),
        ([ntm(), keras.layers.AveragePooling1D(2)], ["input", "output"]),
        ([keras.layers.Reshape((2, 6, 4)), "each"], []),
    ],
)
def test_plot_leaves_out_sequences_of_another_length(x, layers, shown):
    if layers[1] == "each":
        layers[1] = keras.layers.TimeDistributed(ntm(return_sequences=False))
    figure = keras_memory.plot(keras.Sequential(layers), x)
    assert titles(figure)[: len(shown)] == shown
    assert shown or "input" not in titles(figure)


def test_plot_refuses_memories_of_two_lengths(x):
    layers = [ntm(), keras.layers.AveragePooling1D(2), ntm()]
    with pytest.raises(ValueError, match="`layer` must have.*one length.*Rec"):
        keras_memory.plot(keras.Sequential(layers), x)


def test_plot_takes_nested_lists(x):
    layer = ntm()
    for one in (layer, keras.Sequential([layer])):
        figure = keras_memory.plot(one, x.tolist())
        (array,) = arrays(axes(figure, "input"))
        np.testing.assert_array_equal(array, x[0].T)


def test_plot_errors_name_the_argument(x):
    cell = keras_memory.NTMCell(3, memory_slots=7, slot_size=5)
    index = keras_memory.KNNMemory(3, 4)
    for layer in (cell, index, None, keras.layers.Dense(1), Subclassed):
        with pytest.raises(TypeError, match="`layer` must be.*Received"):
            keras_memory.plot(layer, x)
    for wrong in ("text", None, [[1.0], [1.0, 2.0]], x[0]):
        with pytest.raises(ValueError, match="`x` must be.*Received"):
            keras_memory.plot(ntm(), wrong)


def test_plot_draws_maps_and_answers():
    camera = {
        "depth": np.ones((1, 2, 8, 8), "float32"),
        "features": np.ones((1, 2, 8, 8, 3), "float32"),
        "inverse_intrinsics": keras_memory.rooms.right_angle(8, 8)[None],
    }
    motion = np.tile(np.eye(3, 4, dtype="float32"), (1, 2, 1, 1))
    seen = {"cameras": camera, "motion": motion}
    for prior in (0.01, 0.1):
        options = {"depth_prior": prior, "smooth_kernel_size": 1}
        layer = keras_memory.ESMLayer(12, 24, **options)
        figure = keras_memory.plot(layer, seen)
        mask = arrays(axes(figure, "depth, m"))[0].mask
        assert mask.any() and not mask.all()
    batch = keras.tree.map_structure(lambda one: np.repeat(one, 2, 0), seen)
    batch["cameras"]["depth"][1] = 3.0
    options["variance_limits"] = 1e-3, 10.0
    layer = keras_memory.ESMLayer(12, 24, return_sequences=True, **options)
    figure = keras_memory.plot(layer, batch, row=1)
    assert axes(figure, "depth, m").images[0].get_clim()[1] > 2.5
    title = "standard deviation of depth, m"
    np.testing.assert_array_equal(arrays(axes(figure, title))[0].mask, mask)
    with pytest.raises(ValueError, match="`row` must be.*Received"):
        keras_memory.plot(layer, batch, row=2)
    x, y = RNG.uniform(size=(12, 4, 4)).astype("float32"), np.arange(12) % 2
    flat = keras.layers.Flatten()
    model = keras_memory.MemoryWrapClassifier(flat, 2, memory_size=5)
    model.set_memory(x, y)
    figure = keras_memory.plot(model, x[:2], labels=y[:2], attribution=False)
    assert "answer" in texts(figure.axes[0].texts)[0]


@pytest.mark.parametrize(
    "weighting, bits",
    [
        ([1.0, 0.0, 0.0], 0.0),
        (np.full((2, 8), 1 / 8), [3.0, 3.0]),
        ([0.0, 0.0], 0.0),
        ([0.5, 0.0], 0.5),
        ([1.0, -1e-7], 0.0),
    ],
)
def test_entropy_is_in_bits(weighting, bits):
    np.testing.assert_allclose(entropy(weighting), bits, atol=1e-12)


def test_entropy_of_a_wrong_weighting_is_nan_or_refused():
    assert np.isnan(entropy([np.nan, 1.0]))
    for wrong in (1.0, np.ones((3, 0)), [-0.5, 1.5]):
        with pytest.raises(ValueError, match="`weighting`.*Received"):
            entropy(wrong)


# Wrong arguments.

NAN, INF = np.nan, np.inf
RAGGED = [[1.0], [1.0, 2.0]]
ONE = Figure().subplots()
TWO = Figure().subplots(2)
NO_AXES = "a", 0, 3.5, Figure(), [None], [[ONE], [ONE, ONE]], TWO
NO_WIDTHS = 0, -1, NAN, INF, "6", None, 1e9
NO_SLOTS = 3, None, slice(0, 2), "x", [], [1.5], [9], {0: 1}
NO_COUNTS = 0, -1, None, "a", 1.5
NO_ARRAYS = None, "a", 5, {}, [], RAGGED, 1j * np.eye(5), np.zeros((0, 5))
SHARES = np.eye(3, 5)
CONTENTS = np.ones((2, 3, 4))
LINKS = np.zeros((2, 3, 3))
GATE = np.ones((3, 2))
TRACE = {
    "memory": np.ones((2, 6, 5, 3)),
    "read_weighting": np.ones((2, 6, 1, 5)),
    "write_weighting": np.ones((2, 6, 1, 5)),
    "a_gate": np.ones((2, 6, 1)),
}
OTHERS = (
    {"read_weighting": np.ones((2, 6, 1, 4))},
    {"read_weighting": np.full((2, 6, 1, 5), 2.0)},
    {"read_weighting": np.ones((2, 6))},
    {"read_weighting": RAGGED},
    {"read_weighting": None},
)
NO_TRACES = (None, [], "a", 3, {}, {"usage": CONTENTS}, {"a": None})
NO_TRACES += ({"memory": CONTENTS}, {"memory": RAGGED}, {"memory": None})
NO_TRACES += tuple({**TRACE, **other} for other in OTHERS)
SPHERE = np.full((4, 8, 6), 0.5)
CURVES = {"one": ([1, 2], [3, 4])}
RUNS = {"one": {"loss": [1, 2, 3]}}
NO_RUNS = (
    *(None, 3, "a", [], [1]),
    {"loss": [1, 2, 3], "mae": [1]},  # the epoch of `mae` is unknown
    *({"loss": wrong} for wrong in ("abc", 3, [1, None], [], RAGGED)),
    *([{"step": at, "loss": 1}, {"step": 1, "loss": 1}] for at in (2, NAN)),
    [{"loss": "x"}],
)
IMAGE = np.ones((5, 5))
TILE = visualization.Tile(IMAGE)
WHY = Explanation(
    *(1, np.arange(2), np.array([0.6, 0.4]), np.array([1, 0])),
    *(np.array([1, 0]), np.ones((2, 5, 5)), IMAGE),
)
NO_HEATS = "a", RAGGED, np.ones((4, 5)), 5
BYTES = np.zeros((2, 3, 3), "uint8")


@pytest.mark.parametrize(
    "function, given, name, wrongs",
    [
        ("plot_weighting", {}, "weighting", NO_ARRAYS),
        (
            "plot_weighting",
            {},
            "weighting",
            (2 * SHARES, -SHARES, SHARES + INF),
        ),
        ("plot_weighting", {}, "weighting", (SHARES[0], np.ones((2, 2, 2, 2)))),
        ("plot_weighting", {"weighting": SHARES}, "ax", NO_AXES),
        ("plot_weighting", {"weighting": SHARES}, "width", NO_WIDTHS),
        ("plot_weighting", {"weighting": SHARES}, "slots", NO_SLOTS),
        ("plot_weighting", {"weighting": SHARES}, "names", (5, [], "ab", {})),
        ("plot_memory", {}, "memory", (*NO_ARRAYS, SHARES)),
        ("plot_memory", {"memory": CONTENTS}, "ax", NO_AXES),
        ("plot_memory", {"memory": CONTENTS}, "width", NO_WIDTHS),
        ("plot_memory", {"memory": CONTENTS}, "slots", NO_SLOTS),
        ("plot_memory", {"memory": CONTENTS}, "frames", NO_COUNTS),
        ("plot_linkage", {}, "linkage", (*NO_ARRAYS, SHARES, CONTENTS)),
        ("plot_linkage", {}, "linkage", (LINKS + 2, LINKS - 0.5, LINKS + INF)),
        ("plot_linkage", {"linkage": LINKS}, "ax", NO_AXES),
        ("plot_linkage", {"linkage": LINKS}, "width", NO_WIDTHS),
        ("plot_linkage", {"linkage": LINKS}, "slots", NO_SLOTS),
        ("plot_linkage", {"linkage": LINKS}, "frames", NO_COUNTS),
        ("plot_gates", {}, "gates", (None, {}, [], 3, "a", {"usage": GATE})),
        *(
            ("plot_gates", {}, "gates", [{"a_gate": wrong}])
            for wrong in (1, None, "x", RAGGED, GATE[0], 2 * GATE, CONTENTS)
        ),
        ("plot_gates", {}, "gates", [{"read_mode": np.ones((3, 2, 4))}]),
        ("plot_gates", {}, "gates", [{"a_gate": GATE, "b_gate": GATE[:2]}]),
        ("plot_gates", {"gates": {"a_gate": GATE}}, "ax", NO_AXES),
        ("plot_gates", {"gates": {"a_gate": GATE}}, "width", NO_WIDTHS),
        ("plot_task", {}, "trace", NO_TRACES),
        ("plot_task", {}, "trace", [{"read_mode": np.ones((2, 6, 1, 4))}]),
        ("plot_task", {}, "trace", [{"output": one} for one in (GATE, RAGGED)]),
        *(
            ("plot_task", {"trace": TRACE}, name, ("a", RAGGED, CONTENTS, 5))
            for name in ("inputs", "targets", "outputs", "mask")
        ),
        ("plot_task", {"trace": TRACE}, "row", (2, -1, None, 0.5, "a")),
        ("plot_task", {"trace": TRACE}, "slots", NO_SLOTS),
        ("plot_task", {"trace": TRACE}, "width", NO_WIDTHS),
        ("plot_task", {"trace": TRACE}, "figure", ("a", 3, ONE, [])),
        ("plot_task", {"trace": TRACE}, "memory", ("a", None, 2)),
        ("plot_sphere", {}, "mean", (*NO_ARRAYS, SPHERE[..., :2])),
        (
            "plot_sphere",
            {"mean": SPHERE},
            "variance",
            ("a", 5, RAGGED, -SPHERE),
        ),
        ("plot_sphere", {"mean": SPHERE}, "farthest", ("a", 0, -1, NAN, INF)),
        ("plot_sphere", {"mean": SPHERE}, "depth_prior", ("a", -1, NAN, None)),
        (
            "plot_sphere",
            {"mean": SPHERE, "variance": SPHERE},
            "variance_prior",
            ("a", -1, NAN, None),
        ),
        ("plot_sphere", {"mean": SPHERE}, "ax", (*NO_AXES[:-1], ONE)),
        ("animate", {}, "trace", (*NO_TRACES, {"output": CONTENTS})),
        ("animate", {"trace": TRACE}, "row", (2, -1, None)),
        ("animate", {"trace": TRACE}, "max_steps", NO_COUNTS),
        ("animate", {"trace": TRACE}, "slots", NO_SLOTS),
        ("animate", {"trace": TRACE}, "width", NO_WIDTHS),
        ("plot_curves", {}, "series", (None, [], "a", {})),
        *(
            ("plot_curves", {}, "series", [{"one": wrong}])
            for wrong in (3, None, "xy", ([1],), ([], []), ([1, 2], RAGGED))
        ),
        (
            "plot_curves",
            {},
            "series",
            [{"a": ([1, x], [1, 2])} for x in (NAN, INF)],
        ),
        ("plot_curves", {"series": CURVES}, "ax", NO_AXES),
        ("plot_curves", {"series": CURVES}, "goal", (NAN, INF, "a", [1])),
        ("plot_curves", {"series": CURVES, "log_y": True}, "goal", (-1, NAN)),
        ("plot_curves", {"series": CURVES}, "marks", (3, "a", {"a": NAN})),
        *(
            ("plot_curves", {"series": CURVES, "log_x": True}, "marks", wrong)
            for wrong in ([{"a": 0}], [{"a": -1.0}])
        ),
        ("plot_curves", {"series": CURVES}, "log_x", (None, "a")),
        ("plot_curves", {"series": CURVES}, "log_y", (None, "a")),
        ("plot_learning", {}, "runs", (None, [], "a", 3, {})),
        ("plot_learning", {}, "runs", [{"one": wrong} for wrong in NO_RUNS]),
        ("plot_learning", {"runs": RUNS}, "names", (5, "loss", ["x"])),
        ("plot_learning", {"runs": RUNS}, "x", (5, "y")),
        ("plot_learning", {"runs": RUNS}, "goals", (3, "a", {"a": NAN})),
        (
            "plot_tiles",
            {},
            "rows",
            (None, 5, "a", [], [[]], [[1]], [TILE], TILE),
        ),
        *(
            ("plot_tiles", {}, "rows", [[[TILE._replace(**{field: wrong})]]])
            for field, wrong in [
                *(("heat", wrong) for wrong in NO_HEATS),
                *(("image", wrong) for wrong in (None, "a", RAGGED, GATE[0])),
            ]
        ),
        ("plot_tiles", {"rows": [[TILE]]}, "ax", NO_AXES),
        ("plot_explanations", {}, "explanations", (None, 5, "a", [], [1], WHY)),
        *(
            ("plot_explanations", {"explanations": [WHY]}, name, wrongs)
            for name, wrongs in {
                "inputs": (5, "a", [], [RAGGED], [2 * IMAGE], [IMAGE[0]]),
                "labels": (3, "a", [1, 2], [0.5]),
                "class_names": (3, "a", ["one"], {}, []),
                "max_examples": NO_COUNTS,
                "ax": NO_AXES,
                "attributions": (
                    3,
                    "a",
                    [],
                    [1],
                    [(IMAGE,)],
                    [(IMAGE, [IMAGE])],
                ),
            }.items()
        ),
        *(
            (
                "plot_explanations",
                {"explanations": [WHY]},
                "attributions",
                wrongs,
            )
            for wrongs in (
                [[(heat, [IMAGE, IMAGE])] for heat in NO_HEATS],
                [[(IMAGE, [IMAGE, heat])] for heat in NO_HEATS],
            )
        ),
        ("to_image", {}, "figure", (None, "a", ONE, TILE)),
        ("to_png", {}, "image", (None, "a", RAGGED, IMAGE, BYTES[:0])),
        ("to_gif", {}, "images", (None, 5, "a", [], [None], [BYTES[:0]])),
        ("to_gif", {"images": [BYTES]}, "milliseconds", (9, None, "a", NAN)),
    ],
)
def test_errors_name_the_argument(function, given, name, wrongs):
    for wrong in wrongs:
        with pytest.raises((ValueError, TypeError), match=rf"`{name}.*Rec"):
            getattr(visualization, function)(**given, **{name: wrong})
