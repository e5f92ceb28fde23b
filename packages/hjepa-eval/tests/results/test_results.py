import copy
import io
import json
import math
import os
import subprocess
import sys

import pytest
from rich.console import Console

from hjepa_eval import FeatureName, Interval, Measurement, Results, merge, read_results, write_results
from hjepa_eval.results.__main__ import main
from hjepa_eval.results.measurement import to_json
from hjepa_eval.results.schema import check, results_schema

NAME = FeatureName(branch="target", level="1", pooling="mean")


def results(model="run a", value=0.5, n=100, **more):
    interval = Interval(value=value, low=value - 0.1, high=value + 0.1, method="bootstrap", n=n)
    return Results(
        model=model,
        data="set | one",
        measurements=[
            Measurement.of("knn_20", NAME, interval, n_train=1000, details={"temperature": 0.07}),
            Measurement(metric="rankme", name=NAME, value=31.25, n=512),
            *more.get("others", ()),
        ],
        about={"command": "hjepa", "seed": 3},
    )


def test_a_terminal_that_has_not_all_letters_is_told_them(tmp_path, monkeypatch):
    write_results(results("rün"), tmp_path / "r.json")
    for options in ([], ["--markdown"]):
        shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr("sys.stdout", shown)
        assert main([str(tmp_path / "r.json"), *options]) == 0
        shown.flush()
        assert rb"r\xfcn" in shown.buffer.getvalue()


def test_what_is_written_is_read_again(tmp_path):
    write_results(results(), tmp_path / "r.json")
    found = read_results(tmp_path / "r.json")
    assert found.model == "run a"
    assert found.about == {"command": "hjepa", "seed": 3}
    assert found.measurements[0] == results().measurements[0]
    assert math.isnan(found.measurements[1].low)
    assert os.listdir(tmp_path) == ["r.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema="hjepa-eval/results/0"), "another version"),
        (lambda c: c.pop("data"), r"results\.data: missing"),
        (lambda c: c.update(extra=1), r"results\.extra: unknown"),
        (lambda c: c["measurements"][0].update(n=0), r"measurements\[0\]\.n=0: it must be at least 1"),
        (lambda c: c["measurements"][1].update(n=True), r"measurements\[1\]\.n=True"),
        (lambda c: c["measurements"][0].update(value="0.5"), r"value='0.5': it must be number or null"),
        (lambda c: c["measurements"][0].update(method="guess"), "allowed: bootstrap"),
        (lambda c: c["measurements"][0].update(branch=""), "must not be empty"),
        (lambda c: c["measurements"][0]["details"].update(list=[1]), r"details\.list"),
        (lambda c: c.update(measurements={}), "must be array"),
    ],
)
def test_every_departure_from_the_schema_is_refused_with_its_place(tmp_path, change, message):
    content = copy.deepcopy(to_json(results()))
    change(content)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as raised:
        read_results(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"schema": NaN}'])
def test_what_is_no_results_file_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="no results of hjepa-eval") as raised:
        read_results(path)
    assert "\n" not in str(raised.value)


