"""Block sizes: overrides, the shipped tables, and which entry a call takes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from megafold import ops
from megafold.ops import tuning
from megafold.ops.evo_attention import launch
from megafold.ops.tuning import candidates, config, table
from megafold.ops.tuning.table import DEFAULT, FOLDER, read_table, tables
from tests.numerics import DEVICE
from tests.ops.evo import attention

KERNEL = launch.FORWARD
CPU = torch.device("cpu")
FLAGS = ("KEYS_FIRST", "SHARED", "HELD")  # blocks that are yes or no
SIZES = (("D", 32), ("N", 384), ("K", 384), ("R", 384))
ONE, OTHER = (ops.Config({"ROWS": n, "BLOCK_Q": 16, "BLOCK_K": 32}, 4, 1) for n in (1, 2))


@pytest.fixture(autouse=True)
def no_override():
    """Each test starts without overrides, and leaves none behind."""
    assert not config._overrides
    yield
    ops.reset_configs()


def found(kernel=KERNEL, bits=16, sizes=SIZES):
    return tuning.lookup(kernel, CPU, bits, sizes)


# -- Overrides.


def test_use_config_overrides_one_kernel_and_is_undone():
    shipped, other_kernel = found(), found(launch.GRAD_Q)
    with ops.use_config(KERNEL, ONE):
        assert (found().config, found().source) == (ONE, "use_config")
        assert found(launch.GRAD_Q) == other_kernel
        with ops.use_config(KERNEL, OTHER):
            assert found().config == OTHER
        assert found().config == ONE
    assert found() == shipped


def test_use_config_is_undone_after_an_error():
    shipped = found()
    with pytest.raises(KeyError), ops.use_config(KERNEL, ONE):
        raise KeyError
    assert found() == shipped


def test_use_config_holds_in_every_thread():
    """The backward pass runs in threads of its own."""
    import threading

    seen = []
    with ops.use_config(KERNEL, ONE):
        thread = threading.Thread(target=lambda: seen.append(found().config))
        thread.start()
        thread.join()
    assert seen == [ONE]


def test_reset_configs_forgets_overrides_of_open_blocks_too():
    shipped = found()
    with ops.use_config(KERNEL, ONE):
        ops.reset_configs()
        assert found() == shipped
    assert found() == shipped


def test_explain_says_what_overrides():
    inputs, _ = attention("B1 S2 N5 H1 D8")
    with ops.use("triton"), ops.use_config(KERNEL, OTHER):
        lines = ops.explain("evo_attention", **inputs).kernels
    of_kernel = f"{KERNEL}: ROWS 2 BLOCK_Q 16 BLOCK_K 32 warps 4 stages 1 (use_config)"
    assert any(line.startswith(of_kernel) for line in lines)
    # A Hopper GPU tells that its own kernels do not run for that.
    of_kernels = [line for line in lines if not line.startswith("evo_attention.hopper: ")]
    assert sum("use_config" in line for line in of_kernels) == 1


def test_a_configuration_in_words():
    assert str(ONE) == "ROWS 1 BLOCK_Q 16 BLOCK_K 32 warps 4 stages 1"


# -- The tables that are shipped.


@pytest.mark.parametrize("bits", [16, 19, 32])
@pytest.mark.parametrize("width", [1, 8, 16, 24, 32, 48, 64, 100, 128])
@pytest.mark.parametrize("kernel", launch.KERNELS)
def test_every_kernel_has_a_default_for_every_width(kernel, width, bits):
    padded = launch.padded_width(width)
    assert padded in (16, 32, 64, 128)
    assert padded >= width
    defaults = [
        entry
        for entry in tables()[DEFAULT]
        if (entry.kernel, entry.bits, entry.sizes) == (kernel, bits, {"D": padded})
    ]
    assert len(defaults) == 1


def test_there_is_no_width_beyond_those_of_the_operator():
    with pytest.raises(LookupError, match=r"no block sizes for evo_attention.forward with D = 256"):
        found(sizes=(("D", 256),))


def kernels_with_tables() -> set[str]:
    """The kernels of every operator whose block sizes are looked up."""
    folders = sorted(path.parent.name for path in Path(ops.__file__).parent.glob("*/launch.py"))
    modules = [importlib.import_module(f"megafold.ops.{folder}.launch") for folder in folders]
    return {kernel for module in modules for kernel in module.KERNELS}


def test_every_shipped_entry_is_of_a_kernel_and_has_its_blocks():
    names = {entry.kernel: set(entry.blocks) for entry in tables()[DEFAULT]}
    assert set(names) == kernels_with_tables()
    for device, entries in tables().items():
        for entry in entries:
            assert set(entry.blocks) == names[entry.kernel], device
            assert entry.bits in (16, 19, 32)
            sizes = {name: size for name, size in entry.blocks.items() if name not in FLAGS}
            assert all(size > 0 for size in sizes.values())
            powers = [size for name, size in sizes.items() if name != "WAVES"]
            assert all(size & (size - 1) == 0 for size in powers)
            assert all(entry.blocks.get(flag, 0) in (0, 1) for flag in FLAGS)
            assert all(entry.blocks[name] >= 16 for name in entry.blocks if "BLOCK" in name)
            assert entry.num_warps in (1, 2, 4, 8, 16)
            assert entry.num_stages >= 1


def test_every_file_of_tables_is_read_and_no_two_are_of_one_device():
    devices = [device for path in sorted(FOLDER.glob("*.json")) for device in read_table(path)[0]]
    assert len(devices) == len(set(devices))
    assert set(devices) == set(tables())
    assert DEFAULT in devices


def test_unknown_device_gets_the_safe_default():
    assert "cpu" not in tables()
    entry = found()
    assert entry.source == "safe default, D 32"


# -- Which entry of a table.


def entry_of(n, k=384, r=384, d=32, bits=16, warps=4, kernel=KERNEL):
    return table.Entry(kernel, bits, {"D": d, "N": n, "K": k, "R": r}, {"BLOCK_Q": n}, warps, 1)


@pytest.fixture
def table_of_this_device(monkeypatch):
    """A table of the CPU beside the default; what it holds."""
    entries: list[table.Entry] = []
    known = {DEFAULT: tables()[DEFAULT], "cpu": entries}
    monkeypatch.setattr(config, "tables", lambda: known)
    config._from_tables.cache_clear()
    yield entries
    config._from_tables.cache_clear()


def blocks_at(n, k=384, r=384, d=32, bits=16):
    sizes = (("D", d), ("N", n), ("K", k), ("R", r))
    return tuning.lookup(KERNEL, CPU, bits, sizes).config.blocks


def test_nearest_size_wins_by_ratio(table_of_this_device):
    table_of_this_device += [entry_of(n=128), entry_of(n=1024)]
    assert blocks_at(n=130) == {"BLOCK_Q": 128}
    assert blocks_at(n=350) == {"BLOCK_Q": 128}  # 2.7 times, and 2.9 times
    assert blocks_at(n=380) == {"BLOCK_Q": 1024}  # 640 away, not 252; but 2.7 times, not 3
    assert blocks_at(n=9000) == {"BLOCK_Q": 1024}
    assert blocks_at(n=1) == {"BLOCK_Q": 128}
    source = tuning.lookup(KERNEL, CPU, 16, SIZES).source
    assert source == "table of cpu, D 32 N 1024 K 384 R 384"


def test_a_table_taken_over_from_another_device_is_named_after_it(monkeypatch):
    monkeypatch.setattr(config, "device_slug", lambda device: "nvidia-h200")
    source = tuning.lookup(KERNEL, CPU, 16, SIZES).source
    assert source.startswith("table of nvidia-h100-80gb-hbm3, taken for nvidia-h200, D 32")


def test_equal_configurations_have_one_hash():
    one = tuning.Config({"BLOCK_Q": 64, "BLOCK_K": 32}, 4, 2)
    other = tuning.Config({"BLOCK_K": 32, "BLOCK_Q": 64}, 4, 2)
    assert one == other
    assert hash(one) == hash(other)


def test_every_size_counts(table_of_this_device):
    table_of_this_device += [entry_of(n=64, k=64, r=1), entry_of(n=32, k=128, r=4096)]
    assert blocks_at(n=32, k=64, r=1) == {"BLOCK_Q": 64}
    assert blocks_at(n=64, k=64, r=4096) == {"BLOCK_Q": 32}
    assert blocks_at(n=32, k=128, r=100) == {"BLOCK_Q": 32}


def test_sizes_of_nothing_have_a_nearest_entry_too(table_of_this_device):
    table_of_this_device += [entry_of(n=64), entry_of(n=128)]
    assert blocks_at(n=0, k=0, r=0) == {"BLOCK_Q": 64}


def test_other_widths_bits_and_kernels_are_left_to_the_default(table_of_this_device):
    table_of_this_device.append(entry_of(n=384))
    assert found().source.startswith("table of cpu")
    assert found(bits=19).source == found(bits=32).source == "safe default, D 32"
    assert found(bits=19).config != found(bits=32).config
    assert found(sizes=(("D", 64), *SIZES[1:])).source == "safe default, D 64"
    assert found(kernel=launch.GRAD_KV).source == "safe default, D 32"


@pytest.mark.gpu
def test_a_gpu_is_known_by_its_name():
    slug = config.device_slug(torch.device(DEVICE))
    assert slug == slug.lower()
    assert " " not in slug
    for word in torch.cuda.get_device_name().lower().split():
        assert word in slug


def test_a_device_without_a_name_is_known_by_its_type():
    assert config.device_slug(CPU) == "cpu"
    assert config.device_slug(torch.device("meta")) == "meta"


# -- Reading a table.

GOOD = {
    "kernel": KERNEL, "bits": 16, "sizes": {"D": 32}, "blocks": {"ROWS": 1},
    "num_warps": 4, "num_stages": 2,
}  # fmt: skip


def written(path, content):
    path = path / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_table_is_read_as_it_is_written(tmp_path):
    path = written(tmp_path, {"devices": ["a", "b"], "entries": [GOOD]})
    assert read_table(path) == (["a", "b"], [table.Entry(**GOOD)])
    assert read_table(str(path)) == read_table(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSONDecodeError"),
        ([], "TypeError"),
        ({"entries": []}, "devices"),
        ({"devices": []}, "entries"),
        ({"devices": [], "entries": [{**GOOD, "colour": 1}]}, "colour"),
        ({"devices": [], "entries": [{k: v for k, v in GOOD.items() if k != "bits"}]}, "bits"),
        ({"devices": [], "entries": [{**GOOD, "num_warps": "4"}]}, "num_warps of evo_attention"),
        ({"devices": [], "entries": [{**GOOD, "num_stages": None}]}, "num_stages of evo_attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_table_is_refused_with_its_file_and_the_reason(tmp_path, content, reason):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=rf"table.json is no table of block sizes: .*{reason}"):
        read_table(path)


# -- What is worth trying.


@pytest.mark.parametrize("bits", [16, 19, 32])
@pytest.mark.parametrize("kernel", candidates.kernels())
def test_candidates_are_many_different_and_have_the_blocks_of_the_kernel(kernel, bits):
    names = set(candidates.block_names(kernel))
    found = candidates.candidates(kernel, bits).configs({"C": 128})
    assert len(found) > 10
    assert len({str(one) for one in found}) == len(found)
    assert all(set(one.blocks) == names for one in found)


@pytest.mark.parametrize("kernel", candidates.kernels())
def test_what_an_operator_declares_of_a_kernel_counts(kernel):
    operator = kernel.partition(".")[0]
    module = importlib.import_module(f"megafold.ops.{operator}.candidates")
    declared, found = module.candidates(kernel, 16), candidates.candidates(kernel, 16)
    assert module.candidates(f"{operator}.of_another_name", 16) is None
    assert tuple(found.blocks) == candidates.block_names(kernel)
    if declared is not None:
        assert (found.warps, found.stages) == (declared.warps, declared.stages)
        for name in set(found.blocks) & set(declared.blocks):
            assert found.blocks[name] == declared.blocks[name]


def test_of_a_block_that_is_not_declared_they_lie_around_the_default(monkeypatch):
    blocks = {"ROWS": 4, "BLOCK_K": 32}
    new = [table.Entry("layer_norm.normalise", 16, {"C": 128}, blocks, 4, 1)]
    monkeypatch.setattr(candidates, "tables", lambda: {DEFAULT: new})
    found = candidates.candidates("layer_norm.normalise", 16)
    assert found.blocks == {"ROWS": (1, 2, 4, 8, 16, 32, 64, 128), "BLOCK_K": (16, 32, 64)}
    assert found.stages == (1,)


def test_of_a_kernel_that_nothing_is_declared_of_they_lie_around_the_default(monkeypatch):
    new = [
        table.Entry("transition.new", 16, {"C": c}, {"BLOCK_X": x, "TURNS": 4, "SPLIT": 0}, 2, 5)
        for c, x in ((16, 16), (32, 64))
    ]
    monkeypatch.setattr(candidates, "tables", lambda: {DEFAULT: new})
    found = candidates.candidates("transition.new", 32)
    assert found.blocks == {
        "BLOCK_X": (16, 32, 64, 128), "TURNS": (2, 4, 8), "SPLIT": (0, 1),
    }  # fmt: skip
    assert (found.warps, found.stages) == ((2, 4, 8), (1, 2, 3, 5))
    with pytest.raises(ValueError, match=r"unknown kernel 'magic'; choose one of \('transition"):
        candidates.candidates("magic", 16)


def test_a_tile_of_whole_rows_fills_the_registers_of_its_threads():
    for channels in (16, 128, 1024):
        for one in candidates.candidates("layer_norm.gradient", 16).configs({"C": channels}):
            held = one.blocks["ROWS"] * channels / (32 * one.num_warps)
            assert 4 <= held <= 32


def test_look_ups_are_heard_while_one_listens_and_no_longer():
    with tuning.lookups() as outer:
        with tuning.lookups() as inner:
            found()
        with ops.use_config(KERNEL, ONE):
            found()
    found()
    assert inner == [(KERNEL, 16, SIZES)]
    assert outer == [*inner, *inner]
