"""Sweep files, and the cells that they come to."""

import itertools
import json
import math
import time
import tomllib
import tracemalloc
from pathlib import Path

import pytest
from pilotfish_sweep.plan import Sweep

from pilotfish import InputError

BASE = 'prompt = "a red cat"\nsteps = 2\n[[plugins]]\nuse = "blue"\n'


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sweep(axes, base=BASE):
    Path("sweep.toml").write_text(base + axes)
    return Sweep.read("sweep.toml")


def contents(planned):
    return [planned.content(cell.values) for cell in planned.cells()]


def values(axes):
    """The values of the sweep's settings in its cells, in their order."""
    return [cell.values for cell in sweep(axes).cells()]


def test_the_cells_are_the_product_of_the_axes_and_hold_what_the_run_file_holds():
    planned = sweep('[axes]\nseed = [3, 4]\n"plugins.blue.scale" = [0, 0.5]\n"preset.rho" = [0.1]')
    expected = [
        {
            "prompt": "a red cat",
            "steps": 2,
            "seed": seed,
            "preset": {"base": "balanced", "rho": 0.1},
            "plugins": [{"use": "blue", "scale": scale}],
        }
        for seed, scale in itertools.product([3, 4], [0, 0.5])
    ]
    for content in contents(planned):
        content["preset"] = {k: content["preset"][k] for k in ("rho",)} | {"base": "balanced"}
        expected.remove(content)
    assert not expected


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("[1, 2, 5]", [1, 2, 5]),
        ("{from = 1, to = 4}", [1, 2, 3, 4]),
        ("{from = 9, to = 1, step = -4}", [9, 5, 1]),
        ("{from = 0, to = 0.3, step = 0.1}", [0, 0.1, 0.2, 0.3]),
        ("{from = 0, to = 1, step = 0.4}", [0, 0.4, 0.8]),
        ("{from = 0, to = 1, count = 5}", [0, 0.25, 0.5, 0.75, 1]),
        ("{from = 7, to = 9, count = 1}", [7]),
        ('{from = 0.01, to = 100, count = 5, spacing = "log"}', [0.01, 0.1, 1, 10, 100]),
    ],
)
def test_an_axis_is_a_list_or_a_range(axis, expected):
    found = [value for (value,) in values(f"[axes]\nguidance_scale = {axis}")]
    assert found == expected


def test_prompts_come_from_a_file_beside_the_sweep(tmp_path):
    (tmp_path / "texts").mkdir()
    lines = "a cat\r\n\n  # a dog, 'quoted' \n\ufeffö\n"
    (tmp_path / "texts" / "prompts.txt").write_bytes(lines.encode())
    (tmp_path / "texts" / "sweep.toml").write_text('[axes]\nprompt = {file = "prompts.txt"}')
    planned = Sweep.read("texts/sweep.toml")
    found = [content["prompt"] for content in contents(planned)]
    assert found == ["a cat", "# a dog, 'quoted'", "\ufeffö"]


def test_a_zip_goes_row_by_row_and_multiplies_the_other_axes():
    axes = '[axes]\nseed = [1, 2]\n[[axes.zip]]\nprompt = ["a", "b"]\nsteps = [5, 6]'
    planned = sweep(axes)
    assert planned.keys == ("seed", "prompt", "steps")
    found = {cell.values for cell in planned.cells()}
    assert found == {(1, "a", 5), (1, "b", 6), (2, "a", 5), (2, "b", 6)}


DRAWN = """
[axes.random]
count = {count}
draw_seed = {seed}
"plugins.blue.scale" = {{uniform = [2, 4]}}
guidance_scale = {{log_uniform = [0.01, 100]}}
steps = {{integers = [5, 7]}}
scheduler = ["ddim", "euler"]
"""


def test_random_search_draws_within_its_bounds_and_evenly():
    drawn = values(DRAWN.format(count=2000, seed=1))
    scales, guidance, steps, schedulers = zip(*drawn, strict=True)
    assert min(scales) >= 2
    assert max(scales) <= 4
    # Means of 2000: five times their standard errors, 0.58, 2.66 and 0.82 over the root of 2000.
    assert abs(sum(scales) / 2000 - 3) < 0.065
    assert abs(sum(map(math.log, guidance)) / 2000) < 0.30
    assert abs(sum(steps) / 2000 - 6) < 0.092
    assert {*steps} == {5, 6, 7}
    assert 888 < schedulers.count("ddim") < 1112


def test_more_draws_keep_those_before_and_another_seed_keeps_none():
    few, many = (values(DRAWN.format(count=count, seed=1)) for count in (5, 9))
    assert {*few} < {*many}
    assert not {*few} & {*values(DRAWN.format(count=9, seed=2))}


def test_a_setting_more_leaves_the_draws_of_the_others():
    drawn = DRAWN.format(count=4, seed=1)
    others = drawn.replace("scheduler =", "num_images = [1]\nscheduler =")
    assert {v[:3] for v in values(drawn)} == {v[:3] for v in values(others)}


def test_cells_of_one_prompt_and_model_follow_each_other():
    axes = '[axes]\nseed = [1, 2, 3]\nprompt = ["a", "b"]\ndtype = ["float32", "float16"]'
    found = [(c["prompt"], c["dtype"]) for c in contents(sweep(axes))]
    assert len([*itertools.groupby(found)]) == 4


def test_a_cell_that_is_there_twice_is_planned_once():
    assert len(sweep("[axes]\nseed = [1, 2, 1]").cells()) == 2