def test_results_that_break_the_schema_are_not_written_and_the_old_file_stays(tmp_path):
    path = tmp_path / "r.json"
    write_results(results(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="n=0"):
        write_results(results(n=0), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["r.json"]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    write_results(results(value=math.inf), tmp_path / "r.json")
    assert "Infinity" not in (tmp_path / "r.json").read_text()
    assert math.isnan(read_results(tmp_path / "r.json").measurements[0].value)


def test_the_published_schema_uses_only_what_is_checked():
    known = {"$schema", "title", "description", "type", "const", "enum", "minLength", "minimum", "required"}
    known |= {"properties", "additionalProperties", "items"}

    def visit(schema):
        assert set(schema) <= known
        for part in schema.get("properties", {}).values():
            visit(part)
        for key in ("items", "additionalProperties"):
            if isinstance(schema.get(key), dict):
                visit(schema[key])

    visit(results_schema())
    check(to_json(results()), results_schema())


def test_a_merged_table_shows_every_number_with_interval_and_count():
    other = Measurement(metric="linear", name=NAME, value=0.61, n=50, n_train=1000)
    table = merge([results(), results("run b", 0.7, n=60, others=[other])])
    assert table.header == [
        "model",
        "data",
        "branch",
        "level",
        "pooling",
        "knn_20",
        "rankme (n 512)",
        "linear (n 1000/50)",
    ]
    assert table.rows[0][5:] == ["0.500 [0.400, 0.600] (n 1000/100)", "31.2", "-"]
    assert table.rows[1][5:] == ["0.700 [0.600, 0.800] (n 1000/60)", "31.2", "0.610"]
    markdown = table.markdown().splitlines()
    assert len(markdown) == 4
    assert markdown[2].startswith("| run a | set \\| one | target | 1 | mean | 0.500 [")
    console = Console(file=io.StringIO(), width=200)
    console.print(table.rich("[all]"))
    assert "0.500 [0.400, 0.600] (n 1000/100)" in console.file.getvalue()
    assert merge([results()], metrics=["rankme"]).header[5:] == ["rankme (n 512)"]
    # Features without any of them have no row.
    assert [row[0] for row in merge([results(), results("run b", others=[other])], metrics=["linear"]).rows] == [
        "run b"
    ]
    with pytest.raises(ValueError, match="twice"):
        merge([results(), results()])
    with pytest.raises(ValueError, match="allowed: knn_20"):
        merge([results()], metrics=["f1"])


def test_the_command_line_merges_files_and_names_what_is_wrong(tmp_path, capsys, monkeypatch):
    paths = [str(tmp_path / name) for name in "ab"]
    for path in paths:
        write_results(results(f"run {path[-1]}"), path)
    assert main([*paths, "--markdown", "--metrics", "knn_20"]) == 0
    assert capsys.readouterr().out.count("0.500 [0.400, 0.600]") == 2
    for width, header in (("70", "model  run a  run b"), ("160", "model data branch level pooling")):
        monkeypatch.setenv("COLUMNS", width)
        assert main(paths) == 0
        shown = capsys.readouterr().out
        assert header.split() == shown.split("\n")[1].split()[: len(header.split())]
        assert shown.count("0.500 [0.400, 0.600]") == 2
        assert "…" not in shown
    assert main([paths[0], str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["a", "--markdwon"], ["a", "--metrics"]])
def test_wrong_words_are_one_line_and_code_2(arguments, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("python -m hjepa_eval.results: ")
    assert said.endswith("; python -m hjepa_eval.results --help says more\n")
    assert said.count("\n") == 1


def test_no_name_of_a_wide_table_is_cut_off(tmp_path, capsys, monkeypatch):
    names = [f"runs/with-a-long-name-{number}" for number in range(9)]
    for name in names:
        write_results(results(name), tmp_path / name[-1])
    monkeypatch.setenv("COLUMNS", "80")
    assert main([str(tmp_path / name[-1]) for name in names]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    # Too wide when it is turned, too: a letter a cell would tell nothing.
    for name in names:
        assert shown.count(f" {name} ") == 1
    assert shown.count("0.500 [0.400, 0.600]") == len(names)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("words", [[], ["--markdown"]])
def test_a_full_disk_is_one_line_and_code_2(words, tmp_path):
    write_results(results(), tmp_path / "a.json")
    command = [sys.executable, "-m", "hjepa_eval.results", str(tmp_path / "a.json"), *words]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == "python -m hjepa_eval.results: [Errno 28] No space left on device\n"
    assert done.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--markdown"]])
def test_a_reader_that_has_gone_is_no_traceback(words, tmp_path):
    write_results(results(), tmp_path / "a.json")
    command = [sys.executable, "-m", "hjepa_eval.results", str(tmp_path / "a.json"), *words]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.stderr == ""
