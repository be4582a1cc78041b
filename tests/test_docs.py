"""Pages of README and docs: Python runs, commands parse, links hold."""

import json
import pathlib
import re
import shlex

import harness
import pytest

from keras_memory import cli

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
LINKING = [
    *PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "saved_models").glob("*/README.md")),
]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(path, language):
    """The code blocks of a page in one language."""
    found = FENCED.findall(path.read_text())
    return [text for name, text in found if name == language]


def with_blocks(language):
    pages = [path for path in PAGES if blocks(path, language)]
    return pytest.mark.parametrize("path", pages, ids=name_of)


@with_blocks("python")
def test_python_runs(path, tmp_path, monkeypatch):
    """A page's blocks run in order, in one namespace that is empty at first."""
    harness.skip_on(*harness.OTHERS, because="pages export SavedModels")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    text = path.read_text()
    for block in blocks(path, "python"):
        # A traceback then has the page's own line numbers.
        above = "\n" * text[: text.index(block)].count("\n")
        exec(compile(above + block, path, "exec"), names)
    if path == README:
        assert names["inside"]["write_weighting"].shape == (2, 10, 1, 16)
        _, accuracy = names["model"].evaluate(names["x"], names["y"], verbose=0)
        assert accuracy > 0.95
        assert (tmp_path / "served/copy/1/saved_model.pb").exists()