def test_a_name_depends_on_the_content_and_on_nothing_else():
    plain = {c.name for c in sweep("[axes]\nseed = [1, 2]\nsteps = [2]").cells()}
    assert not plain & {c.name for c in sweep("[axes]\nseed = [1, 2]\nsteps = [3]").cells()}
    moved = Sweep.of(
        {"seed": 9, "axes": {"seed": [2, 1]}, "plugins": [{"use": "blue"}], "steps": 2}
        | {"prompt": "a red cat"},
        Path(),
    )
    assert {c.name for c in moved.cells()} == plain
    scored = Sweep.of({**moved.base, "axes": {"seed": [1, 2]}, "scores": [{"use": "blue"}]}, Path())
    assert {c.name for c in scored.cells()} == plain
    assert scored.scored != moved.scored


def test_more_values_keep_the_cells_before():
    before = {cell.name for cell in sweep("[axes]\nsteps = [2, 3]").cells()}
    assert before < {cell.name for cell in sweep("[axes]\nsteps = [2, 3, 4]\nseed = [0]").cells()}


def test_the_folders_own_sweep_plans_the_same_without_the_files_it_was_made_from(tmp_path):
    (tmp_path / "prompts.txt").write_text('a "cat"\nb\\c\n')
    axes = '\n[axes]\nprompt = {file = "prompts.txt"}' + DRAWN.format(count=3, seed=5)
    planned = sweep(axes + '\n[[axes.zip]]\nseed = [1, 2]\nnegative_prompt = ["x", "y"]')
    (tmp_path / "prompts.txt").unlink()
    again = Sweep.of(tomllib.loads(planned.to_toml()), Path("nowhere"))
    assert [cell.name for cell in again.cells()] == [cell.name for cell in planned.cells()]
    assert (again.keys, again.scored) == (planned.keys, planned.scored)


def test_a_presets_knobs_survive_an_axis_of_presets_wherever_it_stands():
    planned = sweep('[axes]\n"rho" = [0.25]\npreset = ["tfg", "freedom"]')
    assert [content["preset"]["rho"] for content in contents(planned)] == [0.25, 0.25]
    assert len({json.dumps(content["preset"]) for content in contents(planned)}) == 2


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("", "sweep.toml has no [axes]"),
        ("[axes]", "sweep.toml: [axes] must be a table of settings"),
        ("[axes]\nseed = 3", "axes: seed must be a list of values"),
        ("[axes]\nseed = []", "axes: seed has no values"),
        ("[axes]\nseed = {from = 1}", "axes: seed must be a list of values"),
        ("[axes]\nseed = {from = 2, to = 1}", "axes: seed must be a list of values"),
        ("[axes]\nseed = {from = 0, to = 1, step = 0}", "axes: seed must be a list of values"),
        ('[axes]\nseed = {from = 0, to = 1, count = 3, spacing = "log"}', "numbers above 0"),
        ("[axes]\nplugins.blue.scale = [1]", 'write "plugins.blue" in quotes if it is one'),
        ("[axes]\nstepz = [1]", "no key called 'stepz'. Did you mean 'steps'?"),
        ('[axes]\n"plugins.red.scale" = [1]', "no plugin in this run called 'red'"),
        ('[axes]\nprompt = {file = "none.txt"}', "cannot read the file of prompt, none.txt"),
        ("[axes]\nseed = [1]\n[[axes.zip]]\nseed = [2]", "axes: seed varies twice"),
        ("[[axes.zip]]\nseed = [2]\nsteps = [1, 2]", "got 1 of seed, 2 of steps"),
        ("[axes]\nzip = [3]", "zip must be [[axes.zip]] tables"),
        ("[axes.random]\nseed = [1]", "random must be a table with count = N"),
        ("[axes.random]\ncount = 2\nseed = {normal = [0, 1]}", "axes: random: seed must be"),
        ("[axes.random]\ncount = 2\nrho = {log_uniform = [0, 1]}", "axes: random: rho must be"),
        ("[axes]\nsteps = [1, 2.5]", "steps = 2.5: steps must be a whole number >= 1; got 2.5"),
        ('[axes]\n"plugins.blue.scal" = [1]', "the first cell: Blue: no setting 'scal'"),
        ("[axes]\nseed = [1]\n[[scores]]\nuse = 'bloe'", "no plugin called 'bloe'"),
        ("[axes]\nseed = [1]\n[[scores]]\nname = 'x'", "a table needs use, a guide's name, or"),
        ("[axes]\nseed = [1]\n[scores]\nuse = 'x'", "scores must be [[scores]] tables"),
    ],
)
def test_what_is_no_sweep_is_refused_in_one_sentence(axes, message):
    with pytest.raises(InputError) as caught:
        planned = sweep(axes)
        planned.check()
        planned.cells()
    assert message in str(caught.value)


def test_a_hundred_thousand_cells_are_planned_in_ten_seconds_and_500_megabytes():
    axes = '"plugins.blue.scale" = {from = 0, to = 1, count = 10}'
    planned = sweep(f"[axes]\n{axes}\nseed = {{from = 1, to = 10000}}")
    begin = time.process_time()
    cells = planned.cells()
    seconds = time.process_time() - begin
    assert len({cell.name for cell in cells}) == 100_000
    print(f"{seconds:.2f} s")
    assert seconds < 10
    tracemalloc.start()
    try:
        cells = sweep(f"[axes]\n{axes}\nseed = {{from = 1, to = 1000}}").cells()
        assert len(cells) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 50e6  # a tenth of the cells and of the memory
    finally:
        tracemalloc.stop()


def test_the_readmes_sweep_is_one_and_its_axes_give_what_its_table_says():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    Path("readme.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    planned = Sweep.read("readme.toml")
    planned.check()
    assert len(planned.cells()) == 12
    assert values("[axes]\nsteps = {from = 10, to = 50, step = 10}") == [
        (10,), (20,), (30,), (40,), (50,)
    ]  # fmt: skip
