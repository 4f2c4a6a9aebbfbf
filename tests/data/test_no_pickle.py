"""No pickle is ever loaded: it could run anything."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import megafold
from megafold.data import Cache, DataError, build_cache, sample_path

PACKAGE = Path(megafold.__file__).parent
# The comparison of stores measures the paper's design, on a file that it wrote itself.
MAY_UNPICKLE = {"bench/stores.py"}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}


def _unpickles(path: Path) -> list[str]:
    """Calls and imports of a module that could read a pickle."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] if node.module.split(".")[0] in UNPICKLERS else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in ("joblib.load", "pandas.read_pickle", "pd.read_pickle"):
                found.append(name)
            if name in ("np.load", "numpy.load") and options.get("allow_pickle") not in (
                None, "False",
            ):  # fmt: skip
                found.append(name)
            if name == "torch.load" and options.get("weights_only") != "True":
                found.append(name)
    return found


def test_no_module_reads_one_but_the_comparison_of_stores() -> None:
    found = {str(p.relative_to(PACKAGE)): _unpickles(p) for p in PACKAGE.rglob("*.py")}
    assert {name for name, calls in found.items() if calls} == MAY_UNPICKLE


def test_a_pickle_in_the_place_of_an_entry_is_refused_and_not_run(tmp_path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    build_cache(sample_path("1CRN"), tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    cache.entry_path(cache.index["1CRN"]["key"]).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="damaged cache entry"):
        cache.load("1CRN")
    assert build_cache(sample_path("1CRN"), tmp_path / "cache").ok == 1
    assert not (tmp_path / "sprung").exists()


def test_building_looking_and_drawing_find_no_class_in_a_pickle(tmp_path) -> None:
    """Python says when a pickle names something to be called; here that ends the process."""
    code = f"""
import sys
from megafold.data import *
from megafold.data.symmetry import symmetric_atoms
out = {str(tmp_path / "cache")!r}
path = sample_path("1CRN")
make_batch(example_features("1CRN"), generator=__import__("numpy").random.default_rng(0))

def stop(event, arguments):
    if event == "pickle.find_class":
        sys.stderr.write(f"unpickled {{arguments}}")
        sys.stderr.flush()
        __import__("os")._exit(9)

sys.addaudithook(stop)
build_cache(path, out)
build_cache(path, out)
assert [e.status for e in examine_cache(out)] == ["ok"]
SampledDataset(Cache(out), 20, steps=1)[0]
merge_caches([out], {str(tmp_path / "merged")!r})
print("no pickle so far", flush=True)
import pickle
pickle.loads(pickle.dumps(EntryReport("a", "b", "ok")))  # the hook is at work
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "no pickle so far\n", run.stderr
    assert run.returncode == 9
    assert "EntryReport" in run.stderr