def commands(path):
    """Commands in the shell blocks of a page: lists of words."""
    for block in blocks(path, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                end = words.index("&&")
                yield words[:end]
                words = words[end + 1 :]
            if words:
                yield words


@with_blocks("sh")
def test_commands_parse(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in commands(path):
        if words[0] == "keras-memory":
            parsed = cli.parser().parse_args(words[1:])
            if parsed.run is cli.train and not parsed.resume:
                cli._check_training(parsed)
                cli._config(parsed)  # names and types of `--set`
        elif words[:3] == ["python", "-m", "benchmarks"]:
            parse_benchmarks(words[3:], monkeypatch)
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        else:
            known = ("pip", "pytest", "export", "docker", "tensorboard")
            assert words[0] in known, words


@pytest.mark.parametrize(
    ("preset", "number", "sizes", "error", "largest"),
    [
        (
            "sam",
            0,
            {"memory_slots": 1000, "top_k": 4},
            "absolute_error_of_sum_up_to_5",
            10,
        ),
        pytest.param(
            "sdnc",
            0,
            {"memory_slots": 100, "top_k": 10, "sparse_links": 4},
            "wrong_bits_per_sequence_up_to_5",
            25,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "sdnc",
            1,
            {"memory_slots": 100, "top_k": 4, "sparse_links": 8},
            "wrong_bits_per_sequence_up_to_4",  # of the curriculum
            20,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_commands_of_pytorch_dnc_for_sparse_memories_train(
    preset, number, sizes, error, largest, tmp_path
):
    """With short sequences, few of them and without XLA."""
    harness.skip_on(*harness.OTHERS, because="runs export SavedModels")
    page = ROOT / "docs" / "migrating" / "pytorch_dnc.md"
    command = [words[1:] for words in commands(page) if preset in words][number]
    small = "max_length=5", "buckets=1", "batch_size=3", "test_lengths=()"
    for setting in (*small, "picture_every=0", "jit_compile=False"):
        command += ["--set", setting]
    out = tmp_path / "run"
    assert cli.main([*command, "--steps", "20", "--out", str(out)]) == 0
    model = json.loads((out / "config.json").read_text())["model"]
    assert model["name"] == preset
    assert {name: model[name] for name in sizes} == sizes
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 20
    assert 0 <= results[error] < largest


def parse_benchmarks(arguments, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    main = pytest.importorskip("benchmarks.__main__")
    ran = []

    def run(*options):
        ran.append(options)

    for module in (
        main.steps,
        main.scaling,
        main.memory_wrap,
        main.retrieval,
        main.esm,
        main.sam,
        main.sam_search,
        main.xla_memory,
        main.curriculum,
    ):
        monkeypatch.setattr(module, "run", run)
    for module in (main.scaling, main.sam):
        monkeypatch.setattr(module, "draw", run)
    monkeypatch.setattr(main, "check_checkout", lambda *given: None)
    with monkeypatch.context() as here:
        here.chdir(ROOT)  # of files that are to be read
        main.main(arguments)
    assert len(ran) == 1


def without_code(text):
    return FENCED.sub("", text)


def links(path):
    """Targets of a page's links and pictures within the repository."""
    text = without_code(path.read_text())
    found = re.findall(r"\]\(\s*([^)\s]+)\s*\)", text)
    found += re.findall(r'src="([^"]+)"', text)
    return [target for target in found if "://" not in target]


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    found = []
    for title in re.findall(
        r"^#+ (.*)$", without_code(path.read_text()), re.MULTILINE
    ):
        title = re.sub(r"[^\w\- ]", "", title.strip().lower())
        anchor = title.replace(" ", "-")
        repeated = found.count(anchor)
        found.append(f"{anchor}-{repeated}" if repeated else anchor)
    return found


@pytest.mark.parametrize("path", LINKING, ids=name_of)
def test_links_hold(path):
    for target in links(path):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(there), target


def test_every_page_can_be_reached():
    reached, ahead = set(), [README]
    while ahead:
        path = ahead.pop()
        if path in reached or path not in PAGES:
            continue
        reached.add(path)
        ahead += [
            (path.parent / target.partition("#")[0]).resolve()
            for target in links(path)
        ]
    assert reached == set(PAGES)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_code_blocks_name_their_language(path):
    text = path.read_text()
    languages = {name for name, _ in FENCED.findall(text)}
    assert languages <= {"python", "sh", "text"}
    assert "```" not in without_code(text)


def test_readme_is_short_and_begins_with_code():
    lines = README.read_text().splitlines()
    assert len(lines) <= 250
    assert lines.index("```python") + 1 < 40


def test_readme_has_the_commands_of_ci():
    found = blocks(README, "sh")
    tests = 'pip install -e ".[test]" && pytest\n'
    assert "pip install -e . && keras-memory train copy\n" in found
    assert tests in found
    assert tests.replace("install", "install -q") in (
        (ROOT / ".ci" / "run").read_text()
    )


def scaling_tables():
    """Numbers of the tables in docs/speed.md, as in benchmarks/scaling.json:
    (layer, axis, value, variant, quantity) -> number."""
    text, numbers = (ROOT / "docs" / "speed.md").read_text(), {}
    sections = re.findall(
        r"### (NTM|DNC), (\w+) varied.*?\n\n(\|.*?)\n\n", text, re.DOTALL
    )
    for layer, axis, table in sections:
        header, _, *rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in table.splitlines()
        ]
        for value, *cells in rows:
            for title, cell in zip(header[1:], cells, strict=True):
                variant, unit = title.rsplit(", ", 1)
                quantity = {"ms": "milliseconds", "MB": "megabytes"}[unit]
                value = value.replace(",", "")
                key = layer.lower(), axis, value, variant, quantity
                numbers[key] = cell
    return numbers


def test_tables_of_scaling_have_the_numbers_of_its_file():
    path = ROOT / "benchmarks" / "scaling.json"
    expected = {
        (r["layer"], r["axis"], str(r["value"]), r["variant"], quantity): r[
            quantity
        ]
        for r in json.loads(path.read_text())["results"]
        for quantity in ("milliseconds", "megabytes")
        if quantity in r
    }
    found = {
        key: float(cell.replace(",", ""))
        for key, cell in scaling_tables().items()
        if re.fullmatch(r"[\d.,]+", cell)
    }
    assert len(found) > 100 and found == expected
