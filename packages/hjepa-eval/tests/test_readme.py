import re
from pathlib import Path


def test_the_examples_of_the_readme_run_from_top_to_bottom(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(examples) == 7
    namespace = {"__name__": "readme"}
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    for word in ("| kNN k=20 |", "fine-tuned", "LiDAR", "DCI", "| random | noise | random | encoder | none |"):
        assert word in printed
